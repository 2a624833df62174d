"""Perplexity and logits out of a store, and into it from the activations that are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.derive.results import (
    LOGITS,
    PERPLEXITY,
    TOKEN_NLL,
    Asked,
    LogitsAsked,
    exponentials,
)
from actcache.errors import NotCachedError, OptionError, ResultsNotCachedError, SiteUnavailableError
from actcache.extract.declared import refuse_edits_behind
from actcache.extract.plan import Plan, bytes_free
from actcache.extract.prompts import PromptList, prompt_table
from actcache.extract.results import answering
from actcache.model.sites import Site
from actcache.progress import progress
from actcache.store.records import DERIVED, TOKENS

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.extract.answer import Lookup
    from actcache.extract.cached import CachedExtractor
    from actcache.store.prompts import PromptTable

# Logits that are kept of one batch.
_KEPT_BYTES = 128 << 20


@dataclass(frozen=True)
class CachedLogits:
    """Logits of `B` prompts.

    Attributes:
        values: float32 ``[B, P, V]``, or the largest first ``[B, P, k]``; 0 where a position is padding.
        indices: int32 ``[B, P, k]``, the tokens of `values`, -1 where a position is padding; None for all logits.
        top_k: k, or None for all logits.
        positions: "last" (then P is 1) or "all".
        mask: which positions are real, bool ``[B, P]``; padding is on the right.
    """

    values: torch.Tensor
    indices: torch.Tensor | None
    top_k: int | None
    positions: str
    mask: torch.Tensor


def read_perplexity(cached: CachedExtractor, prompts: PromptList) -> npt.NDArray[np.float32] | None:
    """float32 ``[B, 3]``; None when it is not there for all."""
    found = cached.look_up(prompts, (PERPLEXITY,), DERIVED)
    return found.pooled()[:, 0] if found.found.all() else None


def read_token_perplexity(cached: CachedExtractor, prompts: PromptList) -> list[npt.NDArray[np.float32]] | None:
    """For each prompt ``exp`` of the cross-entropy of each token but its first, ``[T - 1]``; None when it is not there
    for all."""
    found = cached.look_up(prompts, (TOKEN_NLL,), TOKENS)
    if not found.found.all():
        return None
    return [exponentials(losses[:-1, 0]).astype(np.float32) for (losses,) in found.rows()]


def read_logits(cached: CachedExtractor, prompts: PromptList, asked: LogitsAsked) -> CachedLogits | None:
    """What is `asked`, out of what holds just that or all logits; None when it is not there for all prompts."""
    import torch

    parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any] | None] | None] = [None] * len(prompts)
    for names in answering(asked):
        left = [i for i, part in enumerate(parts) if part is None]
        whole = len(left) == len(prompts)
        some = prompts if whole else prompts.select(left)
        has = np.flatnonzero(cached.look_up(some, names, asked.layout).found).tolist() if left else []
        if has:
            # Values and their tokens out of the same places, wherever else either may be.
            found = cached.look_up(some.select(has), names, asked.layout)
            columns = [_rows(found.of_site(name), asked) for name in names]
            for k, i in enumerate(has):
                values, indices = columns[0][k], columns[1][k] if len(columns) > 1 else None
                if asked.top_k is not None and indices is None:
                    largest = torch.from_numpy(np.array(values, np.float32)).topk(asked.top_k, dim=-1)
                    values, indices = largest.values.numpy(), largest.indices.int().numpy()
                parts[left[i]] = values, indices
    if any(part is None for part in parts):
        return None
    return _padded([part for part in parts if part is not None], asked)


def _rows(found: Lookup, asked: LogitsAsked) -> list[npt.NDArray[Any]]:
    if asked.positions == "last":
        return list(found.pooled())
    return [rows for (rows,) in found.rows()]


def _padded(parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any] | None]], asked: LogitsAsked) -> CachedLogits:
    import torch

    longest, width = max(len(values) for values, _ in parts), parts[0][0].shape[1]
    values = torch.zeros(len(parts), longest, width)
    indices = None if asked.top_k is None else torch.full(values.shape, -1, dtype=torch.int32)
    mask = torch.zeros(values.shape[:2], dtype=torch.bool)
    for i, (numbers, tokens) in enumerate(parts):
        values[i, : len(numbers)] = torch.from_numpy(np.array(numbers, np.float32))
        mask[i, : len(numbers)] = True
        if indices is not None and tokens is not None:
            indices[i, : len(tokens)] = torch.from_numpy(np.array(tokens))
    return CachedLogits(values, indices, asked.top_k, asked.positions, mask)


def no_logits(asked: LogitsAsked) -> ResultsNotCachedError:
    """The error for logits that are not there, with both ways to get them."""
    top_k = "" if asked.top_k is None else f", logit_top_k={asked.top_k}"
    return ResultsNotCachedError(
        f"{asked} are not stored for every prompt: UnifiedCache(..., cache_logits=True{top_k}, "
        f"logit_positions={asked.positions!r}) computes them with the activations, compute_logits_from_cache(prompts, "
        f"{asked.positions!r}, top_k={asked.top_k}) from stored activations of the last layer."
    )


def compute_results(
    cached: CachedExtractor, prompts: PromptList, asked: Asked, *, batch_size: int, device: str | None
) -> int:
    """Compute what is `asked` of `prompts` from their stored activations, where it is missing; of how many prompts.

    Raises:
        OptionError: the last layer is not among the cache's, or an edit changes what follows it.
        SiteUnavailableError: a model without a head (or, of perplexity, one that does not predict next tokens).
        NotCachedError: prompts whose activations are not stored (perplexity and logits of every token need those of
            every token).
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise OptionError(f"batch_size is {batch_size!r}: expected a positive integer.")
    source = cached.extractor.source
    stack = source.stacks[-1]
    site = str(Site("resid_post", source.depth(stack) - 1, stack=stack))
    if site not in cached.extractor.sites:
        what = "perplexity follows" if asked.perplexity else "logits follow"
        remedy = "add the last layer to layers= (-1)"
        if not any(Site.parse(name).name == "resid_post" for name in cached.extractor.sites):
            remedy = f"add {str(Site('resid_post', stack=stack))!r} to sites="
        raise OptionError(f"{what} from {site!r}, which is not among this cache's sites: {remedy}.")
    found = cached.find_results(prompts, asked)
    if asked.perplexity and not found.asked.perplexity:
        raise no_perplexity(source.name)
    todo: dict[bytes, int] = {}
    for i in np.flatnonzero(~found.found).tolist():
        ids = prompts.ids[i]
        assert ids is not None
        todo.setdefault(ids.tobytes(), i)
    if not todo:
        return 0
    left = prompts.select(list(todo.values()))
    every = asked.perplexity or (asked.logits is not None and asked.logits.positions == "all")
    layout = TOKENS if every else "last_token"
    stored = cached.look_up(left, (site,), layout, own=True).found
    if not stored.all():
        what = "those of every token" if every else "those of the last token or of every one"
        pooled = ", with cache_pooled=False" if every else ""
        raise NotCachedError(
            f"{int((~stored).sum())} of {len(prompts)} prompts have no {site!r} in the store that this follows from "
            f"(it needs {what}): warmup(prompts) of a UnifiedCache with the last layer{pooled} stores it. What was "
            "pulled from a dataset does not count, since results are stored as this model's own."
        )
    _compute(cached, left, asked, site, layout, batch_size, device)
    return len(left)


