"""The passes of each stack of a model, and how values of theirs become one value per token.

An encoder and a decoder have tokens of their own, and generation runs the encoder once and by itself: each of them has
its own passes. Any other model has one stack, None.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from actcache.capture.generation import Watch, end_tokens
from actcache.capture.joining import Refused, Sequences, group, join, join_batches, tokens_of
from actcache.capture.passes import Passes
from actcache.capture.tokens import Tables, Tokens
from actcache.model.anatomy import Anatomy
from actcache.model.sites import Site
from actcache.model.structure import descend


class Track:
    """The passes of one stack, those of `path` and what it holds."""

    def __init__(self, positions: Any, path: str = "", *, generates: bool = True) -> None:
        self.passes = Passes(positions)
        self.path = path
        self._generates = generates
        self._groups: tuple[tuple[int, int], list[Sequences]] = (0, 0), []

    @property
    def state(self) -> tuple[int, int]:
        """Changes whenever values might join in another way."""
        return len(self.passes.passes), len(self.passes.generations)

    def sequences(self) -> list[Sequences]:
        if self._groups[0] != self.state:
            passes, generations = self.passes.passes, self.passes.generations
            self._groups = self.state, group(passes, generations, steps=self._generates)
        return self._groups[1]

    def joined(self, values: Iterable[tuple[int, Tensor]]) -> Tensor | Refused:
        """One value out of pairs of a pass's index and its value."""
        # A block that runs again in the same pass (recomputed for the gradient) gave the same value already.
        first: dict[int, Tensor] = {}
        for index, value in values:
            first.setdefault(index, value)
        # Nothing to join is by far the most frequent case.
        if not self.passes.passes or (len(first) == 1 and not self.passes.generations):
            return join_batches(list(first.values()))
        groups = self.sequences()
        refusal = next((one.refusal for one in groups if one.refusal is not None), None)
        return join(groups, self.passes.passes, first) if refusal is None else Refused(refusal)


class Tracks:
    """The tracks of one capture block."""

    def __init__(self, model: nn.Module, anatomy: Anatomy | None, positions: Any) -> None:
        self._ends = _end_tokens(model)
        stacks = anatomy.structure.stacks if anatomy is not None else ()
        if len(stacks) == 2:
            paths = [stack.blocks.rpartition(".")[0] for stack in stacks]
            self._of = {
                stacks[0].name: Track(positions, paths[0], generates=False),
                stacks[1].name: Track(positions, paths[1]),
            }
        else:
            self._of = {None: Track(positions)}
        self._last = next(reversed(self._of.values()))

    def of(self, site: Site) -> Track:
        # Logits have no stack, and belong to the last.
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
        if len(self._of) == 1:
            return self._last.passes.listeners([tops[0], tops[-1]] if whole else tops[-1:])
        found: list[tuple[nn.Module, Any]] = []
        for track in self._of.values():
            found += track.passes.listeners([descend(tops[0], track.path.split(".") if track.path else ())])
        return found

    def watch(self, tops: list[nn.Module]) -> Watch:
        """Begin to watch the `generate` of every module that may run the backbone."""
        return Watch(tops, self._last.passes)

    def tokens(self, sites: Iterable[str]) -> Tables:
        """Token ids and mask of the passes so far, by stack; first the stack which `sites` are of (the encoder's where
        they are of both: its tokens are the prompts)."""
        tables = {
            name: tokens_of(track.passes.passes, track.sequences(), self._ends) if track.passes.passes else Tokens()
            for name, track in self._of.items()
        }
        asked = {Site.parse(key).stack for key in sites}
        if asked and "encoder" not in asked:
            return dict(reversed(tables.items()))
        return tables


def way_to_backbone(model: nn.Module, anatomy: Anatomy | None) -> list[nn.Module]:
    """The model, the modules on the way to its backbone, and the backbone; without an anatomy only the model."""
    found = [model]
    path = anatomy.structure.backbone if anatomy is not None else ""
    for name in path.split(".") if path else ():
        found.append(descend(found[-1], (name,)))
    return found


def _holds(path: str, inner: str) -> bool:
    return path == "" or inner.startswith(f"{path}.")


def _end_tokens(model: nn.Module) -> frozenset[int]:
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        end = getattr(holder, "eos_token_id", None)
        if end is not None:
            return end_tokens(end)
    return frozenset()
