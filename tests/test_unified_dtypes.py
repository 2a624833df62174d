"""The storage dtype from one end to the other: a model's prompts, a store of few bits, what comes back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actcache as ac
from actcache import config
from actcache.demo import model_path
from actcache.errors import PartialWarmupError
from actcache.store import segment
from actcache.store.store import Store
from store_helpers import pooled, segment_files

MODEL = str(model_path())
TEXTS = [f"The Eiffel Tower is in city {i}" for i in range(80)]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_chosen", {})
    monkeypatch.delenv("ACTCACHE_DTYPE", raising=False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "limit"), [("float16", 1e-3), ("bfloat16", 8e-3), ("int8", 8e-3), ("float8_e4m3", 3e-2)]
)
def test_a_cache_answers_within_the_error_of_its_stores_dtype(
    tmp_path: Path, dtype: str, limit: float, pooled: bool
) -> None:
    whole = ac.UnifiedCache(MODEL, compute_perplexity=False, cache_pooled=pooled, store=Store(tmp_path / "exact"))
    store = Store(tmp_path / "small", dtype=dtype)
    cache = ac.UnifiedCache(MODEL, compute_perplexity=False, cache_pooled=pooled, store=store)
    planned = cache.plan(TEXTS).bytes_to_write
    values = whole.plan(TEXTS).bytes_to_write // 4
    assert planned >= values * (2 if "16" in dtype else 1)
    exact, _ = whole.get_activations(TEXTS)  # type: ignore[misc]
    assert cache.warmup(TEXTS).bytes_written == pytest.approx(planned, abs=4 * len(TEXTS))
    kept = [segment.open(path) for path in store.root.rglob("*.safetensors")]
    matrices = sum(s.matrix(site).nbytes for s in kept for site in s.info.sites)
    scales = sum(a.nbytes for s in kept for site in s.info.sites if (a := s.scales(site)) is not None)
    # What cannot be foreseen: rows of their own scales, and blocks that are not filled.
    blocks = sum(len(s.block_offset) - 1 for s in kept)
    assert matrices <= planned <= matrices + scales
    assert bool(scales) == bool(blocks) == (planned > matrices) == ("16" not in dtype)
    first, _ = cache.get_activations(TEXTS)  # type: ignore[misc]
    again, _ = ac.UnifiedCache(MODEL, cache_pooled=pooled, store=store).get_activations(TEXTS)  # type: ignore[misc]
    assert torch.equal(first, again)
    assert 0 < relative(first, exact) < limit
    (entry,) = store.info().models
    assert entry.stored_dtypes == [dtype]


@pytest.mark.parametrize("pooled", [True, False])
def test_reads_in_another_dtype_leave_what_is_stored(tmp_path: Path, pooled: bool) -> None:
    store, texts = Store(tmp_path, dtype="float16"), [*TEXTS[:3], "The Louvre"]
    cache = ac.UnifiedCache(MODEL, cache_pooled=pooled, store=store)
    values, mask = cache.get_activations(texts, dtype="float32")  # type: ignore[misc]
    kept, _ = cache.get_activations(texts)  # type: ignore[misc]
    assert (values.dtype, kept.dtype) == (torch.float32, torch.float16)
    assert torch.equal(values, kept.float())
    assert (mask is None) == pooled
    short, _ = cache.get_activations(texts, dtype=torch.bfloat16, layers=[1])  # type: ignore[misc]
    assert torch.equal(short, cache.get_activations(texts, layers=[1])[0].bfloat16())  # type: ignore[index]
    assert store.info().models[0].stored_dtypes == ["float16"]


def test_reads_at_positions_and_of_several_sites_in_another_dtype(tmp_path: Path) -> None:
    cache = ac.UnifiedCache(MODEL, 1, cache_pooled=False, sites=("resid_post", "mlp_out"), store=tmp_path)
    exact = cache.get_activations(TEXTS[:2], positions=[0, "last"])
    found = cache.get_activations(TEXTS[:2], positions=[0, "last"], dtype="bfloat16")
    for site, (values, mask) in found.items():  # type: ignore[union-attr]
        assert torch.equal(values, exact[site][0].bfloat16())  # type: ignore[index, call-overload]
        assert mask is not None and mask.all()


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int64, 3])
def test_a_dtype_that_no_vector_has_is_refused_before_any_work(tmp_path: Path, dtype: Any) -> None:
    cache = ac.UnifiedCache(MODEL, store=tmp_path / "store")
    with pytest.raises(ac.errors.OptionError, match="float32"):
        cache.get_activations(TEXTS[:1], dtype=dtype)
    assert not (tmp_path / "store").exists() and not cache.model_loaded


def loud_model(token: str) -> tuple[Any, Any]:
    """The demo model with one token whose vector is a million times as long."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    (loud,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[loud] *= 1e6
    return model, tokenizer


