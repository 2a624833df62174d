"""Labels and metadata of prompts: kept with their vectors, replaced, forgotten with them, given back with X."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import actcache as ac
from actcache.errors import NotCachedError, OptionError, PartialWarmupError
from actcache.store.appending import Appender
from actcache.store.records import LABEL, METADATA
from actcache.testing.tiny import tiny_model, tiny_tokenizer

TEXTS = ["the sky is blue", "snow is white", "one two three", "four"]
LABELS: list[Any] = [1, "two", 2.5, True]
METADATA_OF = [{"split": "train", "score": i / 3, "words": t.split(), "n": i} for i, t in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2", seed=3, n_layer=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fresh(folder: Path, place: Path, **options: Any) -> ac.UnifiedCache:
    """Another process would see no more than this."""
    options.setdefault("compute_perplexity", False)
    return ac.UnifiedCache(folder, store=ac.Store(place, index_dir=place.parent / f"index {time.time_ns()}"), **options)


def same(found: list[Any], expected: list[Any]) -> bool:
    """Equal, types included: 1, 1.0 and True are three things."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize("before", [[], TEXTS[:2], TEXTS])
def test_they_come_back_as_they_were_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str]
) -> None:
    place = tmp_path / "store"
    if before:
        fresh(folder, place).warmup(before)
    stats = fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=METADATA_OF)
    assert stats.activations_extracted == len(TEXTS) - len(before)
    cache = fresh(folder, place)
    # What is found by its text needs no tokenizer.
    with monkeypatch.context() as patched:
        patched.setattr(type(cache.extractor.source), "tokenizer", None)
        assert same(cache.get_labels(TEXTS), LABELS)
        assert same(cache.get_metadata(TEXTS), METADATA_OF)
    order = [2, 0, 2]
    assert same(cache.get_labels([TEXTS[i] for i in order]), [LABELS[i] for i in order])
    assert cache.get_labels(["not there", TEXTS[1]]) == [None, "two"]
    assert not cache.model_loaded
    assert ac.Store(place).verify().ok


def test_what_is_replaced_and_what_stays(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    long = "x" * 300
    fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=METADATA_OF)
    # Longer ones lie in another segment, shorter ones in the first kind again.
    for labels in ([0, "b", long, None], [0, "b", "c", None], ["ä\ud800", 0, long, -(2**70)]):
        fresh(folder, place).warmup(TEXTS[::-1], labels=labels[::-1])
        assert same(fresh(folder, place).get_labels(TEXTS), labels)
    assert same(fresh(folder, place).get_metadata(TEXTS), METADATA_OF)
    fresh(folder, place).warmup(TEXTS)
    fresh(folder, place).warmup(TEXTS[:1], metadata={"other": [7]})
    assert same(fresh(folder, place).get_labels(TEXTS), ["ä\ud800", 0, long, -(2**70)])
    assert same(fresh(folder, place).get_metadata(TEXTS), [{"other": 7}, *METADATA_OF[1:]])


def test_what_is_stored_already_is_not_written_again(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=METADATA_OF)
    files = sorted(place.rglob("*.safetensors"))
    fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=[dict(reversed(row.items())) for row in METADATA_OF])
    assert sorted(place.rglob("*.safetensors")) == files


