"""Which rows and positions of each pass the joined value of several passes is made of."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from actcache.capture.padding import pad_axis
from actcache.capture.passes import Pass


@dataclass
class Piece:
    """What one pass gives to the joined value: its positions ``start .. stop - 1``.

    `rows` ``[N]`` are the rows that are taken (None: all, in order), `absent` ``[N]`` those that had ended.
    """

    index: int
    start: int
    stop: int
    rows: Tensor | None = None
    absent: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """The rows of one pass's value, zero where absent."""
        if self.rows is None:
            return value
        taken = value[self.rows.to(value.device)]
        if self.absent is not None:
            taken[self.absent.to(value.device)] = 0
        return taken


def in_order(steps: list[tuple[int, Pass]], limit: int | None = None) -> list[Piece]:
    """Row after row as they are, up to position `limit`. A pass whose cache was cut back (a rejected draft) replaces
    what it takes back; one that runs everything again replaces all."""
    pieces: list[Piece] = []
    for index, one in steps:
        for piece, (_, earlier) in zip(reversed(pieces), reversed(steps[: len(pieces)]), strict=True):
            if earlier.past + piece.stop <= one.past:
                break
            piece.stop = max(one.past - earlier.past, piece.start)
        stop = one.length if limit is None else min(one.length, max(limit - one.past, 0))
        pieces.append(Piece(index, 0, stop))
    return pieces


def by_beams(steps: list[tuple[int, Pass]], beams: Tensor, prompt: int) -> list[Piece]:
    """What each pass ran, in the rows from which the returned sequences come; `Latest` says where a later one ran the
    same again."""
    pieces: list[Piece] = []
    for index, one in steps:
        step = max(one.end - prompt, 0)
        if step >= beams.shape[1]:
            # The search went on, and nothing of that was returned.
            break
        rows = beams[:, step].long()
        if bool((rows >= one.batch).any()):
            return []
        pieces.append(Piece(index, 0, one.length, rows.clamp_min(0), rows < 0))
    return pieces


class Latest:
    """Which pass computed each position of each returned sequence last, where beams were searched and passes ran
    positions again that others had run: without a KV cache, or when the model let go of it to begin anew.

    A sequence that had ended by then keeps what the passes before made of it.
    """

    def __init__(self, passes: Sequence[Pass], pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._first = passes[pieces[0].index].past
        stop = max(passes[piece.index].end for piece in pieces)
        # Of each piece, its columns in what is joined, and those of its own that come before it.
        self._columns: list[tuple[slice, int]] = []
        rows = pieces[0].rows
        assert rows is not None
        self._number = torch.full((len(rows), stop - self._first), -1)
        for number, piece in enumerate(pieces):
            one = passes[piece.index]
            before = max(self._first - one.past, 0)
            columns = slice(one.past + before - self._first, one.end - self._first)
            self._columns.append((columns, before))
            there = torch.ones(len(rows), dtype=torch.bool) if piece.absent is None else ~piece.absent.cpu()
            self._number[there, columns] = number

    @classmethod
    def among(cls, passes: Sequence[Pass], pieces: Sequence[Piece]) -> Latest | None:
        """None where every pass adds to those before it."""
        steps = [passes[piece.index] for piece in pieces]
        return cls(passes, pieces) if any(one.past < before.end for before, one in pairwise(steps)) else None

    def made_by(self, indices: Container[int]) -> Tensor:
        """Which positions of which sequences these passes computed last: bool ``[N, n]``."""
        numbers = [number for number, piece in enumerate(self._pieces) if piece.index in indices]
        return torch.isin(self._number, torch.tensor(numbers, dtype=torch.long))

    def of(self, values: Mapping[int, Tensor], axes: tuple[int, ...]) -> Tensor:
        """One value out of that of each pass; shorter ones are padded along the axes behind the first."""
        some = next(iter(values.values()))
        shape = [self._number.shape[0], *some.shape[1:]]
        shape[axes[0]] = self._number.shape[1]
        for axis in axes[1:]:
            shape[axis] = max(value.shape[axis] for value in values.values())
        made = some.new_zeros(shape)
        by_position = made.movedim(axes[0], 1)
        for number, (piece, (columns, before)) in enumerate(zip(self._pieces, self._columns, strict=True)):
            if piece.index in values:
                value = piece.of(values[piece.index])
                for axis in axes[1:]:
                    value = pad_axis(value, axis, shape[axis])
                mine = (self._number[:, columns] == number).to(value.device)
                by_position[:, columns][mine] = value.movedim(axes[0], 1)[:, before:][mine]
        return made


def left_behind(passes: Sequence[Pass], pieces: Sequence[Piece]) -> bool:
    """Whether a sequence went on in another row of a cache whose rows were not exchanged."""
    for before, piece in pairwise(pieces):
        if passes[piece.index].reordered is False and before.rows is not None and piece.rows is not None:
            moved = before.rows != piece.rows
            if bool((moved if piece.absent is None else moved & ~piece.absent).any()):
                return True
    return False


def agree(passes: Sequence[Pass], pieces: Sequence[Piece], sequences: Tensor, origin: int) -> bool:
    """Whether the tokens that went through the model are those of the returned sequences, whose first column is
    position `origin`."""
    for piece in pieces:
        one = passes[piece.index]
        first = max(piece.start, origin - one.past)
        if one.ids is None or first >= piece.stop:
            continue
        seen = piece.of(one.ids)[:, first : piece.stop]
        returned = sequences[:, one.past + first - origin : one.past + piece.stop - origin].to(seen.device)
        if seen.shape != returned.shape:
            return False
        different = seen != returned
        if piece.absent is not None:
            different &= ~piece.absent.to(seen.device)[:, None]
        if bool(different.any()):
            return False
    return True
