"""Masks of site values that hold other rows or positions than the tokens of their block.

A site has a value of every pass that reached it, which need not be every pass; and logits may be computed for some
positions only, as in the first step of generation. What their rows and columns are is then told value by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from actcache.capture.joining import Sequences, known_ids, n_rows, real_positions, with_earlier
from actcache.capture.padding import join_tensors, pad_axis
from actcache.capture.passes import Pass
from actcache.capture.tokens import Mask, position_axes
from actcache.model.sites import Site

# For each pass that reached a site, its index and how many positions its value has.
Widths = Sequence[tuple[int, int]]


def own_masks(
    passes: Sequence[Pass], groups: Sequence[Sequences], ends: frozenset[int], widths: Mapping[str, Widths]
) -> dict[str, Mask]:
    """The masks of those of the sites of one stack, by key, that the tokens of the stack do not describe."""
    used = {piece.index for sequences in groups for piece in sequences.pieces}
    if not used or any(sequences.refusal is not None for sequences in groups):
        return {}
    found: dict[str, Mask] = {}
    alike: dict[tuple[bool, int, tuple[tuple[int, int], ...]], Mask | None] = {}
    everything: Tensor | None = None
    for key, given in widths.items():
        of_pass = dict(reversed(given))
        if used <= of_pass.keys() and all(of_pass[index] == _width(passes[index]) for index in used):
            continue
        if everything is None:
            everything = real_positions(passes, groups, known_ids(passes, groups), ends)
        logits, axes = Site.parse(key).name == "logits", position_axes(key)
        kind = logits, len(axes), tuple(sorted(of_pass.items()))
        if kind not in alike:
            alike[kind] = _mask(passes, groups, everything, of_pass, logits=logits, keys=len(axes) > 1)
        mask = alike[kind]
        if mask is not None:
            found[key] = mask
    return found


def _width(one: Pass) -> int:
    return one.length if one.keep is None else one.keep.shape[1]


def _mask(
    passes: Sequence[Pass],
    groups: Sequence[Sequences],
    everything: Tensor,
    of_pass: Mapping[int, int],
    *,
    logits: bool,
    keys: bool,
) -> Mask | None:
    """The mask of a value that the passes of `of_pass` gave as many positions as it says; None where these cannot be
    told."""
    positions, looked_at, row = [], [], 0
    for sequences in groups:
        rows = everything[row : row + n_rows(passes, sequences)]
        row += rows.shape[0]
        there = [piece for piece in sequences.pieces if piece.index in of_pass]
        whole = {p.index: _is_whole(passes[p.index], of_pass[p.index]) for p in there}
        first = sequences.pieces[0]
        parts = []
        if sequences.latest is not None and there and all(whole.values()):
            made = sequences.latest.made_by(whole)
            parts.append(rows[:, : made.shape[1]] & made)
            there = []
        for piece in there:
            one = passes[piece.index]
            if whole[piece.index] and piece.stop <= piece.start:
                continue
            at = one.columns(of_pass[piece.index], logits=logits)
            if at is None:
                return None
            at = at[:, piece.start : piece.stop] if whole[piece.index] else at
            # One more than the column, so that the zeros of rows that are absent mean none.
            at = piece.of(torch.where(at >= 0, at + one.past - passes[first.index].past, -1) + 1) - 1
            parts.append((at >= 0) & (at < rows.shape[1]) & rows.gather(1, at.clamp(0, rows.shape[1] - 1)))
        if parts:
            positions.append(torch.cat(parts, 1))
            if keys:
                end = max(passes[p.index].end for p in sequences.pieces if p.index in of_pass)
                seen = with_earlier(passes, [sequences], rows)
                looked_at.append(seen[:, :end] if seen.shape[1] >= end else pad_axis(seen, 1, end))
    if not positions:
        return None
    return Mask(join_tensors(positions), join_tensors(looked_at) if keys else None)


def _is_whole(one: Pass, width: int) -> bool:
    return one.keep is None and width == one.length