def test_merging_keeps_the_last(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    for turn in range(20):
        fresh(folder, place).warmup(TEXTS, labels=[turn, turn % 3, str(turn), 0.5])
    assert len(list(place.rglob("*.safetensors"))) < 12
    ac.Store(place).compact()
    assert same(fresh(folder, place).get_labels(TEXTS), [19, 1, "19", 0.5])


@pytest.mark.parametrize("grown", [False, True])
def test_the_last_counts_however_clocks_differ(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grown: bool
) -> None:
    """Machines that share a store, or one whose clock was set back."""
    place = tmp_path / "store"
    if grown:
        # From the first batch on into files that grow, as in long runs from the second on.
        init = Appender.__init__

        def growing(self: Appender, *given: Any) -> None:
            init(self, *given)
            self._known = type("All", (set,), {"__contains__": lambda *_: True})()

        monkeypatch.setattr(Appender, "__init__", growing)
    clock = time.time_ns
    long = "x" * 300
    # Of several widths, which lie in segments of their own.
    for turn, labels in enumerate([[1, 2, 3, 4], [5, long, 6, 7], [8, "b", long, 7], [0, 0, 0, long]]):
        with monkeypatch.context() as patched:
            patched.setattr(time, "time_ns", lambda turn=turn: clock() - turn * 600 * 10**9)
            cache = ac.UnifiedCache(
                folder, store=ac.Store(place, index_dir=tmp_path / str(turn)), compute_perplexity=False
            )
            cache.warmup(TEXTS, labels=labels, metadata={"turn": [turn] * 4})
        assert same(fresh(folder, place).get_labels(TEXTS), labels)
        assert fresh(folder, place).get_metadata(TEXTS) == [{"turn": turn}] * 4
    files = sorted(place.rglob("*.safetensors"))
    fresh(folder, place).warmup(TEXTS, labels=labels)
    assert sorted(place.rglob("*.safetensors")) == files
    ac.Store(place).compact()
    assert same(fresh(folder, place).get_labels(TEXTS), labels)


def test_however_a_prompt_is_given_it_is_the_same_prompt(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    cache = fresh(folder, place)
    ids = [cache.tokenizer(text)["input_ids"] for text in TEXTS]
    cache.warmup(TEXTS, labels=LABELS)
    fresh(folder, place).warmup(ids, labels=[5, 6, 7, 8])
    assert fresh(folder, place).get_labels(TEXTS) == [5, 6, 7, 8]
    with pytest.raises(OptionError, match=r"prompts 1 and 4 are the same, and their labels are not: 1 and 2"):
        cache.warmup([*TEXTS, ids[1]], labels=[0, 1, 0, 0, 2])


def test_one_prompt_cannot_be_two_things(folder: Path, tmp_path: Path) -> None:
    cache = fresh(folder, tmp_path / "store")
    with pytest.raises(OptionError, match="prompts 0 and 2 are the same, and their metadata are not"):
        cache.warmup([TEXTS[0], TEXTS[1], TEXTS[0]], metadata={"a": [1, 1, 2]})
    # Before any work; and twice the same is once.
    assert not cache.model_loaded and not list(tmp_path.rglob("*.safetensors"))
    cache.warmup([TEXTS[0], TEXTS[1], TEXTS[0]], labels=[1, 2, 1])
    assert cache.get_labels(TEXTS[:2]) == [1, 2]


def test_models_and_edits_keep_them_apart(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    fresh(folder, place).warmup(TEXTS, labels=LABELS)
    edited = fresh(folder, place, edits=ac.ablate("mlp_out.0"))
    assert edited.get_labels(TEXTS) == [None] * 4
    # Of one model they are the same whatever is extracted.
    assert same(fresh(folder, place, cache_pooled=False).get_labels(TEXTS), LABELS)


def test_forgetting_prompts_forgets_them(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=METADATA_OF)
    store = ac.Store(place)
    assert store.invalidate(store.spaces()[0].space, fresh(folder, place).store.prompts(store.spaces()[0]).select([0]))
    left = [i for i, label in enumerate(fresh(folder, place).get_labels(TEXTS)) if label is not None]
    assert len(left) == 3
    gone = ({0, 1, 2, 3} - set(left)).pop()
    fresh(folder, place).warmup(TEXTS)
    cache = fresh(folder, place)
    assert cache.get_labels(TEXTS)[gone] is None and cache.get_metadata(TEXTS)[gone] is None


def test_eviction_takes_them_with_their_vectors_and_no_sooner(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    many = [[i % 50, i // 50, 7] for i in range(300)]
    fresh(folder, place, cache_pooled=False).warmup(many, labels=list(range(300)))
    # What was read lately is kept, and labels were read by nobody.
    cache = fresh(folder, place, cache_pooled=False)
    cache.get_activations(many)
    time.sleep(0.01)
    cache.get_activations(many[200:])
    cache.store.evict(cache.store.info().total_size_bytes * 0.55 / 2**30)
    held = cache.store.contains(cache.store.spaces()[0], many, "resid_post.0")
    assert 50 < held.sum() < 300
    labels = np.array(cache.get_labels(many), object)
    assert labels[held].tolist() == np.flatnonzero(held).tolist()
    assert all(label is None for label in labels[~held])
    cache.store.evict(1e-9)
    assert not list(place.rglob("*.safetensors"))


def test_a_prompt_that_fails_has_none_and_the_others_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actcache.extract.backends.local import LocalSession

    run = LocalSession.run

    def failing(self: Any, ids: Any, *args: Any, **options: Any) -> Any:
        if len(ids) == 1 and len(ids[0]) == 3:
            raise RuntimeError("trouble")
        return run(self, ids, *args, **options)

    monkeypatch.setattr(LocalSession, "run", failing)
    prompts = [[1, 2], [3, 4, 5], [6, 7, 8, 9]]
    place = tmp_path / "store"
    with pytest.raises(PartialWarmupError) as caught:
        fresh(folder, place, batch_size=1).warmup(prompts, labels=["a", "b", "c"])
    assert [i for i, _ in caught.value.failed] == [1]
    monkeypatch.undo()
    assert fresh(folder, place).get_labels(prompts) == ["a", None, "c"]


def test_x_and_y_together(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    plain = ac.activations(folder, TEXTS, store=store)
    with pytest.raises(NotCachedError, match=r"4 of 4 prompts have no label.*warmup\(prompts, labels="):
        ac.activations(folder, TEXTS, store=store, return_labels=True)
    for labels, dtype in (
        ([1, 0, 2, 0], np.int64),
        ([0.5, 1.0, -2.0, 0.0], np.float64),
        ([True, False, True, True], np.bool_),
        (["a", "bb", "", "c"], np.dtype("<U2")),
        ([1, 2.5, "x", True], object),
        ([1, 2, 3, 2**64], object),
    ):
        ac.UnifiedCache(folder, store=store).warmup(TEXTS, labels=labels)
        X, y = ac.activations(folder, TEXTS[::-1], store=store, return_labels=True)
        np.testing.assert_array_equal(X, plain[::-1])
        assert y.dtype == dtype
        assert same(y.tolist(), labels[::-1])
    rows, y = ac.activations(folder, TEXTS, store=store, pooling=None, return_labels=True)
    assert len(rows) == 4 and rows[3].ndim == 3 and y[3]
    ac.UnifiedCache(folder, store=store).warmup(TEXTS[1:2], labels=[None])
    with pytest.raises(NotCachedError, match=r"1 of 4 prompts have no label \(the first is prompt 1\)"):
        ac.activations(folder, TEXTS, store=store, return_labels=True)


def test_numbers_of_numpy_and_torch_are_plain_numbers(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    prompts = [[1], [2], [3]]
    metadata = {
        "f": np.array([0.5, 1.0, 1.5], np.float32),
        "t": torch.tensor([1, 2, 3]),
        "v": list(np.arange(6).reshape(3, 2)),
        "b": [np.bool_(True), False, None],
        "s": np.array(["x", "y", "z"]),
    }
    fresh(folder, place).warmup(prompts, labels=np.array([3, 4, 5], np.int32), metadata=metadata)
    cache = fresh(folder, place)
    assert same(cache.get_labels(prompts), [3, 4, 5])
    assert same(
        cache.get_metadata(prompts),
        [
            {"b": True, "f": 0.5, "s": "x", "t": 1, "v": [0, 1]},
            {"b": False, "f": 1.0, "s": "y", "t": 2, "v": [2, 3]},
            {"b": None, "f": 1.5, "s": "z", "t": 3, "v": [4, 5]},
        ],
    )


def test_with_generation_they_are_of_prompt_and_completion(folder: Path, tmp_path: Path) -> None:
    place, generate = tmp_path / "store", {"max_new_tokens": 3}
    fresh(folder, place, generate=generate).warmup(TEXTS, labels=LABELS)
    assert same(fresh(folder, place, generate=generate).get_labels(TEXTS), LABELS)


def test_any_reader_of_the_format_finds_them(folder: Path, tmp_path: Path) -> None:
    """As docs/format.md says, without anything of ours."""
    place = tmp_path / "store"
    fresh(folder, place).warmup(TEXTS[:2], labels=[1, "ü"], metadata={"a": [[1, 2.0], []]})
    found: dict[str, list[Any]] = {}
    for path in place.rglob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        for name in (f"{LABEL}/{LABEL}", f"{METADATA}/{METADATA}"):
            for row in tensors.get(name, ()):
                text = row[row != 255].tobytes().decode("ascii")
                found.setdefault(name, []).append(text)
    assert sorted(found["label/label"]) == ['"\\u00fc"', "1"]
    assert sorted(found["metadata/metadata"]) == ['{"a":[1,2.0]}', '{"a":[]}']


def test_they_are_nobodys_activations(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "store"
    fresh(folder, place).warmup(TEXTS)
    before = ac.Store(place).info().models[0]
    fresh(folder, place).warmup(TEXTS, labels=LABELS, metadata=METADATA_OF)
    after = ac.Store(place).info().models[0]
    assert (after.num_prompts, after.num_layers, after.stored_dtypes) == (4, 2, before.stored_dtypes)
    assert after.has_pooled and not after.has_logits


def test_a_store_that_keeps_nothing_keeps_no_labels(folder: Path, tmp_path: Path) -> None:
    cache = ac.UnifiedCache(folder, store=ac.Store(tmp_path / "store", limit_gb=0), compute_perplexity=False)
    cache.warmup(TEXTS, labels=LABELS)
    assert cache.get_labels(TEXTS) == [None] * 4


_DRIVER = """
import sys, time
import actcache as ac
from actcache.extract.backends.local import LocalSession

run = LocalSession.run
def slowly(self, *given, **options):
    time.sleep(0.03)
    return run(self, *given, **options)
LocalSession.run = slowly
prompts = [[(7 * i + k) % 50 for k in range(1 + i % 23)] for i in range(300)]
cache = ac.UnifiedCache(sys.argv[1], store=sys.argv[2], batch_size=4, compute_perplexity=False)
cache.warmup(prompts, labels=[f"label {i}" for i in range(300)])
"""


@pytest.mark.slow
def test_a_kill_leaves_labels_of_what_is_stored_and_of_nothing_else(folder: Path, tmp_path: Path) -> None:
    prompts = [[(7 * i + k) % 50 for k in range(1 + i % 23)] for i in range(300)]
    place = tmp_path / "store"
    child = subprocess.Popen([sys.executable, "-c", _DRIVER, str(folder), str(place)])
    deadline = time.monotonic() + 120
    labels: list[Any] = []
    while sum(label is not None for label in labels) < 40:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
        labels = ac.UnifiedCache(folder, store=place).get_labels(prompts) if place.exists() else []
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    cache = fresh(folder, place)
    store = cache.store
    held = store.contains(store.spaces()[0], prompts, "resid_post.1", pooling="last_token")
    assert held.sum() < 300
    labels = cache.get_labels(prompts)
    assert all(held[i] for i, label in enumerate(labels) if label is not None)
    assert {label for i, label in enumerate(labels) if label != f"label {i}"} <= {None}
    cache.warmup(prompts, labels=[f"label {i}" for i in range(300)])
    assert fresh(folder, place).get_labels(prompts) == [f"label {i}" for i in range(300)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [1, 2]}, "labels has 2 values for 4 prompts"),
        ({"labels": "abcd"}, "labels is 'abcd'"),
        ({"labels": {4, 3, 2, 1}}, "labels is {.*expected a list with one value for each prompt"),
        ({"labels": [1, 2, 3, [4]]}, r"labels\[3\] is \[4\]"),
        ({"labels": [1, 2, float("nan"), 4]}, r"labels\[2\] is nan"),
        ({"metadata": [{"a": 1}] * 3}, "metadata has 3 values for 4 prompts"),
        ({"metadata": [{"a": 1}] * 3 + [{"b": 1}]}, r"metadata\[3\] has other keys.*\['a', 'b'\]"),
        ({"metadata": [{1: 1}] * 4}, r"metadata\[0\] is \{1: 1\}"),
        ({"metadata": {"a": [1, 2, 3]}}, r"metadata\['a'\] has 3 values"),
        ({"metadata": {"a": [1, 2, 3, {"b": 1}]}}, r"metadata\[3\]\['a'\] is \{'b': 1\}"),
        ({"metadata": {"a": [1, 2, 3, [[1]]]}}, r"metadata\[3\]\['a'\]\[0\] is \[1\]"),
        ({"metadata": [None] * 4}, r"metadata\[0\] is None"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_any_work(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    cache = fresh(folder, tmp_path / "store")
    with pytest.raises(OptionError, match=message):
        cache.warmup(TEXTS, **options)
    assert not cache.model_loaded and not (tmp_path / "store").exists()