def no_perplexity(name: str) -> SiteUnavailableError:
    return SiteUnavailableError(
        f"{name!r} does not predict the token that follows, so its prompts have no perplexity: it needs a causal "
        "language model with its head."
    )


def _compute(
    cached: CachedExtractor,
    prompts: PromptList,
    asked: Asked,
    site: str,
    layout: str,
    batch_size: int,
    device: str | None,
) -> None:
    import torch

    from actcache.extract.arrays import to_torch
    from actcache.extract.backends.local import exact_float32
    from actcache.extract.backends.predictor import results_of

    source = cached.extractor.source
    lengths = [0 if ids is None else len(ids) for ids in prompts.ids]
    place = cached.store.disk
    nbytes = asked.nbytes(len(prompts), sum(lengths), source.vocab_size or 0)
    Plan(0, len(prompts), sum(lengths), nbytes, bytes_free(place), 0.0).require_room(place)
    head = source.head(device)
    refuse_edits_behind(cached.extractor.edits, head, normalised=False)
    table = prompt_table(prompts, range(len(prompts)), cached.text_context(prompts))
    with (
        cached.adding_results() as writer,
        progress(len(prompts), f"computing from {Path(source.name).name}") as bar,
        torch.no_grad(),
        torch.autocast(head.device.type, enabled=False),
        exact_float32(),
    ):
        cached.confirm(cached.identity().values)
        for members in _batches(lengths, batch_size, asked, head.vocab_size):
            part = prompts.select(members)
            rows = cached.look_up(part, (site,), layout, check=False, own=True)
            kept = rows.pooled()[:, 0] if layout != TOKENS else np.concatenate([r for (r,) in rows.rows()])
            few: PromptTable = table.select(members)
            sequences = [few.tokens(k) for k in range(len(members))]
            values = to_torch(np.array(kept))
            writer.put(few, asked, results_of(head, values, sequences, asked, every=layout == TOKENS))
            bar.update(len(members))


def _batches(lengths: list[int], batch_size: int, asked: Asked, vocabulary: int) -> Iterator[list[int]]:
    """Prompts that are computed together: not more than `batch_size`, nor logits than fit."""
    logits = asked.logits
    most = None
    if logits is not None and logits.positions == "all" and logits.names == (LOGITS,):
        most = _KEPT_BYTES // (4 * vocabulary)
    batch: list[int] = []
    rows = 0
    for i, length in enumerate(lengths):
        if batch and (len(batch) == batch_size or (most is not None and rows + length > most)):
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += length
    yield batch
