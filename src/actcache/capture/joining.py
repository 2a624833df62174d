"""From the values of many passes to one value per token: which rows and positions of which pass are taken.

Generation runs the model once per token. A pass that continues an earlier one (it is given the KV cache which that one
left, or its token ids extend those of the pass before) is a step of the same sequences; any other pass brings new
sequences. Where
`generate` made the passes, what it returned decides, and everything is held against it (`generation.Generation`).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actcache.capture.generation import Generation
from actcache.capture.padding import join_tensors, pad_front, padded
from actcache.capture.passes import Pass
from actcache.capture.pieces import Latest, Piece, agree, by_beams, in_order, left_behind
from actcache.capture.tokens import Tokens, columns_of, take_columns
from actcache.errors import SiteUnavailableError

_INSTEAD = (
    "What each pass gave is right, and is there by module path: ac.capture(model, [path]) holds one visit per step."
)
_REORDERED = (
    "rows of the KV cache were reordered between two passes, so that a row's steps belong to different sequences, and "
    "which ones is known only where the captured model's own generate() did it (capture the model that generates, not "
    f"a part of it; its custom decoding loops do not tell). {_INSTEAD}"
)
_CONTRADICTED = (
    "the passes cannot be matched to what generate() returned: this way of decoding runs other tokens, or other rows, "
    f"than those it returns. With beams, return_dict_in_generate=True may tell more. {_INSTEAD}"
)
_LEFT_BEHIND = (
    "this version of transformers exchanges the beams of this model without its recurrent state, so that from there on "
    "a row's state is another sequence's, in the search itself too. With use_cache=False both are right. "
    f"{_INSTEAD}"
)


_OTHER_KEYS = (
    "the keys of this cache lie in another order than their positions, so that which of them a number of the pattern "
    f"belongs to cannot be told. {_INSTEAD}"
)


@dataclass(frozen=True)
class Refused:
    """Stands for the value of a site that cannot be joined."""

    reason: str

    def error(self, key: str) -> SiteUnavailableError:
        return SiteUnavailableError(f"site {key!r} cannot be joined into one row per sequence: {self.reason}")


@dataclass
class Sequences:
    """Passes that are steps of the same sequences, and how they join; `refusal` says why they cannot be."""

    pieces: list[Piece]
    generation: Generation | None
    refusal: str | None = None
    latest: Latest | None = None
    """Where passes of beams ran positions again, which of them computed each one last."""


def group(
    passes: Sequence[Pass], generations: Sequence[Generation], *, steps: bool, dropped: Container[int] = ()
) -> list[Sequences]:
    """Which passes belong to the same sequences, in order, those that are `dropped` left out. Without `steps` (an
    encoder) each pass is for itself."""
    kept = [index for index in range(len(passes)) if index not in dropped]
    if not steps:
        return [Sequences([Piece(index, 0, passes[index].length)], None) for index in kept]
    return [_sequences(passes, indices, made) for indices, made in _steps(passes, generations, kept)]


def _steps(
    passes: Sequence[Pass], generations: Sequence[Generation], kept: Sequence[int]
) -> list[tuple[list[int], Generation | None]]:
    steps: list[list[int]] = []
    made_by: list[Generation | None] = []
    of_pass = {index: made for made in generations for index in range(made.start, made.stop)}
    begun: Generation | None = None
    # Of each pass, the number of the sequences that it is a step of.
    number_of: dict[int, int] = {}
    for place, index in enumerate(kept):
        one, made, last = passes[index], of_pass.get(index), kept[place - 1] if place else None
        begins, begun = made is not begun, made
        before = last
        if made is None or begins:
            before = _continued(passes, last, one)
            number = number_of.get(before, -1) if before is not None else -1
            if before is None or number < 0 or steps[number][-1] != before:
                # Others went on from there already.
                before = None
            elif not _goes_on(made_by[number], made, passes[before], one):
                before = None
        if before is None:
            number_of[index] = len(steps)
            steps.append([index])
            made_by.append(made)
        else:
            number = number_of[index] = number_of[before]
            steps[number].append(index)
            made_by[number] = made if made is not None else made_by[number]
    return list(zip(steps, made_by, strict=True))


def _continued(passes: Sequence[Pass], last: int | None, one: Pass) -> int | None:
    """Which pass this one goes on from: the one that left its cache, or the `last`, which it repeats; None for new
    sequences, and where its cache is none that a pass here left (a copy may be of any of them)."""
    if one.past:
        return one.continues
    return last if last is not None and passes[last].batch == one.batch and _extends(passes[last], one) else None


def _goes_on(earlier: Generation | None, made: Generation | None, before: Pass, one: Pass) -> bool:
    """Whether sequences go on across a call of `generate`: by a cache, and never where beams were searched, which leave
    it with other rows than those they return."""
    if (earlier is not None and earlier.beams is not None) or (made is not None and made.beams is not None):
        return False
    return made is None or 0 < one.past <= before.end


def _extends(before: Pass, one: Pass) -> bool:
    """Whether this pass repeats the one before it and adds tokens: generation without a KV cache."""
    if before.ids is None or one.ids is None or before.past or one.length <= before.length:
        return False
    return torch.equal(one.ids[:, : before.length], before.ids)


def _sequences(passes: Sequence[Pass], indices: list[int], made: Generation | None) -> Sequences:
    if len(indices) == 1 and (made is None or made.beams is None):
        return Sequences([Piece(indices[0], 0, passes[indices[0]].length)], made)
    steps = [(index, passes[index]) for index in indices]
    if made is None or made.stop <= indices[-1]:
        # Steps of the caller's own, with nothing to hold them against.
        moved = any(one.reordered for _, one in steps[1:])
        return Sequences(in_order(steps), None, _REORDERED if moved else None)
    same = all(one.batch == steps[0][1].batch for _, one in steps)
    if made.sequences is None or not same:
        return Sequences([], made, _CONTRADICTED)
    if made.beams is not None:
        for origin in dict.fromkeys((steps[0][1].end if steps[0][1].ids is None else 0, 0, steps[0][1].past)):
            pieces = by_beams(steps, made.beams, origin + made.sequences.shape[1] - made.beams.shape[1])
            if pieces and agree(passes, pieces, made.sequences, origin):
                refusal = _LEFT_BEHIND if left_behind(passes, pieces) else None
                return Sequences(pieces, made, refusal, Latest.among(passes, pieces))
        return Sequences([], made, _CONTRADICTED)
    if any(one.reordered for _, one in steps[1:]):
        return Sequences([], made, _REORDERED)
    # All tokens but the last went through the model, and with drafts some that were given up again.
    width = made.sequences.shape[1] - 1
    for origin in dict.fromkeys((steps[-1][1].end - width, 0)):
        pieces = in_order(steps, origin + width)
        if agree(passes, pieces, made.sequences, origin):
            return Sequences(pieces, made)
    return Sequences([], made, _CONTRADICTED)


def join(
    groups: Sequence[Sequences],
    passes: Sequence[Pass],
    values: dict[int, Tensor],
    axes: tuple[int, ...] = (1,),
    *,
    kept: bool = True,
) -> Tensor:
    """One value per token from the value of each pass: steps along the first of `axes`, sequences along dim 0. Where
    there is another axis (the keys of a pattern), shorter steps are padded.

    Values that hold fewer positions than their pass (kept positions, the logits of the last token) are strung together;
    without `kept` the values are those of all positions, whatever was kept of others.
    """
    axis = axes[0]
    joined = []
    for sequences in groups:
        parts = []
        there = [(piece, values[piece.index]) for piece in sequences.pieces if piece.index in values]
        if sequences.latest is not None and all(_whole(passes[p.index], v, axis, kept) for p, v in there):
            if there:
                joined.append(sequences.latest.of({piece.index: value for piece, value in there}, axes))
            continue
        for piece, value in there:
            one = passes[piece.index]
            whole = _whole(one, value, axis, kept)
            if not whole or piece.stop > piece.start:
                value = piece.of(value)
                # Where nothing is left out the value stays the tensor it is: a gradient may be asked for it.
                cut = whole and piece.stop - piece.start < one.length
                parts.append(value.narrow(axis, piece.start, piece.stop - piece.start) if cut else value)
        if parts:
            joined.append(parts[0] if len(parts) == 1 else torch.cat(padded(parts, axes[1:]), axis))
    return join_tensors(joined, axes)


def _whole(one: Pass, value: Tensor, axis: int, kept: bool) -> bool:
    """Whether a pass's value has all of its positions."""
    return not (kept and one.keep is not None) and value.ndim > axis and value.shape[axis] == one.length


