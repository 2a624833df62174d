"""The logit lens over the streams that an in-memory cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actcache.capture.inputs import find_tokenizer
from actcache.capture.lens import STREAM_SITES, LogitLens, check_top_k, lens_of, read_chosen
from actcache.capture.streams import Streams
from actcache.capture.translators import read_translators
from actcache.errors import require_choice
from actcache.model.layer_predictions import predict_layers
from actcache.model.sites import Site, resolve_layers


@torch.no_grad()
def make_lens(
    streams: Streams,
    name: str,
    layers: Any,
    top_k: int,
    pos_slice: Any,
    recompute_ln: bool,
    tokenizer: Any,
    tokens: Any,
    translators: Any,
) -> LogitLens:
    """See `ActivationCache.logit_lens`."""
    require_choice(name, STREAM_SITES, "site of the residual stream")
    head = streams.head
    check_top_k(top_k, head.vocab_size)

    def load_tokenizer() -> Any:
        return find_tokenizer(head.model) if tokenizer is None else tokenizer

    chosen = read_chosen(tokens, head.vocab_size, load_tokenizer)
    dot = f"{streams.stack}." if streams.stack else ""
    held = streams.cache.layer_numbers(f"{dot}{name}")
    if layers is None:
        numbers = held
    else:
        numbers = resolve_layers(layers, streams.depth) if layers != [] else []
    maps = read_translators(translators, name, numbers, streams.depth, head.width)
    sites = [Site(name, number, stack=streams.stack) for number in numbers]
    if not held:
        streams.get(*(sites or [Site(name, 0, stack=streams.stack)]))
    shown = Site(name, held[0], stack=streams.stack)
    end = Site("resid_post", streams.depth - 1, stack=streams.stack)
    with streams.picking(pos_slice):
        values = [_with_positions(value) for value in streams.get(*sites)]
        (like,) = (_with_positions(value) for value in streams.get(shown))
        final = _with_positions(streams.get(end)[0]) if str(end) in streams.cache else None
    mask = streams.mask(shown) if pos_slice is None else None
    mask = torch.ones(like.shape[:2], dtype=torch.bool) if mask is None else mask
    norm = streams.norm(streams.depth, mlp_input=False)
    normalised = norm is not None and not recompute_ln
    scale = None
    if norm is not None and not recompute_ln:
        with streams.picking(pos_slice):
            (whole,) = streams.get(streams.at_boundary(streams.depth))
        scale = norm.scale(_with_positions(whole))

    def ready(value: Tensor, translate: Any) -> Tensor:
        """The rows of the real positions, as the head is to be given them."""
        rows = value[mask.to(value.device)]
        if translate is not None:
            rows = translate(rows)
        if norm is None or scale is None:
            return rows
        return norm.finish(norm.divide(rows, scale[mask.to(scale.device)].to(rows.device)))

    # Where it is among the layers as it is, it is the same tensor, and put through the head once.
    last = None if final is None else ready(final, None)
    rows = [
        last if site == end and translate is None and last is not None else ready(value, translate)
        for site, value, translate in zip(sites, values, maps, strict=True)
    ]
    return lens_of(
        predict_layers(head, rows, last, top_k=top_k, chosen=chosen, normalised=normalised),
        mask,
        site=f"{dot}{name}",
        layers=numbers,
        chosen=chosen,
        positions=_positions(streams, shown, mask, pos_slice),
        input_ids=_input_ids(streams, shown, mask, pos_slice),
        final=str(end),
        rows=lambda place: [rows[place]],
        normalised=normalised,
        head=head,
        load_tokenizer=load_tokenizer,
        kept=bool(streams.cache._cut),
    )


def _positions(streams: Streams, site: Site, mask: Tensor, pos_slice: Any) -> Tensor:
    whole = streams.mask(site)
    if whole is None:
        # All are real as far as is known.
        (value,) = streams.get(site)
        whole = torch.ones(value.shape[:2], dtype=torch.bool)
    return _picked(streams, site, torch.where(whole, whole.long().cumsum(-1) - 1, -1), mask, pos_slice)


def _input_ids(streams: Streams, site: Site, mask: Tensor, pos_slice: Any) -> Tensor:
    ids = streams.token_ids(site)
    return torch.full(mask.shape, -1) if ids is None else _picked(streams, site, ids, mask, pos_slice)


def _picked(streams: Streams, site: Site, values: Tensor, mask: Tensor, pos_slice: Any) -> Tensor:
    with streams.picking(pos_slice):
        found = streams.picked(site, values)
    return found.reshape(mask.shape).long().masked_fill(~mask, -1)


def _with_positions(value: Tensor) -> Tensor:
    return value if value.ndim == 3 else value[:, None]
