"""The passes of each stack of a model, and how values of theirs become one value per token.

An encoder and a decoder have tokens of their own, and generation runs the encoder once and by itself: each of them has
its own passes. Any other model has one stack, None.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.attempts import Attempts
from actcache.capture.generation import Watch, end_tokens
from actcache.capture.joining import Refused, Sequences, at_their_keys, group, join, n_rows, tokens_of
from actcache.capture.own_masks import Widths, own_masks
from actcache.capture.padding import join_tensors
from actcache.capture.passes import Passes
from actcache.capture.shown import Shown, shown_by
from actcache.capture.tokens import Mask, Tables, Tokens, unless_alike
from actcache.model.anatomy import Anatomy
from actcache.model.sites import Site
from actcache.model.structure import descend


class Track:
    """The passes of one stack, those of `path` and what it holds."""

    def __init__(self, positions: Any, path: str = "", *, generates: bool = True, shown: Shown | None = None) -> None:
        self.passes = Passes(positions, shown)
        self.path = path
        self._generates = generates
        self._groups: tuple[tuple[int, ...], list[Sequences]] = (), []

    @property
    def state(self) -> tuple[int, ...]:
        """Changes whenever values might join in another way."""
        passes = self.passes
        return len(passes.passes), len(passes.generations), len(passes.dropped)

    def sequences(self) -> list[Sequences]:
        if self._groups[0] != self.state:
            passes = self.passes
            made = group(passes.passes, passes.generations, steps=self._generates, dropped=passes.dropped)
            self._groups = self.state, made
        return self._groups[1]

    def joined(self, values: Iterable[tuple[int, Tensor]], axes: tuple[int, ...]) -> Tensor | Refused | None:
        """One value out of pairs of a pass's index and its value; `axes` are its positions. None where all of them come
        from passes that failed."""
        dropped = self.passes.dropped
        # A block that runs again in the same pass (recomputed for the gradient) gave the same value already.
        first: dict[int, Tensor] = {}
        for index, value in values:
            if index not in dropped:
                first.setdefault(index, value)
        if not first:
            return None
        if self.passes.passes and min(first) < 0:
            return Refused("some passes show their tokens, and others do not. Capture them in blocks of their own.")
        if len(axes) > 1 and self.passes.passes:
            for index, value in first.items():
                placed = at_their_keys(value, self.passes.passes[index], axes)
                if isinstance(placed, Refused):
                    return placed
                first[index] = placed
        # Nothing to join is by far the most frequent case.
        if not self.passes.passes or (len(first) == 1 and not self.passes.generations):
            return join_tensors(list(first.values()), axes)
        groups = self.sequences()
        refusal = next((one.refusal for one in groups if one.refusal is not None), None)
        return join(groups, self.passes.passes, first, axes) if refusal is None else Refused(refusal)


class Tracks:
    """The tracks of one capture block. `asked`: the stacks that something is captured of, the only ones whose positions
    are chosen; None for any."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy | None, positions: Any, asked: Collection[str | None] | None = None
    ) -> None:
        # Asked for their end tokens when somebody asks for tokens: most blocks never do.
        self._configs = [getattr(model, name, None) for name in ("generation_config", "config")]
        self._shown = shown_by(model, anatomy)
        stacks = anatomy.structure.stacks if anatomy is not None else ()
        if len(stacks) == 2:
            first, second = stacks
            paths = [stack.blocks.rpartition(".")[0] for stack in stacks]
            # Logits have no stack, and belong to the last.
            names = None if asked is None else {second.name if name is None else name for name in asked}
            chosen = [positions if names is None or stack.name in names else "all" for stack in stacks]
            self._of = {
                first.name: Track(chosen[0], paths[0], generates=False, shown=self._shown),
                second.name: Track(chosen[1], paths[1]),
            }
        else:
            self._of = {None: Track(positions, shown=self._shown)}
        self._last = next(reversed(self._of.values()))

    def of(self, site: Site) -> Track:
        return self._of.get(site.stack, self._last)

    def of_module(self, path: str) -> Track | None:
        """The track of a module; None for one whose call begins before that of the stack that it holds."""
        if len(self._of) == 1:
            return self._last
        for track in self._of.values():
            if path == track.path or path.startswith(f"{track.path}."):
                return track
        return None if any(_holds(path, track.path) for track in self._of.values()) else self._last

    def listeners(self, tops: list[nn.Module], *, whole: bool) -> list[tuple[nn.Module, Any]]:
        """What to put on the modules with which passes begin: the last of `tops` (the backbone), with `whole` the first
        too (the model, whose inputs are to be cut before its backbone is called), or each of two stacks."""
        found = [] if self._shown is None else self._shown.listeners(tops)
        if len(self._of) == 1:
            return found + self._last.passes.listeners([tops[0], tops[-1]] if whole else tops[-1:])
        for track in self._of.values():
            found += track.passes.listeners([descend(tops[0], track.path.split(".") if track.path else ())])
        return found

    def watch(self, tops: list[nn.Module]) -> Watch:
        """Begin to watch the `generate` of every module that may run the backbone."""
        return Watch(tops, self._last.passes)

    def tokens(self, sites: Iterable[str]) -> Tables:
        """Token ids and mask of the passes so far, by stack; first the stack which `sites` are of (the encoder's where
        they are of both: its tokens are the prompts)."""
        ends = _end_tokens(self._configs)
        tables = {
            name: tokens_of(track.passes.passes, groups, ends) if (groups := track.sequences()) else Tokens()
            for name, track in self._of.items()
        }
        if len(tables) > 1 and tables["decoder"].mask is not None:
            tables["decoder"] = tables["decoder"]._replace(prompts=self._prompts())
        asked = {Site.parse(key).stack for key in sites}
        if asked and "encoder" not in asked:
            return dict(reversed(tables.items()))
        return tables

    def masks(self, widths: Mapping[str, Widths]) -> dict[str, Mask]:
        """The masks of the sites, by key, that these tokens do not describe."""
        by_track: dict[Track, dict[str, Widths]] = {}
        for key, given in widths.items():
            by_track.setdefault(self.of(Site.parse(key)), {})[key] = given
        ends, found = _end_tokens(self._configs), dict[str, Mask]()
        for track, mine in by_track.items():
            found |= own_masks(track.passes.passes, track.sequences(), ends, mine)
        return found

    def attempts(self) -> Attempts:
        """What to put on the model itself, which tells whose passes failed."""
        return Attempts([track.passes for track in self._of.values()])

    def left_out(self) -> int:
        """How many passes count for nothing, since an exception ended them while others ran to their end."""
        return max(len(track.passes.dropped) for track in self._of.values())

    def _prompts(self) -> Tensor | None:
        """Which row of the encoder's each row of the decoder's goes on from: sequences of one prompt lie together."""
        counts = [
            [n_rows(track.passes.passes, sequences) for sequences in track.sequences()] for track in self._of.values()
        ]
        rows, start = [], 0
        if len(counts[0]) == len(counts[1]):
            for encoded, decoded in zip(*counts, strict=True):
                if decoded % encoded:
                    return None
                rows.append(torch.arange(start, start + encoded).repeat_interleave(decoded // encoded))
                start += encoded
        return unless_alike(torch.cat(rows)) if rows else None


def way_to_backbone(model: nn.Module, anatomy: Anatomy | None) -> list[nn.Module]:
    """The model, the modules on the way to its backbone, and the backbone; without an anatomy only the model."""
    found = [model]
    path = anatomy.structure.backbone if anatomy is not None else ""
    for name in path.split(".") if path else ():
        found.append(descend(found[-1], (name,)))
    return found


def _holds(path: str, inner: str) -> bool:
    return path == "" or inner.startswith(f"{path}.")


def _end_tokens(configs: Iterable[Any]) -> frozenset[int]:
    for holder in configs:
        end = getattr(holder, "eos_token_id", None)
        if end is not None:
            return end_tokens(end)
    return frozenset()