def at_their_keys(value: Tensor, one: Pass, axes: tuple[int, ...]) -> Tensor | Refused:
    """The pattern of one pass with a key for every position up to the pass's end, in order.

    A cache of fixed size has room behind the end, and one with a sliding window no longer has the first positions.
    """
    queries, keys = axes
    if value.ndim <= keys or value.shape[0] != one.batch or value.shape[keys] == one.end:
        return value
    there = value.shape[keys]
    places = torch.arange(there) if there > one.end else torch.arange(one.end - there, one.end)
    at = torch.arange(one.length).expand(one.batch, -1) if one.keep is None else one.keep.cpu()
    if value.shape[queries] != at.shape[1]:
        return Refused(_OTHER_KEYS)
    # A token looks back: where one looks ahead, these are other keys than they are taken for.
    ahead = (places > (at + one.past)[..., None]) & (one.real().gather(1, at.clamp_min(0)) & (at >= 0))[..., None]
    ahead = ahead.to(value.device).view(one.batch, *[1] * (queries - 1), *ahead.shape[1:])
    if bool((value.masked_fill(~ahead, 0) != 0).any()):
        return Refused(_OTHER_KEYS)
    return value.narrow(keys, 0, one.end) if there > one.end else pad_front(value, keys, one.end)


def tokens_of(passes: Sequence[Pass], groups: Sequence[Sequences], ends: frozenset[int]) -> Tokens:
    """Token ids (None when a pass was given embeddings), mask and named positions of what the joined values hold.

    The mask leaves out padding, and whatever generation appended to a row after one of the `ends` (token ids). Both
    are None where values cannot be joined.
    """
    if any(sequences.refusal is not None for sequences in groups):
        return Tokens()
    ids = known_ids(passes, groups)
    everything = real_positions(passes, groups, ids, ends)
    names = _names_of(passes, groups)
    if all(passes[piece.index].keep is None for sequences in groups for piece in sequences.pieces):
        earlier = any(passes[sequences.pieces[0].index].past for sequences in groups)
        return Tokens(ids, everything, names, with_earlier(passes, groups, everything) if earlier else None)
    if ids is not None:
        kept = {i: _only_kept(one, one.ids) for i, one in enumerate(passes) if one.ids is not None}
        ids = join(groups, passes, kept).cpu()
    return Tokens(ids, _kept_mask(passes, groups, everything), names, with_earlier(passes, groups, everything))


