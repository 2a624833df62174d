"""Backends of others, what is tried again, and what a run leaves behind that a backend broke off."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.extract import attempts
from actcache.extract.backends import registry
from actcache.testing.tiny import tiny_model
from toy_backend import Toy, value

PROMPTS = [[5, 9, 100, 7], [8, 3], [4, 50, 6], [11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_model("gpt2").save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The toy is installed; nobody waits, what would be waited for is noted."""
    points = [EntryPoint("toy", "toy_backend:Toy", registry.GROUP), EntryPoint("gone", "nowhere:X", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    seconds: list[float] = []
    monkeypatch.setattr(attempts, "pause", seconds.append)
    monkeypatch.setattr(Toy, "fails", staticmethod(lambda sequences: None))
    return seconds


def cache(folder: Path, **options: Any) -> ac.UnifiedCache:
    settings: dict[str, Any] = {"backend": "toy", "compute_perplexity": False, "batch_size": 1, "layers": [0, 2]}
    return ac.UnifiedCache(folder, **{**settings, **options})


def expected(pooled: bool = True) -> list[np.ndarray[Any, Any]]:
    sites = ("resid_post.0", "resid_post.2")
    rows = [np.array([[*value(sites[0], t), *value(sites[1], t)] for t in p], np.float32) for p in PROMPTS]
    return [r[-1] for r in rows] if pooled else rows


def failing(monkeypatch: pytest.MonkeyPatch, errors_of: dict[tuple[int, ...], list[Exception]]) -> list[list[int]]:
    """Let the toy raise these, one after the other, for each prompt; what it was asked for."""
    seen: list[list[int]] = []

    def fails(sequences: list[list[int]]) -> None:
        seen.extend(sequences)
        left = errors_of.get(tuple(sequences[0]))
        if left:
            raise left.pop(0)

    monkeypatch.setattr(Toy, "fails", staticmethod(fails))
    return seen


def test_values_of_a_backend_come_back_and_are_not_those_of_another(folder: Path) -> None:
    toy = cache(folder)
    values, mask = toy.get_activations(PROMPTS)
    assert mask is None
    np.testing.assert_array_equal(values.numpy(), np.stack(expected()))
    raw, mask = cache(folder, cache_pooled=False).get_activations(PROMPTS)
    for i, rows in enumerate(expected(pooled=False)):
        np.testing.assert_array_equal(raw[i][mask[i]].numpy(), rows)
    local = cache(folder, backend="local").get_activations(PROMPTS)[0]
    assert not torch.equal(local, values)
    warm = cache(folder)
    torch.testing.assert_close(warm.get_activations(PROMPTS)[0], values, rtol=0, atol=0)
    assert not warm.model_loaded
    assert cache(folder).warmup(PROMPTS).activations_cached == 4


def test_names_of_backends(folder: Path) -> None:
    with pytest.raises(errors.OptionError, match=r"unknown backend 'tyo': .*'gone', 'local'.*'toy'.*mean 'toy'"):
        cache(folder, backend="tyo")
    with pytest.raises(errors.OptionError, match=r"'gone' \(nowhere:X\) cannot be imported"):
        cache(folder, backend="gone")
    with pytest.raises(errors.OptionError, match="unknown backend 3"):
        cache(folder, backend=3)


def test_what_a_backend_refuses_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="the toy has no head"):
        cache(folder, compute_perplexity=True, store=tmp_path / "store").warmup(PROMPTS)
    assert ac.Store(tmp_path / "store").spaces() == []
    with pytest.raises(errors.OptionError, match="the toy knows True and False"):
        cache(folder, remote="http://here")
    with pytest.raises(errors.OptionError, match="the toy knows True and False"):
        cache(folder).warmup(PROMPTS, remote="http://here")


def test_each_call_may_say_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cache(folder, cache_logits=False)
    here.warmup(PROMPTS, labels=[1, 2, 3, 4])
    assert here.plan(PROMPTS).missing == 0
    # Elsewhere a model is known by name, and no value is taken for one of the weights here.
    assert here.plan(PROMPTS, remote=True).missing == 4
    assert here.warmup(PROMPTS, True, labels=[5, 6, 7, 8]).activations_extracted == 4
    assert (here.get_labels(PROMPTS, True), here.get_labels(PROMPTS)) == ([5, 6, 7, 8], [1, 2, 3, 4])
    assert here.cached.extract(PROMPTS, True, cache_only=True) is None
    assert cache(folder, remote=True).plan(PROMPTS).missing == 0
    monkeypatch.setattr(Toy, "identity", {"name": "toy", "version": 2})
    other = cache(folder)
    assert other.plan(PROMPTS).missing == 4
    assert other.get_labels(PROMPTS) == [None] * 4
    assert other._at(True)._at(False) is other


@pytest.mark.parametrize("call", ["warmup", "get_activations", "get_perplexity", "get_token_perplexity", "get_logits",
                                  "get_labels", "get_metadata", "logit_lens", "plan"])  # fmt: skip
def test_remote_with_the_local_backend_is_refused_by_every_method(folder: Path, call: str) -> None:
    here = cache(folder, backend="local", compute_perplexity=True)
    with pytest.raises(errors.OptionError, match="remote=True: backend 'local' runs models in this process"):
        getattr(here, call)(PROMPTS, remote=True)
    assert not here.model_loaded


def test_remote_with_the_local_backend_is_refused_by_extractors(folder: Path) -> None:
    with pytest.raises(errors.OptionError, match="remote='http://x': backend 'local'"):
        ac.ActivationExtractor(folder, remote="http://x")
    with pytest.raises(errors.OptionError, match="remote=True: backend 'local'"):
        ac.CachedExtractor(ac.ActivationExtractor(folder)).extract(PROMPTS, True)
    with pytest.raises(errors.OptionError, match="remote=True: backend 'local'"):
        ac.activations(folder, PROMPTS, remote=True)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3"])
def test_retries_that_are_no_number(folder: Path, wrong: Any) -> None:
    for call in (cache(folder).warmup, cache(folder).get_activations, cache(folder).cached.extract):
        with pytest.raises(errors.OptionError, match="max_retries is"):
            call(PROMPTS, max_retries=wrong)
    with pytest.raises(errors.OptionError, match="max_retries is"):
        ac.ActivationExtractor(folder, backend="toy").extract(PROMPTS, max_retries=wrong)


def test_a_failure_that_passes_is_tried_again_later_and_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    passing = [errors.TransientEngineError("busy"), RuntimeError("driver"), OSError("disk")]
    seen = failing(monkeypatch, {(8, 3): passing})
    values = cache(folder).get_activations(PROMPTS, max_retries=3)[0]
    np.testing.assert_array_equal(values.numpy(), np.stack(expected()))
    assert seen.count([8, 3]) == 4
    assert [1.5 * 2**n <= s <= 2.5 * 2**n for n, s in enumerate(pauses)] == [True] * 3


def test_a_batch_that_fails_for_good_is_named_and_the_rest_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    seen = failing(monkeypatch, {(8, 3): [errors.TransientEngineError("busy")] * 9, (11,): [OSError("disk")] * 9})
    here = cache(folder)
    with pytest.raises(errors.PartialWarmupError) as raised:
        here.warmup(PROMPTS, max_retries=2)
    assert [i for i, _ in raised.value.failed] == [1, 3]
    assert "TransientEngineError: busy" in raised.value.failed[0][1]
    assert seen.count([8, 3]) == seen.count([11]) == 3
    assert raised.value.stats.activations_extracted == 2
    monkeypatch.setattr(Toy, "fails", staticmethod(lambda sequences: None))
    assert cache(folder).warmup(PROMPTS).activations_extracted == 2


def test_nothing_is_tried_again_unasked_nor_what_is_certain(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    seen = failing(monkeypatch, {(8, 3): [OSError("disk")], (11,): [errors.SiteUnavailableError("no such")] * 2})
    with pytest.raises(errors.PartialWarmupError):
        cache(folder).warmup(PROMPTS)
    assert (seen.count([8, 3]), seen.count([11]), pauses) == (1, 1, [])
    with pytest.raises(errors.PartialWarmupError, match="no such"):
        cache(folder).warmup(PROMPTS, max_retries=3)
    assert (seen.count([11]), pauses) == (2, [])


def test_the_default_number_of_retries_is_the_backends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(Toy, "retries", 2)
    failing(monkeypatch, {(8, 3): [errors.TransientEngineError("busy")] * 2})
    assert cache(folder).warmup(PROMPTS).activations_extracted == 4
    failing(monkeypatch, {(8, 3): [errors.TransientEngineError("busy")]})
    other = cache(folder, cache_pooled=False)
    with pytest.raises(errors.PartialWarmupError):
        other.warmup(PROMPTS, max_retries=0)
    assert len(pauses) == 2


def test_a_service_that_is_gone_ends_the_run_and_keeps_what_is_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    gone = [errors.TransientEngineError("nobody answers", unreachable=True) for _ in range(9)]
    seen = failing(monkeypatch, {(8, 3): gone})
    with pytest.raises(errors.EngineUnavailableError, match=r"nobody answers \(tried 2 times\)"):
        cache(folder).warmup(PROMPTS, max_retries=1)
    # Longest first: two were finished, the shortest was not tried.
    assert [11] not in seen
    monkeypatch.setattr(Toy, "fails", staticmethod(lambda sequences: None))
    assert cache(folder).warmup(PROMPTS).activations_cached == 2


def test_a_service_that_only_fails_is_not_asked_for_every_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    many = [[3 + i] * 4 for i in range(20)]
    seen: list[list[int]] = []

    def fails(sequences: list[list[int]]) -> None:
        seen.extend(sequences)
        raise errors.TransientEngineError("503")

    monkeypatch.setattr(Toy, "fails", staticmethod(fails))
    with pytest.raises(errors.EngineUnavailableError, match="503"):
        cache(folder).warmup(many, max_retries=1)
    assert len(seen) == 6


def test_too_large_a_batch_is_halved_and_not_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    sizes: list[int] = []

    def fails(sequences: list[list[int]]) -> None:
        sizes.append(len(sequences))
        if len(sequences) > 1:
            raise torch.OutOfMemoryError("too many")

    monkeypatch.setattr(Toy, "fails", staticmethod(fails))
    values = cache(folder, batch_size=4).get_activations(PROMPTS, max_retries=3)[0]
    np.testing.assert_array_equal(values.numpy(), np.stack(expected()))
    assert (sorted(sizes), pauses) == ([1, 1, 1, 1, 2, 2, 4], [])


def test_the_command_names_backend_and_retries(folder: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(f'{{"input_ids": {ids}}}\n' for ids in PROMPTS))
    asked = ("warmup", str(folder), str(file), "--batch-size", "1")
    status, _, said = cli(*asked, "--remote")
    assert status == 2 and "backend 'local' runs models in this process" in said
    failing(monkeypatch, {(8, 3): [errors.TransientEngineError("busy")]})
    status, said, _ = cli(*asked, "--backend", "toy", "--max-retries", "1")
    assert status == 0 and "4 extracted" in said
