"""`actcache lens`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import actcache as ac
from actcache.cli.prompts import read_prompt
from actcache.demo import model_path
from cli_helpers import Cli
from lens_helpers import maps, save

PROMPT = "The Eiffel Tower is in the city of"
MODEL = str(model_path())


def test_what_each_layer_would_predict(cli: Cli, tmp_path: Path) -> None:
    arguments = ("lens", MODEL, PROMPT, "--store", str(tmp_path), "--token", " Paris")
    status, out, err = cli(*arguments)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "prompt 0, position 8, behind ' of'"
    assert lines[1].split() == ["layer", "entropy", "KL", "'", "Paris'", "best"]
    # What the demo says of its model: the fact is there from block 4 on.
    assert lines[5].split()[:5] == ["resid_post.3", "5.841", "3.884", "0.020", "#2"]
    assert lines[7].split() == [
        *["resid_post.5", "0.010", "0.000", "0.999", "#0", "'", "Paris'", "0.999"],
        *["'", "Lisbon'", "0.000", "'", "Rome'", "0.000", "'", "Germany'", "0.000"],
    ]
    assert len(lines) == 8
    assert all(len(line) <= 110 for line in lines)
    # The second time nothing is computed, and the same is said.
    assert cli(*arguments)[1] == out
    status, out, err = cli(*arguments, "--position", "3", "--layers", "4,-1", "--top-k", "1")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "prompt 0, position 3, behind ' Tower'"
    assert [line.split()[0] for line in lines[2:]] == ["resid_post.4", "resid_post.5"]
    assert lines[3].endswith("' is' 0.743")


def test_a_narrow_terminal(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = cli("lens", MODEL, PROMPT, "--store", str(tmp_path), "--top-k", "20")
    lines = out.splitlines()
    assert len(lines) == 8
    assert 60 < max(map(len, lines)) <= 80


def test_json_has_every_position(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    arguments = ("--top-k", "2", "--layers", "0,-1", "--token", " Paris", "--html", str(page), "--json")
    status, out, err = cli("lens", MODEL, PROMPT, "--store", str(tmp_path / "store"), *arguments)
    assert status == 0, err
    said = json.loads(out)
    (one_prompt,) = said["prompts"]
    assert (said["model_name"], one_prompt["prompt"], said["html"]) == (MODEL, PROMPT, str(page))
    assert (said["site"], said["layers"]) == ("resid_post", [0, 5])
    lens = ac.UnifiedCache(MODEL, cache_pooled=False, compute_perplexity=False, store=tmp_path / "store").logit_lens(
        PROMPT, 2, tokens=" Paris"
    )
    assert [p["position"] for p in one_prompt["positions"]] == list(range(9))
    for at, position in enumerate(one_prompt["positions"]):
        assert position["token_id"] == int(lens.input_ids[0, at])
        assert position["token"] == lens.text(position["token_id"])
        for one in position["layers"]:
            layer = one["layer"]
            assert one["entropy"] == pytest.approx(float(lens.entropy[layer, 0, at]))
            assert one["kl"] == pytest.approx(float(lens.kl[layer, 0, at]))
            assert [t["token_id"] for t in one["top"]] == lens.tokens[layer, 0, at].tolist()
            assert [t["token"] for t in one["top"]] == [lens.text(t["token_id"]) for t in one["top"]]
            assert [t["probability"] for t in one["top"]] == pytest.approx(lens.probabilities[layer, 0, at].tolist())
            (chosen,) = one["chosen"]
            assert (chosen["token"], chosen["rank"]) == (" Paris", int(lens.chosen_ranks[layer, 0, at, 0]))
            assert chosen["probability"] == pytest.approx(float(lens.chosen_probabilities[layer, 0, at, 0]))
    assert "<title>Logit lens of " in page.read_text(encoding="utf-8")


def test_other_prompts_and_sites(cli: Cli, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    status, out, err = cli("lens", MODEL, "[5, 9, 30]", *store, "--json", "--site", "resid_mid")
    assert status == 0, err
    said = json.loads(out)
    (one_prompt,) = said["prompts"]
    assert one_prompt["prompt"] == [5, 9, 30]
    assert said["site"] == "resid_mid"
    assert [p["token_id"] for p in one_prompt["positions"]] == [5, 9, 30]
    assert one_prompt["positions"][0]["layers"][-1]["kl"] > 0


def test_several_prompts_and_those_of_files(cli: Cli, tmp_path: Path) -> None:
    """Each has what it has alone."""
    store = ("--store", str(tmp_path / "store"), "--top-k", "2")
    file, page = tmp_path / "more.txt", tmp_path / "lens.html"
    file.write_text("Big Ben is in the city of\nThe sky is\n")
    status, out, err = cli("lens", MODEL, PROMPT, "[5, 9]", "--file", str(file), "--html", str(page), *store)
    assert status == 0, err
    parts = out.replace(f"wrote {page}\n", "").rstrip("\n").split("\n\n")
    for i, prompt in enumerate([PROMPT, "[5, 9]", "Big Ben is in the city of", "The sky is"]):
        status, alone, _ = cli("lens", MODEL, prompt, *store)
        assert (status, alone.rstrip("\n")) == (0, parts[i].replace(f"prompt {i},", "prompt 0,"))
    assert page.read_text(encoding="utf-8").count("<section") == 4
    found = json.loads(cli("lens", MODEL, "--file", str(file), "--json", *store)[1])
    assert [p["prompt"] for p in found["prompts"]] == ["Big Ben is in the city of", "The sky is"]
    assert [len(p["positions"]) for p in found["prompts"]] == [9, 5]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("[1, 2]", [1, 2]),
        ('[{"role": "user", "content": "a"}]', [{"role": "user", "content": "a"}]),
        ("[]", "[]"),
        ("[1, true]", "[1, true]"),
        ("[see below]", "[see below]"),
        (" text", " text"),
    ],
)
def test_a_prompt_is_text_or_json(text: str, prompt: object) -> None:
    assert read_prompt(text) == prompt


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "store"))
    for arguments, status, message in (
        ((PROMPT, "--token", " Pariss"), 2, "must be one: give a token id"),
        ((PROMPT, "--position", "9"), 2, "position 9 is out of range: prompt 0 has 9 here"),
        ((PROMPT, "--site", "attn_out"), 2, "unknown site of the residual stream 'attn_out'"),
        ((PROMPT, "--layers", "6"), 2, "6"),
        ((PROMPT, "--top-k", "0"), 2, "0 is not in the range"),
        ((PROMPT, "--top-k", "99999"), 2, "expected 1 to 1024"),
        ((PROMPT, "--translators", str(tmp_path)), 1, "holds no config.json"),
        ((PROMPT, "--html", str(tmp_path / "none" / "a.html")), 2, "there is no folder"),
        ((PROMPT, "--html", str(tmp_path)), 2, "is a folder: name a file"),
        (("",), 1, "prompt 0 is empty"),
        ((), 2, "Missing argument 'PROMPT...'"),
        (("--file", str(tmp_path / "none.txt")), 2, "does not exist"),
    ):
        found, out, err = cli("lens", MODEL, *arguments, *store)
        assert (found, out) == (status, ""), (arguments, err)
        last = err.splitlines()[-1]
        assert last.startswith("actcache: ")
        assert message in last
    assert not list((tmp_path / "store").rglob("*.safetensors")), "before anything is computed"


def test_a_tuned_lens(cli: Cli, tmp_path: Path) -> None:
    folder = save(tmp_path / "lens", maps())
    status, _, err = cli("lens", MODEL, PROMPT, "--store", str(tmp_path / "store"), "--translators", str(folder))
    assert status == 2
    assert "is for 4 layers of width 32 (gpt2), and this model has 6 of width" in err