def known_ids(passes: Sequence[Pass], groups: Sequence[Sequences]) -> Tensor | None:
    """The token ids of all positions of the joined values, ``[B, S]``; None where a pass did not show them."""
    used = {piece.index for sequences in groups for piece in sequences.pieces}
    known = {i: ids for i in used if (ids := passes[i].ids) is not None}
    return join(groups, passes, known, kept=False).cpu() if len(known) == len(used) else None


def real_positions(
    passes: Sequence[Pass], groups: Sequence[Sequences], ids: Tensor | None, ends: frozenset[int]
) -> Tensor:
    """The mask of all positions of the joined values, whatever was kept of them: bool ``[B, S]``."""
    everything = join(groups, passes, {i: one.real() for i, one in enumerate(passes)}, kept=False).cpu()
    row = 0
    for sequences in groups:
        rows = slice(row, row + n_rows(passes, sequences))
        row = rows.stop
        made = sequences.generation
        own = made.ends if made is not None and made.ends is not None else ends
        with_beams = made is not None and made.beams is not None
        if ids is not None and len(sequences.pieces) > 1 and own and not with_beams:
            everything[rows] &= ~_after_end(ids[rows], _prompt_length(passes, sequences), own)
    return everything


def _kept_mask(passes: Sequence[Pass], groups: Sequence[Sequences], everything: Tensor) -> Tensor:
    """The mask of the positions that are kept, out of that of all of them."""
    joined, row = [], 0
    for sequences in groups:
        start = passes[sequences.pieces[0].index].past
        rows = everything[row : row + n_rows(passes, sequences)]
        row += rows.shape[0]
        parts = []
        for piece in sequences.pieces:
            one = passes[piece.index]
            keep = torch.arange(one.length).expand(one.batch, -1) if one.keep is None else one.keep.cpu()
            at = piece.of(torch.where(keep >= 0, keep + one.past - start, -1) + 1) - 1
            there = (at >= 0) & (at < rows.shape[1])
            parts.append(there & rows.gather(1, at.clamp(0, rows.shape[1] - 1)))
        joined.append(torch.cat(parts, 1))
    return join_tensors(joined)


