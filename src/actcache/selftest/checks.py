"""The checks: each gets values in one way and holds them against the prompts run alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from actcache.capture.hooks import run_with_cache
from actcache.config import STORAGE_DTYPES
from actcache.extract.arrays import to_torch
from actcache.extract.cached import CachedExtractor
from actcache.extract.extractor import ActivationExtractor
from actcache.model.decoder_inputs import is_encoder_decoder
from actcache.model.forward_inputs import accepts
from actcache.selftest import hidden
from actcache.selftest.additions import check_additions
from actcache.selftest.experts import MOST_FLIPPED
from actcache.selftest.inside import check_heads, check_patterns
from actcache.selftest.ledger import same
from actcache.selftest.subject import Subject, Watched
from actcache.store.store import Store

ABOUT = {
    "finite": "values are numbers, not inf or nan",
    "identities": "parts add up to the stream",
    "hidden states": "transformers' own, the same",
    "alone": "extracted one at a time",
    "equal lengths": "extracted in batches of one length",
    "padded": "extracted in padded batches",
    "right padding": "captured, padded on the right",
    "left padding": "captured, padded on the left",
    "store": "stored, then read by a new reader",
    "pooled": "last tokens, stored and read",
    "heads": "heads add up to attention's output",
    "patterns": "transformers' own probabilities, the same",
    "mixing": "patterns times values are what heads hand on",
    "experts": "routings that the batch changed",
}


def run_checks(subject: Subject, step: Callable[[], object], *, seed: int) -> None:
    """Run every check on `subject`, noting the results in its ledger; `step` is called after each."""
    ledger = subject.ledger
    for name, about in ABOUT.items():
        ledger.expect(name, about, rounded=name == "identities")
    _finite(subject)
    check_additions(subject)
    hidden.check_alone(subject)
    step()
    with ledger.running("alone"):
        _extract(subject, 1, list(range(len(subject.prompts))))
    step()
    with ledger.running("padded"):
        _extract(subject, 3, random.Random(seed).sample(range(len(subject.prompts)), len(subject.prompts)))
    step()
    with ledger.running("store"):
        _store(subject, list(reversed(range(len(subject.prompts)))))
    step()
    if subject.policy.lengths != "any":
        ledger.not_applicable("padded", subject.policy.why)
        if subject.policy.lengths == "alone":
            ledger.not_applicable("equal lengths", subject.policy.why)
    with ledger.running("pooled"):
        _pooled(subject)
    step()
    for side in ("right", "left"):
        with ledger.running(f"{side} padding"):
            _capture(subject, side)
        step()
    for check, run in {"heads": check_heads, "patterns": check_patterns}.items():
        with ledger.running(check):
            run(subject)
        step()
    _experts(subject)


def _finite(subject: Subject) -> None:
    """A model that computes no numbers agrees with itself, and shows nothing."""
    for name in subject.sites:
        bad = [i for i, one in enumerate(subject.alone) if not _numbers(name, one.values[name])]
        wrong = f"holds inf or nan on prompt {bad[0]}" if bad else None
        error = float("inf") if bad else 0.0
        subject.ledger.note("finite", name, error, wrong=wrong, count=len(subject.alone))


def _numbers(name: str, values: Tensor) -> bool:
    # Heads may rule tokens out.
    odd = values.isnan() | values.isposinf() if name == "logits" else ~values.isfinite()
    return not bool(odd.any())


def _extract(subject: Subject, batch_size: int, order: list[int]) -> None:
    with subject.extracting(batch_size) as (extractor, watched):
        got = extractor.extract([subject.prompts[i] for i in order])
    ours = [{name: got[name][row] for name in subject.sites} for row in range(len(order))]
    _compare_batches(subject, watched, order, ours)


def _compare_batches(subject: Subject, watched: Watched, order: list[int], ours: list[dict[str, Tensor]]) -> None:
    """Hold the rows of each prompt against it alone, under the check that its batch belongs to."""
    groups: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
    for number, batch in enumerate(watched.batches):
        name = "alone" if len(batch.indices) == 1 else "padded" if batch.ragged else "equal lengths"
        groups.setdefault(name, []).extend(zip(batch.indices, subject.choices_of(watched, number), strict=True))
    for name, members in groups.items():
        which, rows = [order[row] for row, _ in members], [ours[row] for row, _ in members]
        subject.compare(name, which, rows, [choices for _, choices in members])
        if name == "alone":
            hidden.check_extracted(subject, which, rows)


def _exact_store(folder: str, index: str, extractor: ActivationExtractor) -> Store:
    """A store that keeps all that is computed bit for bit, whatever this process stores elsewhere."""
    computed = extractor.source.dtype
    dtype = computed if computed in STORAGE_DTYPES else None
    return Store(folder, limit_gb=math.inf, dtype=dtype, index_dir=Path(folder) / index)


def _store(subject: Subject, order: list[int]) -> None:
    """Extract in batches of 8 into a store, and read it back through another one."""
    prompts = [subject.prompts[i] for i in order]
    names = list(subject.sites)
    with TemporaryDirectory(prefix="actcache-selftest-") as folder:
        with subject.extracting(8) as (extractor, watched):
            store = _exact_store(folder, "index-1", extractor)
            CachedExtractor(extractor, store).extract(prompts, cache_only=True)
            store.close()
        # Prompts of a batch are named by their place among those that were missing: all of them, once each.
        different = list({tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}.values())
        missing = sorted(different)
        written: dict[int, dict[str, Tensor]] = {}
        for batch, rows in zip(watched.batches, watched.rows, strict=True):
            counts = [len(prompts[missing[k]]) for k in batch.indices]
            parts = {name: torch.split(rows[name], counts) for name in names}
            for at, k in enumerate(batch.indices):
                written[missing[k]] = {name: parts[name][at] for name in names}
        _compare_batches(subject, watched, [order[row] for row in missing], [written[row] for row in missing])
        with subject.extracting(8) as (extractor, _):
            reader = CachedExtractor(extractor, _exact_store(folder, "index-2", extractor))
            read = reader.request(prompts, names).lookup.rows()
            for row in missing:
                for name, array in zip(names, read[row], strict=True):
                    ours = to_torch(array.copy())
                    right = same(ours, written[row][name])
                    wrong = None if right else "what is read is not what was stored"
                    subject.ledger.note("store", name, 0.0 if right else float("inf"), wrong=wrong)
            reader.store.close()


def _pooled(subject: Subject) -> None:
    with TemporaryDirectory(prefix="actcache-selftest-") as folder:
        with subject.extracting(8, "last_token") as (extractor, watched):
            cached = CachedExtractor(extractor, _exact_store(folder, "index", extractor))
            cached.extract(subject.prompts, cache_only=True)
            read = _read_pooled(cached, subject)
            cached.store.close()
        pairs = [
            pair
            for number, batch in enumerate(watched.batches)
            for pair in zip(batch.indices, subject.choices_of(watched, number), strict=True)
        ]
        which = [i for i, _ in pairs]
        ours = [{name: rows[i : i + 1] for name, rows in read.items()} for i in which]
        subject.compare("pooled", which, ours, [choices for _, choices in pairs])


def _read_pooled(cached: CachedExtractor, subject: Subject) -> dict[str, Tensor]:
    """By site, the pooled vectors of all prompts ``[B, D]``; sites of one width are read together."""
    widths: dict[int, list[str]] = {}
    for name, value in subject.alone[0].values.items():
        widths.setdefault(value.shape[-1], []).append(name)
    found: dict[str, Tensor] = {}
    for names in widths.values():
        rows = to_torch(cached.request(subject.prompts, names).lookup.pooled())
        found |= {name: rows[:, at] for at, name in enumerate(names)}
    return found


def _capture(subject: Subject, side: str) -> None:
    ledger, name = subject.ledger, f"{side} padding"
    if subject.policy.coupled:
        ledger.not_applicable(name, subject.policy.why)
        return
    if side == "left" and is_encoder_decoder(subject.source.config):
        ledger.not_applicable(name, "the decoder's input begins with its start token, so it is padded on the right.")
        return
    given = accepts(subject.model, "position_ids") and subject.policy.position_ids
    if side == "left" and not given:
        ledger.not_applicable(name, "this model takes no position ids, so that prompts are padded on the right.")
        return
    chosen = _different_lengths(subject)
    rows = [subject.prompts[i] for i in chosen]
    watched = Watched(choices={path: [] for path in subject.routers})
    with subject.watching(watched):
        _, cache = run_with_cache(subject.model, subject.inputs(rows, side), sites=list(subject.sites))
    longest = max(map(len, rows))
    ours, choices = [], []
    for row, tokens in enumerate(map(len, rows)):
        real = slice(0, tokens) if side == "right" else slice(longest - tokens, longest)
        ours.append({site: cache[site][row, real].flatten(1) for site in subject.sites})
        choices.append(
            {
                path: visits[0].reshape(len(rows), longest, -1)[row, real]
                for path, visits in watched.choices.items()
                if len(visits) == 1 and len(visits[0]) == len(rows) * longest
            }
        )
    subject.compare(name, chosen, ours, choices)


def _different_lengths(subject: Subject) -> list[int]:
    """Up to 8 prompts, no two of one length, from the shortest to the longest."""
    by_length = {len(prompt): i for i, prompt in reversed(list(enumerate(subject.prompts)))}
    lengths = sorted(by_length)
    picked = [lengths[k * (len(lengths) - 1) // min(7, len(lengths) - 1 or 1)] for k in range(min(8, len(lengths)))]
    return [by_length[n] for n in dict.fromkeys(picked)]


def _experts(subject: Subject) -> None:
    if not subject.routed:
        subject.ledger.not_applicable("experts", "the model is no mixture of experts.")
        return
    share = subject.flipped / subject.routed
    right = share <= MOST_FLIPPED
    wrong = None if right else f"{share:.1%} of the routings change with the batch, more than {MOST_FLIPPED:.0%}"
    subject.ledger.note("experts", "routers", share, exact=share == 0, wrong=wrong)
