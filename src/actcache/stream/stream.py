"""`stream_activations`: token vectors for training, shuffled over all that is stored, batch after batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch

from actcache.errors import NotCachedError, OptionError, UnknownSiteError
from actcache.model.options import resolve_device
from actcache.model.sites import Site
from actcache.store.reading import reading_dtype
from actcache.stream.batches import ActivationStream, Options
from actcache.stream.epochs import check_ranks
from actcache.stream.live import Extraction
from actcache.stream.normalize import check_normalize
from actcache.stream.running import LiveStream
from actcache.stream.sources import opened


def stream_activations(
    source: Any,
    sites: str | Site | Sequence[str | Site],
    *,
    batch_size: int = 4096,
    shuffle: bool = True,
    seed: int = 0,
    dtype: Any = None,
    device: Any = "cpu",
    normalize: str | None = None,
    with_tokens: bool = False,
    exclude: Any = None,
    drop_last: bool = False,
    space: Any = None,
    prompts: Any = None,
    pooling: str | None = None,
    prefetch: int = 2,
    rank: int | None = None,
    world_size: int | None = None,
) -> ActivationStream:
    """Token vectors of one site or several, out of what is stored: each token once in an epoch.

    Args:
        source: an `ac.Store` (with `space`); an `ac.UnifiedCache`, whose stored prompts are meant; or a dataset of the
            Hub (``"org/name"``) or in a folder, of which these sites are pulled into the default store. Several: a list
            of them, all of whose tokens come, or a dict ``{source: weight}``: their shares of every batch are as the
            weights say, and an epoch ends when the first of them has given all it has.
        sites: complete names, ``"resid_post.6"``, or what other libraries call them (``"blocks.6.hook_resid_post"``).
            Of several the batches are dicts of aligned tensors, by our names: row ``i`` of each is of the same token.
        batch_size: tokens in a batch.
        shuffle: every epoch in another order, which `seed` and the number of the epoch decide. False: as it is stored.
            Of a store that lies elsewhere blocks of prompts come in random order, and the tokens of 65536 at a time.
        dtype: a floating dtype for the batches; None for the one they are stored in (float32 for int8 and
            float8_e4m3).
        device: where batches go, or "auto"; onto an accelerator they are copied while the one before is worked on.
        normalize: ``"mean"`` takes the mean of the streamed tokens from each vector, ``"mean_std"`` also divides each
            dimension by its standard deviation, ``"unit"`` makes each vector one of length 1.
        with_tokens: batches are pairs ``(batch, TokenBatch)``.
        exclude: tokens that are left out: ids, ``"bos"`` (of a `UnifiedCache`, which knows it), ``"first"`` (the first
            token of every prompt), or a list of these.
        drop_last: leave out the last batch of an epoch where it is smaller, and with several ranks what would give
            some of them a batch more than others.
        space: which space of a store: its id or `SpaceInfo`.
        prompts: only these; None for all that have the sites. Of a `UnifiedCache` they need not be stored yet: then the
            model runs in a thread of its own during the first epoch, and what it gives comes at once, see `LiveStream`.
        pooling: stream the vectors stored with this pooling, one for each prompt. A `UnifiedCache` has its own.
        prefetch: batches that are made ahead, by a thread; 0 makes none.
        rank, world_size: which part of every epoch is wanted; by default those of `torch.distributed`, where it is
            initialised, else of the environment (``RANK``, ``WORLD_SIZE``).

    Raises:
        OptionError: an option that is none, before anything is read.
        NotCachedError: nothing is stored there.
    """
    batch_size = _number("batch_size", batch_size, 1, "a number of tokens, 1 or more")
    seed = _number("seed", seed, 0, "an integer, 0 or more")
    prefetch = _number("prefetch", prefetch, 0, "a number of batches, 0 or more")
    rank, world_size = check_ranks(rank, world_size)
    single = isinstance(sites, str | Site)
    asked: list[Any] = [sites] if isinstance(sites, str | Site) else list(sites)
    names = [_name(site) for site in asked]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"sites={sites!r}: expected the name of a site, or a list of different ones.")
    options = Options(
        tuple(names), single, batch_size, bool(shuffle), seed, reading_dtype(dtype),
        torch.device(resolve_device(device)), check_normalize(normalize), bool(with_tokens), bool(drop_last), prefetch,
        rank, world_size,
    )  # fmt: skip
    if prompts is not None and (extraction := Extraction.of(source, options.sites, prompts, exclude)) is not None:
        return LiveStream(extraction, options)
    given = tuple(map(str, asked))
    try:
        parts, weights = opened(source, options.sites, space=space, prompts=prompts, pooling=pooling, exclude=exclude)
    except NotCachedError:
        if given == options.sites:
            raise
        # Somebody may store what is theirs by a name that is an alias of ours.
        options = replace(options, sites=given)
        parts, weights = opened(source, given, space=space, prompts=prompts, pooling=pooling, exclude=exclude)
    return ActivationStream(parts, weights, options)


def _number(name: str, value: Any, least: int, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name}={value!r}: expected {expected}.")
    return int(value)


def _name(site: Any) -> str:
    """What a site is called where it is stored: aliases of other libraries are names of ours, and others names of
    somebody's own."""
    if not isinstance(site, str | Site):
        raise OptionError(f"site {site!r}: expected a name such as 'resid_post.6'.")
    with contextlib.suppress(UnknownSiteError):
        return str(Site.parse(site) if isinstance(site, str) else site)
    return str(site)
