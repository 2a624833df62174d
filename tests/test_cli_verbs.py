"""The verbs on the shipped model: what they print, what they return."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from transformers import AutoTokenizer

import actcache as ac
from actcache.cli.app import VERBS, app
from actcache.demo import model_path
from cli_helpers import Cli

MODEL = str(model_path())
PROMPT = "The Eiffel Tower is in the city of"


def the_json(answer: tuple[int, str, str]) -> object:
    status, out, err = answer
    assert status == 0, err
    return json.loads(out)


def test_help_lists_every_verb_as_its_module_describes_it(cli: Cli) -> None:
    status, out, _ = cli("--help")
    assert status == 0
    for verb, text in VERBS.items():
        assert f"  {verb} " in out
        assert text in out
        command = app.get_command(click.Context(app), verb)
        assert command is not None
        assert command.name == verb
        assert command.help


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from actcache.cli.app import run; run(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy", "rich", "actcache.cli.warmup"} & set(out.split("\n")[-2].split())


def test_no_verb_shows_help(cli: Cli) -> None:
    assert cli()[1] == cli("--help")[1]


def test_a_warmup_computes_once_and_then_finds(cli: Cli) -> None:
    first = the_json(cli("warmup", MODEL, "--prompt", PROMPT, "--prompt", "Snow is white.", "--json"))
    again = the_json(cli("warmup", MODEL, "--prompt", "Snow is white.", "--json"))
    assert isinstance(first, dict)
    assert isinstance(again, dict)
    assert (first["total_prompts"], first["activations_cached"], first["activations_extracted"]) == (2, 0, 2)
    assert first["tokens_per_second"] > 0
    assert (again["activations_cached"], again["activations_extracted"], again["cache_hit_rate"]) == (1, 0, 1.0)
    status, out, _ = cli("warmup", MODEL, "--prompt", PROMPT)
    assert status == 0
    assert out.startswith("1 prompt: 1 were stored, 0 extracted")


def test_perplexity_is_computed_when_it_is_asked_for(cli: Cli) -> None:
    for option, computed in ((), 0), (("--perplexity",), 1), (("--compute-perplexity",), 0):
        stats = the_json(cli("warmup", MODEL, "--prompt", PROMPT, *option, "--json"))
        assert isinstance(stats, dict)
        assert stats["perplexity_extracted"] == computed
    shown = the_json(cli("show", MODEL, PROMPT, "--json"))
    assert isinstance(shown, dict)
    whole, likeliest, least = shown["perplexity"]
    assert 1 <= likeliest <= whole <= least


def test_a_warmup_stores_labels(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "labelled.csv"
    file.write_text("text,truth\nSnow is white.,1\nSnow is black.,0\n")
    assert cli("warmup", MODEL, str(file), "--label-column", "truth")[0] == 0
    X, y = ac.activations(MODEL, ["Snow is black.", "Snow is white."], return_labels=True)
    assert len(X) == 2 and y.tolist() == [0, 1]
    ac.UnifiedCache(MODEL).warmup(["Snow is black."], metadata=[{"colour": "schwärzer"}])
    shown = the_json(cli("show", MODEL, "Snow is black.", "--json"))
    assert isinstance(shown, dict)
    assert (shown["label"], shown["metadata"]) == (0, {"colour": "schwärzer"})
    assert {entry["layout"] for entry in shown["sites"]} == {"last_token"}
    assert 'label 0\nmetadata {"colour": "schwärzer"}' in cli("show", MODEL, "Snow is black.")[1]
    assert "metadata" not in cli("show", MODEL, "Snow is white.")[1]


def test_plan_tells_what_warmup_then_does(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\nSnow is white.\n")
    arguments = (MODEL, str(file), "--layers", "0,-1", "--raw", "--json")
    plan = the_json(cli("plan", *arguments))
    stats = the_json(cli("warmup", *arguments))
    assert isinstance(plan, dict)
    assert isinstance(stats, dict)
    assert (plan["cached"], plan["missing"]) == (0, 2)
    assert plan["tokens"] == stats["tokens_extracted"]
    assert plan["bytes_to_write"] == stats["bytes_written"]
    after = the_json(cli("plan", *arguments))
    assert isinstance(after, dict)
    assert (after["cached"], after["missing"], after["bytes_to_write"]) == (2, 0, 0)


def test_prompts_come_from_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Snow is white.\nThe sky is blue.\n"))
    stats = the_json(cli("warmup", MODEL, "-", "--layers", "last", "--json"))
    assert isinstance(stats, dict)
    assert stats["activations_extracted"] == 2


def test_options_reach_the_cache(cli: Cli) -> None:
    chosen = ("--layers", "1", "--sites", "resid_post,attn_out", "--pooling", "mean", "--dtype", "bfloat16")
    assert cli("warmup", MODEL, "--prompt", PROMPT, *chosen)[0] == 0
    info = ac.discover_cached(MODEL, PROMPT)
    assert info is not None
    assert info.sites == {"mean": ["attn_out.1", "resid_post.1"]}
    assert info.variants[0].dtype == "bfloat16"


def test_show_reports_what_is_stored(cli: Cli) -> None:
    cli("warmup", MODEL, "--prompt", PROMPT, "--raw")
    shown = the_json(cli("show", MODEL, PROMPT, "--json"))
    assert isinstance(shown, dict)
    assert "".join(shown["tokens"]).removeprefix("<|bos|>") == PROMPT
    # The same numbers by another way.
    activations, _ = ac.UnifiedCache(MODEL, cache_pooled=False).get_activations([PROMPT])  # type: ignore[misc]
    tokens = len(shown["token_ids"])
    expected = np.linalg.norm(activations[0].reshape(tokens, len(shown["sites"]), -1).numpy(), axis=2).mean(0)
    by_name = {entry["site"]: entry for entry in shown["sites"]}
    for layer, norm in enumerate(expected):
        entry = by_name[f"resid_post.{layer}"]
        assert (entry["layout"], entry["dtype"], entry["vectors"]) == ("tokens", "float32", tokens)
        assert entry["norm"] == pytest.approx(norm, rel=1e-5)
    status, out, _ = cli("show", MODEL, PROMPT)
    assert status == 0
    assert "Tower" in out
    assert "every token" in out


def test_stats_has_no_norms_of_what_is_no_vector(cli: Cli) -> None:
    cli("warmup", MODEL, "--prompt", PROMPT, "--raw", "--layers", "0", "--perplexity")
    status, out, err = cli("stats", MODEL)
    assert (status, err) == (0, "") and "nan" not in out
    (line,) = [line.split() for line in out.splitlines() if "token_nll" in line]
    tokens = the_json(cli("list", MODEL, "--json"))[0]["prompts"][0]["num_tokens"]  # type: ignore[index]
    assert line[:3] == ["token_nll", str(tokens), "1"] and line[-4:] == ["float32", "0", "0", "1"]
    (variant,) = the_json(cli("stats", MODEL, "--json"))  # type: ignore[misc]
    by_name = {entry["site"]: entry for entry in variant["sites"]}
    for name in ("perplexity", "token_nll"):
        assert (by_name[name]["mean_norm"], by_name[name]["std"]) == (None, None)
        assert by_name[name]["stored"][0]["error_relative"] == 0
    assert by_name["resid_post.0"]["mean_norm"] > 0


def test_list_gives_prompts_as_they_were_given(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('"two\\nlines"\n[1, 2, 3]\n')
    cli("warmup", MODEL, str(file), "--layers", "0")
    (variant,) = the_json(cli("list", MODEL, "--json"))  # type: ignore[misc]
    assert [p["prompt"] for p in variant["prompts"]] == ["two\nlines", [1, 2, 3]]
    assert variant["prompts"][1]["num_tokens"] == 3
    status, out, _ = cli("list", MODEL)
    assert status == 0
    said = AutoTokenizer.from_pretrained(MODEL).decode([1, 2, 3])
    assert [line.split(maxsplit=1)[1] for line in out.splitlines()] == ["two\\nlines", f"{said!r} [1, 2, 3]"]


def test_list_keeps_variants_apart(cli: Cli) -> None:
    for dtype in ("float32", "bfloat16"):
        cli("warmup", MODEL, "--prompt", f"In {dtype}.", "--layers", "0", "--dtype", dtype)
    variants = the_json(cli("list", MODEL, "--json"))
    assert isinstance(variants, list)
    assert [(v["dtype"], [p["prompt"] for p in v["prompts"]]) for v in variants] == [
        ("float32", ["In float32."]),
        ("bfloat16", ["In bfloat16."]),
    ]


def test_info_counts_models_and_prompts(cli: Cli, tmp_path: Path) -> None:
    store = str(tmp_path / "elsewhere")
    Path(store).mkdir()
    assert "nothing is stored" in cli("info", "--store", store)[1]
    cli("warmup", MODEL, "--prompt", PROMPT, "--prompt", "Snow", "--store", store)
    info = the_json(cli("info", "--store", store, "--json"))
    assert isinstance(info, dict)
    assert info["cache_dir"] == store
    (model,) = info["models"]
    assert (model["model_name"], model["num_prompts"], model["dtype"]) == (MODEL, 2, "float32")
    assert the_json(cli("info", MODEL, "--store", store, "--json"))["models"] == info["models"]  # type: ignore[index]
    # The default store is another one.
    assert the_json(cli("info", "--json"))["models"] == []  # type: ignore[index]


def test_sites_lists_each_site_with_its_module(cli: Cli) -> None:
    listed = the_json(cli("sites", MODEL, "--json"))
    assert isinstance(listed, list)
    names = [entry["site"] for entry in listed]
    assert {"embed", "resid_post.0", "attn_out.1", "final_norm", "logits"} <= set(names)
    assert len(names) == len(set(names))
    status, out, _ = cli("sites", MODEL)
    assert status == 0
    assert "[B, S, D]" in out


def test_clear_names_what_it_deletes_and_wants_a_yes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("warmup", MODEL, "--prompt", PROMPT, "--layers", "0")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    status, _, err = cli("clear", MODEL)
    assert status == 2
    assert MODEL in err
    assert "1 prompt," in err
    assert "--yes" in err
    assert ac.discover_cached(MODEL, PROMPT) is not None
    assert the_json(cli("clear", MODEL, "--yes", "--json")) == {"deleted": 1}
    assert ac.discover_cached(MODEL, PROMPT) is None
    assert cli("clear", "--yes")[:2] == (0, "nothing is stored.\n")


@pytest.fixture
def variants(tmp_path: Path) -> tuple[ac.Store, dict[str, str]]:
    """A store of two models, the first in two variants: one prompt in float32, two in bfloat16."""
    store = ac.Store(tmp_path / "variants")
    spaces = {}
    for name, dtype, n in (("org/one", "float32", 1), ("org/one", "bfloat16", 2), ("org/other", "float32", 1)):
        label = {"model_name": name, "revision": "0123456789abcdef"}
        space = store.open_space({"model_name": name, "dtype": dtype}, label)
        store.write(space, [f"prompt {i}" for i in range(n)], {"resid_post.0": np.ones((n, 4))}, pooling="mean")
        spaces[f"{name} {dtype}"] = space
    return store, spaces


def test_clear_deletes_several_variants_only_when_told_which(
    cli: Cli, variants: tuple[ac.Store, dict[str, str]]
) -> None:
    store, spaces = variants
    where = ("--store", str(store.location))

    def left() -> set[str]:
        return {info.space for info in store.spaces()}

    one = spaces["org/one float32"], spaces["org/one bfloat16"]
    for words in (("org/one",), ("org/one", "--yes"), ("org/one", "--yes", "--json")):
        status, out, err = cli("clear", *words, *where)
        assert (status, out) == (2, ""), words
        for space in one:
            assert f"space {space[:8]}" in err
        assert "float32" in err
        assert "bfloat16" in err
        assert "--space" in err
        assert "--all-variants" in err
        assert len(left()) == 3

    status, out, _ = cli("clear", "org/one", "--space", one[1][:8], "--yes", *where)
    assert (status, out) == (0, "2 prompts deleted.\n")
    assert left() == {one[0], spaces["org/other float32"]}
    # An unset variable of the shell chooses nothing, also where there is one only.
    status, _, err = cli("clear", "org/one", "--space", "", "--yes", *where)
    assert (status, "--space is empty" in err) == (2, True)
    assert one[0] in left()
    # What is left of it is the only one, which needs no choice.
    assert the_json(cli("clear", "org/one", "--yes", "--json", *where)) == {"deleted": 1}
    assert left() == {spaces["org/other float32"]}


def test_clear_takes_all_variants_of_a_model_and_of_no_other(
    cli: Cli, variants: tuple[ac.Store, dict[str, str]]
) -> None:
    store, spaces = variants
    where = ("--store", str(store.location))
    for words in (("--all-variants",), ("org/one", "--all-variants", "--space", "0")):
        status, _, err = cli("clear", *words, "--yes", *where)
        assert status == 2
        assert "--all-variants" in err
    status, _, err = cli("clear", "org/one", "--space", "zz", "--yes", *where)
    assert status != 0
    assert "begins with 'zz'" in err
    assert len(store.spaces()) == 3
    assert cli("clear", "org/one", "--all-variants", "--yes", *where)[1] == "3 prompts deleted.\n"
    assert [info.space for info in store.spaces()] == [spaces["org/other float32"]]


@pytest.mark.parametrize(("answer", "deleted"), [("y", 3), ("n", 0)])
def test_clear_asks_of_all_variants_at_once(
    cli: Cli,
    variants: tuple[ac.Store, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    deleted: int,
) -> None:
    store, _ = variants
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr(click, "confirm", lambda text, **_: asked.append(text) or answer == "y")
    cli("clear", "org/one", "--store", str(store.location))
    assert asked == ["Delete all 2?"]
    assert 4 - sum(info.num_prompts for info in store.spaces()) == deleted


def test_version_names_what_matters_for_results(cli: Cli) -> None:
    versions = the_json(cli("version", "--json"))
    assert isinstance(versions, dict)
    assert versions["actcache"] == ac.__version__
    assert versions["torch"].startswith("2.")
    assert cli("--version")[1] == f"actcache {ac.__version__}\n"


def test_the_demo_tells_where_its_model_is(cli: Cli) -> None:
    assert cli("demo", "--model-path") == (0, f"{MODEL}\n", "")