def test_a_prompt_that_overflows_is_named_and_the_others_are_stored(tmp_path: Path) -> None:
    model, tokenizer = loud_model(" Tower")
    store = Store(tmp_path, dtype="float16")
    texts = ["Snow is white.", "The Eiffel Tower is in", "The sky is blue."]

    def cache(**options: Any) -> ac.UnifiedCache:
        return ac.UnifiedCache(model, tokenizer=tokenizer, cache_pooled=False, store=store, layers=[0, 1], **options)

    with pytest.raises(PartialWarmupError) as caught:
        cache().warmup(texts)
    ((which, reason),) = caught.value.failed
    assert which == 1
    assert "resid_post.0: the value" in reason
    assert "bfloat16" in reason
    assert caught.value.stats.activations_extracted == 2  # type: ignore[attr-defined]
    plan = cache().plan(texts)
    assert (plan.cached, plan.missing) == (2, 1)
    # Wherever it stands among the prompts.
    with pytest.raises(PartialWarmupError, match=r"^2 prompts were not stored \(prompt 0: .*; prompt 3: ") as caught:
        cache().warmup([texts[1], texts[0], "Grass is green.", texts[1]])
    assert [which for which, _ in caught.value.failed] == [0, 3]
    assert cache().plan(["Grass is green."]).missing == 0
    with pytest.raises(PartialWarmupError, match=r"^1 prompt was not stored \(prompt 1"):
        cache().get_activations(texts[:2])
    cache(allow_inf=True).warmup(texts)
    values, _ = cache().get_activations(texts)  # type: ignore[misc]
    assert values[1].isinf().any()
    assert values[[0, 2]].isfinite().all()
    wide = Store(tmp_path / "wide", dtype="bfloat16")
    loud = ac.UnifiedCache(model, tokenizer=tokenizer, store=wide, layers=[0])
    right = loud.get_activations(texts)[0]  # type: ignore[index]
    assert right.isfinite().all()  # type: ignore[union-attr]
    with pytest.raises(ac.errors.ValueOverflowError, match=r"prompt 1, resid_post.0: .*becomes -?inf in torch.float16"):
        loud.get_activations(["Snow is white.", "The Eiffel Tower"], dtype="float16")
    allowed = ac.UnifiedCache(model, tokenizer=tokenizer, store=wide, layers=[0], allow_inf=True)
    half = allowed.get_activations(texts, dtype="float16")[0]  # type: ignore[index]
    assert torch.equal(half, right.half())  # type: ignore[arg-type,union-attr]
    for dtype in ("int8", torch.int64, "bool", torch.complex64, np.int32, "float8_e4m3fn"):
        with pytest.raises(ac.errors.OptionError, match="bfloat16"):
            loud.get_activations(["Nothing is computed."], dtype=dtype)
    assert loud.plan(["Nothing is computed."]).missing == 1


def test_full_sequences_of_one_run_share_blocks_of_64_rows(tmp_path: Path) -> None:
    store = Store(tmp_path, dtype="int8")
    ac.UnifiedCache(MODEL, cache_pooled=False, store=store, layers=[1], max_batch_tokens=512).warmup(TEXTS)
    (space,) = store.spaces()
    sizes = [s for p in segment_files(store, space.space) for s in np.diff(segment.open(p).block_offset)]
    assert max(sizes) == 64
    assert sum(sizes) / len(sizes) > 40


def test_small_batches_wait_for_company_with_which_they_share_scales(tmp_path: Path) -> None:
    store = Store(tmp_path, dtype="int8")
    space = store.open_space({"weights": "abc"}, {"model_name": "m"})
    with store.writer(space, linger=0.0) as writer:
        for start in range(0, 192, 8):
            records, _ = store.screen(pooled(range(start, start + 8)))
            assert records is not None
            writer.put(records)
            time.sleep(0.002)
        # Nobody waits for ever.
        deadline = time.monotonic() + 20
        while not segment_files(store, space):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    sizes = [s for p in segment_files(store, space) for s in np.diff(segment.open(p).block_offset)]
    assert sizes == [64, 64, 64]
