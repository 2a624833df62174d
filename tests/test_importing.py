"""Caches of lmprobe: what comes in, under which marks, and when it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

import actcache as ac
from actcache.demo import model_path
from actcache.errors import NotCachedError, OptionError
from actcache.store.store import Store
from cli_helpers import Cli

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "lmprobe"
NAME = "fixtures/tiny-llama"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the captured caches of lmprobe are not on this machine"
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", index_dir=tmp_path / "index")


def h16(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompts() -> list[str]:
    found: list[str] = json.loads((FIXTURES / "prompts.json").read_text("utf-8"))["prompts"]
    return found


# -- folders that lmprobe itself wrote -------------------------------------------------------------------


@needs_fixtures
def test_full_sequences_come_in_row_for_row_without_their_padding(store: Store) -> None:
    expected = np.load(FIXTURES / "expected.npz")
    path = FIXTURES / "cache_raw"
    report = ac.import_lmprobe(path, store=store)
    assert (report.models, report.skipped) == ({NAME: 12}, [])
    space = report.spaces[NAME]
    for layer in range(4):
        rows = store.read(space, prompts(), f"resid_post.{layer}")
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, expected[f"hidden_{i}"][layer], atol=2e-6)
            # And to the bit what is in the file.
            with safe_open(path / h16(NAME) / f"{h16(prompts()[i])}.safetensors", "pt") as file:
                mask, whole = file.get_tensor("attention_mask")[0], file.get_tensor(f"layer_{layer}")[0]
            assert torch.equal(row, whole[mask.bool()])
    for i, nll in enumerate(store.read(space, prompts(), "token_nll")):
        np.testing.assert_allclose(nll[:-1, 0].exp(), expected[f"token_ppl_{i}"], rtol=1e-5)
        assert nll[-1].isnan().all()
    found = store.read(space, prompts(), "perplexity", pooling="derived")
    np.testing.assert_allclose(found, expected["perplexity"], rtol=1e-6)
    table = store.prompts(space)
    ids = {table.text_of(i): table.tokens(i).tolist() for i in range(len(table))}
    assert ids == {text: expected[f"ids_{i}"].tolist() for i, text in enumerate(prompts())}


@needs_fixtures
@pytest.mark.parametrize("folder", ["cache_raw", "cache_pooled", "cache_mixed_fp16"])
def test_discovery_says_what_lmprobe_itself_says(store: Store, folder: str) -> None:
    said = json.loads((FIXTURES / "cache_introspection.json").read_text("utf-8"))[folder]["discover"]
    ac.import_lmprobe(FIXTURES / folder, prompts=prompts(), store=store)
    for text, expected in said.items():
        found = store.discover(NAME, text)
        if expected is None:
            assert found is None
            continue
        assert found is not None
        keys = ["raw_layers", "pooled", "logits_top_k", "has_perplexity", "has_token_perplexity", "router_layers"]
        assert {k: getattr(found, k) for k in keys} == {k: expected[k] for k in keys}
        assert expected["num_tokens"] in (None, found.num_tokens)
        assert [v.imported for v in found.variants] == ["lmprobe"]
    assert store.discover(NAME, "not there") is None


@needs_fixtures
def test_logits_of_a_padded_batch_come_in_where_losses_tell_which_are_real(store: Store) -> None:
    """That cache keeps 23 rows of logits for prompts of 1, 10, 16 and 23 tokens, and no word on which are padding."""
    path = FIXTURES / "cache_mixed_fp16"
    report = ac.import_lmprobe(path, store=store)
    space = report.spaces[NAME]
    ((skipped, reason),) = report.skipped
    assert skipped == h16("a")
    assert "logits has 23 rows" in reason
    texts = prompts()[1:4]
    for text, rows, nll in zip(
        texts, store.read(space, texts, "logits"), store.read(space, texts, "token_nll"), strict=True
    ):
        with safe_open(path / h16(NAME) / f"{h16(text)}.logits.safetensors", "pt") as file:
            assert torch.equal(rows, file.get_tensor("logits")[0, : len(rows)])
        ids = torch.tensor(store.find_prompt(space, text).tokens(0)).long()  # type: ignore[union-attr]
        loss = torch.nn.functional.cross_entropy(rows[:-1].float(), ids[1:], reduction="none")
        torch.testing.assert_close(loss, nll[:-1, 0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("side", ["left", "right", "unknown"])
def test_padding_of_logits_on_either_side(tmp_path: Path, store: Store, side: str) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((1, 9, 50)) * 4).float()
    ids = torch.from_numpy(rng.integers(0, 50, 6))
    real = rows[0, 3:] if side == "left" else rows[0, :6]
    losses = torch.nn.functional.cross_entropy(real[:-1], ids[1:], reduction="none")
    if side == "unknown":
        losses = losses.flip(0)
    folder = tmp_path / "cache" / h16("m")
    write_entry(folder, "a", {"pooled_mean_layer_0": torch.ones(1, 4)})
    write_entry(folder, "a", {"logits": rows.half()}, ".logits")
    write_entry(folder, "a", {"token_ids": ids, "token_perplexity": losses.exp().half()}, ".perplexity")
    report = ac.import_lmprobe(tmp_path / "cache", model="m", prompts=["a"], store=store)
    if side == "unknown":
        assert "logits has 9 rows" in report.skipped[0][1]
        assert not store.contains(report.spaces["m"], ["a"], "logits").any()
    else:
        assert report.skipped == []
        assert torch.equal(store.read(report.spaces["m"], ["a"], "logits")[0], real.half())


@needs_fixtures
def test_pooled_vectors_come_in_by_ids_where_their_texts_are_lost(store: Store) -> None:
    expected = np.load(FIXTURES / "expected.npz")
    report = ac.import_lmprobe(FIXTURES / "cache_pooled", store=store)
    assert report.models == {NAME: 12}
    ids = [expected[f"ids_{i}"].tolist() for i in range(12)]
    space = report.spaces[NAME]
    assert not store.contains(space, prompts()).any()
    for layer in range(4):
        found = store.read(space, ids, f"resid_post.{layer}", pooling="last_token")
        np.testing.assert_allclose(found, expected["pooled_last_token"][:, layer], atol=2e-6)
    # Named, they are found by their texts, too.
    ac.import_lmprobe(FIXTURES / "cache_pooled", prompts=prompts(), store=store)
    found = store.read(space, prompts(), "resid_post.3", pooling="last_token")
    np.testing.assert_allclose(found, expected["pooled_last_token"][:, 3], atol=2e-6)


@needs_fixtures
def test_the_layout_of_old_releases_is_read(store: Store, cli: Cli) -> None:
    expected = np.load(FIXTURES / "expected.npz")
    path = FIXTURES / "cache_v1_pt"
    with pytest.raises(OptionError, match="model="):
        ac.import_lmprobe(path, store=store)
    unknown = ac.import_lmprobe(path, model=NAME, store=store)
    assert (unknown.models, len(unknown.skipped)) == ({}, 4)
    assert "prompts=" in unknown.skipped[0][1]
    report = ac.import_lmprobe(path, model=NAME, prompts=prompts(), store=store)
    assert (report.models, report.skipped) == ({NAME: 4}, [])
    space = report.spaces[NAME]
    held = [i for i, text in enumerate(prompts()) if (path / h16(NAME) / h16(text)).is_dir()]
    texts = [prompts()[i] for i in held]
    for layer in range(4):
        for i, rows in zip(held, store.read(space, texts, f"resid_post.{layer}"), strict=True):
            np.testing.assert_allclose(rows, expected[f"hidden_{i}"][layer], atol=2e-6)
        pooled = store.read(space, texts, f"resid_post.{layer}", pooling="last_token")
        np.testing.assert_allclose(pooled, expected["pooled_last_token"][held, layer], atol=2e-6)
    np.testing.assert_allclose(
        store.read(space, texts, "perplexity", pooling="derived"), expected["perplexity"][held], rtol=1e-5
    )
    assert len(store.prompts(space)) == 4


@needs_fixtures
def test_imports_answer_only_when_names_are_trusted(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "fixtures" / "tiny-llama"
    shutil.copytree(FIXTURES / "fixtures" / "tiny-llama", model)
    monkeypatch.chdir(tmp_path)
    ac.import_lmprobe(FIXTURES / "cache_raw", store=store)
    # The folder's name is a relative path, which means this model here.
    assert {m.model_name for m in store.info().models} == {str(model.resolve())}
    cautious = ac.UnifiedCache(str(model), compute_perplexity=False, store=store, cache_pooled=False)
    assert cautious.plan(prompts()).cached == 0
    trusting = ac.UnifiedCache(str(model), compute_perplexity=False, store=store, cache_pooled=False, trust_names=True)
    plan = trusting.plan([*prompts(), "a new prompt"])
    assert (plan.cached, plan.missing) == (12, 1)
    values, mask = trusting.get_activations(prompts())  # type: ignore[misc]
    assert not trusting.model_loaded
    expected = np.load(FIXTURES / "expected.npz")
    assert mask is not None
    for i in range(12):
        rows = values[i][mask[i]].reshape(-1, 4, 32).numpy()
        np.testing.assert_allclose(rows, expected[f"hidden_{i}"].transpose(1, 0, 2), atol=2e-6)
    pooled = ac.UnifiedCache(str(model), compute_perplexity=False, store=store, trust_names=True).get_activations(
        prompts()
    )[0]
    np.testing.assert_allclose(pooled.reshape(12, 4, 32), expected["pooled_last_token"], atol=2e-6)
    # The same as the model gives, which is computed once names are not trusted.
    own = ac.UnifiedCache(str(model), compute_perplexity=False, store=store).get_activations(prompts())[0]
    np.testing.assert_allclose(own.reshape(12, 4, 32), expected["pooled_last_token"], atol=1e-5)
    edited = ac.UnifiedCache(
        str(model), compute_perplexity=False, store=store, trust_names=True, edits=[ac.ablate("resid_post.0")]
    )
    assert edited.plan(prompts()).cached == 0
    kinds = [v.imported for v in store.discover(str(model), prompts()[0]).variants]  # type: ignore[union-attr]
    assert kinds == [None, "lmprobe"]


@needs_fixtures
def test_the_verb_reports_what_came_in(tmp_path: Path, cli: Cli) -> None:
    where = ("--store", str(tmp_path / "s"))
    status, out, err = cli("import", str(FIXTURES / "cache_raw"), *where)
    assert (status, out, err) == (0, f"{NAME}: 12 prompts imported.\n", "")
    status, out, _ = cli("info", *where, "--json")
    (model,) = json.loads(out)["models"]
    assert (model["imported"], model["num_prompts"], model["num_layers"]) == ("lmprobe", 12, 4)
    assert "imported from lmprobe" in model["variant"]
    status, out, _ = cli("show", NAME, prompts()[1], *where, "--json")
    assert status == 0
    assert len(json.loads(out)["token_ids"]) == 10
    status, _, err = cli("import", str(tmp_path / "s"), *where)
    assert status == 2
    assert "is a store of actcache" in err
    # Once more changes nothing.
    assert cli("import", str(FIXTURES / "cache_raw"), *where)[0] == 0
    assert json.loads(cli("info", *where, "--json")[1])["models"][0]["num_prompts"] == 12


# -- folders made here, whole and broken ------------------------------------------------------------------


def write_entry(folder: Path, text: str, tensors: dict[str, torch.Tensor], suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{h16(text)}{suffix}.safetensors")


def test_what_is_broken_or_unknown_is_skipped_and_named(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "cache" / h16("m")
    for text in ("good", "cut", "torn", "lost", "odd"):
        layer = torch.arange(12.0).reshape(1, 3, 4)
        write_entry(folder, text, {"layer_0": layer, "attention_mask": torch.tensor([[0, 1, 1]])})
    write_entry(folder, "odd", {"layer_0": torch.ones(1, 5, 4), "attention_mask": torch.tensor([[1, 1]])})
    (folder / "_model_name.txt").write_text("m")
    lines = [{"hash": h16(t), "prompt": t} for t in ("good", "cut", "torn", "odd")]
    lines += [{"hash": h16("lost"), "prompt": "another text"}, {"hash": 3}]
    (folder / "_manifest.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json")
    cut = folder / f"{h16('cut')}.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    (folder / f"{h16('torn')}.safetensors").write_bytes(b"\xff" * 100)
    (folder / "shards").mkdir()
    report = ac.import_lmprobe(tmp_path / "cache", store=store)
    assert report.models == {"m": 1}
    # The padding was on the left.
    assert store.read(report.spaces["m"], ["good"], "resid_post.0")[0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    reasons = dict(report.skipped)
    assert set(reasons) == {h16(t) for t in ("cut", "torn", "lost", "odd")}
    assert "text is unknown" in reasons[h16("lost")]
    with pytest.raises(NotCachedError, match="no cache of lmprobe"):
        ac.import_lmprobe(tmp_path / "cache" / h16("m") / "shards", store=store)
    both = tmp_path / "cache" / h16("n")
    shutil.copytree(folder, both)
    (both / "_model_name.txt").write_text("n")
    with pytest.raises(NotCachedError, match=r"m, n|n, m"):
        ac.import_lmprobe(tmp_path / "cache", model="third", store=store)
    assert ac.import_lmprobe(tmp_path / "cache", model="n", store=store).models == {"n": 1}


def test_old_files_that_hold_code_are_refused(tmp_path: Path, store: Store) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cache" / h16("m") / h16("a")
    folder.mkdir(parents=True)
    torch.save(Evil(), folder / "layer_0.pt")
    report = ac.import_lmprobe(tmp_path / "cache", model="m", prompts=["a"], store=store)
    assert not (tmp_path / "ran").exists()
    assert report.models == {}
    assert report.skipped[0][0] == h16("a")


def test_sixteen_bit_vectors_and_results_keep_their_numbers_in_a_small_store(tmp_path: Path) -> None:
    small = Store(tmp_path / "store", dtype="int8", index_dir=tmp_path / "index")
    folder = tmp_path / "cache" / h16("m")
    rng = np.random.default_rng(0)
    texts = [f"t{i}" for i in range(100)]
    vectors = torch.from_numpy(rng.standard_normal((100, 1, 16)).astype(np.float32)).bfloat16()
    values = torch.from_numpy(rng.standard_normal((100, 1, 1, 5)).astype(np.float32))
    for i, text in enumerate(texts):
        write_entry(folder, text, {"pooled_mean_layer_2": vectors[i]})
        top = {
            "logits_top_k_values": values[i],
            "logits_top_k_indices": torch.arange(5, dtype=torch.int32).reshape(1, 1, 5),
        }
        write_entry(folder, text, top, ".logits")
        write_entry(folder, text, {"perplexity": torch.tensor([3.0, 1.5, 9.25])}, ".perplexity")
    report = ac.import_lmprobe(tmp_path / "cache", model="m", prompts=texts, store=small)
    assert report.models == {"m": 100}
    space = report.spaces["m"]
    found = small.read(space, texts, "resid_post.2", pooling="mean")
    assert found.dtype == torch.float32
    assert 0 < (found - vectors[:, 0].float()).abs().max() < 0.03
    assert torch.equal(small.read(space, texts, "logits.top5.values", pooling="last_token"), values[:, 0, 0])
    assert small.read(space, texts, "logits.top5.indices", pooling="last_token")[7].tolist() == [0, 1, 2, 3, 4]
    assert small.read(space, texts, "perplexity", pooling="derived")[3].tolist() == [3.0, 1.5, 9.25]
    info = small.discover("m", "t5")
    assert info is not None
    assert (info.pooled, info.logits_top_k, info.has_perplexity, info.has_logits) == ({"mean": [2]}, 5, True, False)


def test_a_text_with_the_ids_of_another_tokenizer_is_not_taken(tmp_path: Path, store: Store) -> None:
    model = str(model_path())
    (right,) = AutoTokenizer.from_pretrained(model)(["Snow is white."])["input_ids"]
    folder = tmp_path / "cache" / h16("m")
    for text, ids in (("Snow is white.", right[::-1]), ("The sky is blue.", None)):
        write_entry(folder, text, {"pooled_last_token_layer_0": torch.ones(1, 128)})
        if ids is not None:
            write_entry(folder, text, {"token_ids": torch.tensor(ids)}, ".perplexity")
    texts = ["Snow is white.", "The sky is blue."]
    ac.import_lmprobe(tmp_path / "cache", model=model, prompts=texts, store=store)
    trusting = ac.UnifiedCache(model, [0], compute_perplexity=False, store=store, trust_names=True)
    plan = trusting.plan(texts)
    assert (plan.cached, plan.missing) == (1, 1)
    write_entry(folder, texts[0], {"token_ids": torch.tensor(right)}, ".perplexity")
    ac.import_lmprobe(tmp_path / "cache", model=model, prompts=texts, store=store)
    assert trusting.plan(texts).cached == 2