def with_earlier(passes: Sequence[Pass], groups: Sequence[Sequences], everything: Tensor) -> Tensor:
    """The mask of all positions, those before the first pass too: what attention looks back at."""
    joined, row = [], 0
    for sequences in groups:
        first = sequences.pieces[0]
        rows = everything[row : row + n_rows(passes, sequences)]
        row += rows.shape[0]
        joined.append(torch.cat([first.of(passes[first.index].real_before()), rows], 1))
    return join_tensors(joined)


def n_rows(passes: Sequence[Pass], sequences: Sequences) -> int:
    """How many rows the values of these passes join to."""
    first = sequences.pieces[0]
    return passes[first.index].batch if first.rows is None else len(first.rows)


def _names_of(passes: Sequence[Pass], groups: Sequence[Sequences]) -> dict[str, Tensor]:
    """Where each named position is in the joined values: the columns of every pass that gave something to them."""
    first = passes[groups[0].pieces[0].index]
    if not first.names:
        return {}
    starts = {}
    for sequences in groups:
        start = 0
        for piece in sequences.pieces:
            starts[piece.index] = start
            keep = passes[piece.index].keep
            start += keep.shape[1] if keep is not None else 0
    steps = any(len(sequences.pieces) > 1 for sequences in groups)
    names = {}
    for name, single in first.names.items():
        # One more than the column, so that the zeros of rows and columns that are absent mean none.
        columns = {
            index: torch.where(found >= 0, found + start + 1, 0)
            for index, start in starts.items()
            for found in [columns_of(passes[index].names[name])]
        }
        joined = join(groups, passes, columns) - 1
        names[name] = joined[:, 0] if single.ndim == 1 and not steps else joined
    return names


def _prompt_length(passes: Sequence[Pass], sequences: Sequences) -> int:
    steps = [passes[piece.index] for piece in sequences.pieces]
    if sequences.generation is not None and sequences.generation.prompt is not None:
        return sequences.generation.prompt
    return steps[0].length + (sum(one.length for one in steps[1:] if one.length > 1) if steps[-1].past else 0)


def _only_kept(one: Pass, values: Tensor) -> Tensor:
    return values if one.keep is None else take_columns(values, one.keep, 1)


def _after_end(ids: Tensor, prompt: int, ends: frozenset[int]) -> Tensor:
    """Positions behind the first end token that was generated: bool ``[B, S]``."""
    end = torch.isin(ids, torch.tensor(sorted(ends)))
    end[:, :prompt] = False
    return end.cumsum(1) - end.long() > 0
