"""Which columns of which projection are the queries, keys and values of which head, by what a change of them changes.

The same prompt is run many times side by side, and what the projections of a block's attention return is replaced by
numbers that are the same in every row, but for one thing: in each row a few neighbouring columns of one projection
change places at one position. Compared with the first row, in which nothing changes places,

- queries change the probabilities of that position, and of no other;
- keys change those of other positions too;
- values change no probabilities, but what attention makes at other positions;
- a gate changes only what it makes at that position.

The heads in which that is seen are the heads of the columns. Columns of a projection behind which another one follows
change nothing, since what that one returns is replaced too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actcache.model.attention_sites import Attention
from actcache.model.columns import Columns
from actcache.model.forms import first_input
from actcache.model.offload import is_dispatched
from actcache.model.probabilities import Probabilities, Telling
from actcache.model.probe import of_this_thread, probe_inputs
from actcache.model.structure import descend

if TYPE_CHECKING:
    from actcache.model.anatomy import Anatomy

# Tokens of the prompt, at least and at most, and the position at which columns change places: some lie before it, some
# behind.
_LEAST, TOKENS, _POSITION = 3, 6, 2
# Rows of one pass.
_ROWS = 256
# Sizes of the numbers that are put in place: where scores are scaled down they are too small to be told from rounding,
# where they are not scaled at all too large for more than one key to count.
_SIZES = (1.0, 4.0, 0.25)
# Changes by more than so many units of rounding are changes. What other columns do can show by some units behind norms
# over all heads; in half precision it mostly shows by none, and what is looked for by few. What is found has to fit
# together, so that the right level shows.
_UNITS, _HALF_UNITS = (64.0, 1024.0), (1e-3, 1.0, 4.0)
_NAMES = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True)
class Part:
    """Queries, keys or values: the module (its path in the block) that returns them, and their columns."""

    path: str
    columns: Columns


@dataclass
class Roles:
    """What the columns of one attention's projections are.

    Attributes:
        parts: by site name ("q", "k", "v").
        absent: of those that are not there, why.
        gated: whether something multiplies what attention makes of the values.
        told: whether the heads of what attention makes are in turn, as queries show it.
        unclear: which are absent for want of an effect that could be told from others.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    told: bool = False
    unclear: bool = False

    @classmethod
    def none(cls, why: str) -> Roles:
        """Nothing is known, for the reason `why`."""
        return cls(absent=dict.fromkeys(_NAMES, why))


@dataclass(frozen=True)
class Subject:
    """A block whose attention is to be looked at, with the widths of what its projections return."""

    block: nn.Module
    attention: Attention
    heads: int
    width: int
    widths: tuple[tuple[str, int], ...]

    def slices(self) -> list[tuple[str, int, int]]:
        """The columns that change places together: projection, first column, first column behind."""
        found = []
        for path, width in self.widths:
            each = width // self.heads if width % self.heads == 0 else width
            step = math.gcd(self.width // self.heads, each)
            found += [(path, start, start + step) for start in range(0, width, step)]
        return found


def find_roles(anatomy: Anatomy, subjects: Sequence[Subject]) -> list[Roles]:
    """The roles of each subject. The caller has put the model by itself (`undisturbed`), without gradients."""
    context = anatomy.context_length
    if context is not None and context < _LEAST:
        why = f"its context of {context} tokens is too short to tell queries, keys and values apart"
        return [Roles.none(why) for _ in subjects]
    best = _look(anatomy, subjects, _SIZES[0])
    for size in _SIZES[1:]:
        again = [number for number, roles in enumerate(best) if roles.unclear]
        if not again:
            break
        for number, roles in zip(again, _look(anatomy, [subjects[number] for number in again], size), strict=True):
            if len(roles.parts) > len(best[number].parts):
                best[number] = roles
    return best


def _look(anatomy: Anatomy, subjects: Sequence[Subject], size: float) -> list[Roles]:
    tokens = min(TOKENS, anatomy.context_length or TOKENS)
    trials = [_Trial(subject, size, tokens) for subject in subjects]
    longest = max(len(trial.slices) for trial in trials)
    for first in range(0, longest, _ROWS):
        rows = min(_ROWS, longest - first)
        for trial in trials:
            trial.begin(first, rows)
        last = None if is_dispatched(anatomy.model) else trials[-1]
        with ExitStack() as hooks:
            for trial in trials:
                trial.listen(hooks, ends=trial is last)
            hooks.enter_context(Probabilities(Telling(trial.softmax for trial in trials)))
            with suppress(_Seen):
                anatomy.backbone(**probe_inputs(anatomy, repeated=(1 + rows, tokens)))
        for trial in trials:
            trial.compare()
    return [trial.roles() for trial in trials]


class _Seen(Exception):
    """Ends the pass: what is to be looked at has run."""


@dataclass(frozen=True)
class _Effect:
    """What a change of some columns changed: `kind` ("q", "k", "v", "gate" or ""), in which heads; `most` is the one in
    which what attention makes at the same position changed most."""

    path: str
    start: int
    stop: int
    kind: str
    heads: frozenset[int]
    most: int


class _Trial:
    """One block with its projections replaced."""

    def __init__(self, subject: Subject, size: float, tokens: int) -> None:
        self.slices = subject.slices()
        # Of one pass: its rows, in the first of which nothing changes places, and what does so in those that follow.
        self._rows = 0
        self._chosen: list[tuple[str, int, int]] = []
        self._subject = subject
        self._size = size
        self._tokens = tokens
        self._position = min(_POSITION, tokens - 2)
        self._eps = 0.0
        # Whether the attention's own code runs, and how many softmaxes it has taken.
        self._own = False
        self._taken = 0
        self._pattern: Tensor | None = None
        self._made: Tensor | None = None
        self._effects: dict[float, list[_Effect]] = {}

    def begin(self, first: int, rows: int) -> None:
        """Prepare for a pass of one row and `rows` others, which may be more than there are columns left to change."""
        self._rows = 1 + rows
        self._chosen = self.slices[first : first + rows]

    def listen(self, hooks: ExitStack, *, ends: bool) -> None:
        subject = self._subject
        making = subject.attention.making
        assert making is not None
        attention, mixed = self._module(making.module), self._module(subject.attention.mixed)
        placed = [
            self._module(path).register_forward_hook(of_this_thread(self._replacing(path, width)))
            for path, width in subject.widths
        ]
        placed += [
            attention.register_forward_pre_hook(of_this_thread(self._begin)),
            attention.register_forward_hook(of_this_thread(self._end)),
            mixed.register_forward_pre_hook(of_this_thread(self._mixed), with_kwargs=True),
        ]
        for path in making.apart:
            placed += [
                self._module(path).register_forward_pre_hook(of_this_thread(self._leave)),
                self._module(path).register_forward_hook(of_this_thread(self._return)),
            ]
        if ends:
            placed.append(subject.block.register_forward_hook(of_this_thread(self._stop)))
        for hook in placed:
            hooks.callback(hook.remove)

    def _module(self, path: str) -> nn.Module:
        return descend(self._subject.block, path.split("."))

    def _replacing(self, path: str, width: int) -> Callable[..., Any]:
        def replace(_: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or output.shape[-1] != width:
                return None
            rows, tokens = self._rows, self._tokens
            between = [size for size in output.shape[:-1] if size != 1]
            if between not in ([rows * tokens], [rows, tokens]):
                # Not for each token of each row (relative positions), or of more than there are (padded to a window).
                return None
            seed = sum(map(ord, path))
            made = torch.rand(tokens, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            # None so small that its change would be lost.
            made = (made + made.sign() * 0.5) * self._size
            new = made.to(output).expand(rows, tokens, width).clone()
            for row, (changed, start, stop) in enumerate(self._chosen, 1):
                if changed == path:
                    own = new[row, self._position, start:stop]
                    # One column alone has nowhere to go.
                    new[row, self._position, start:stop] = own.roll(1) if stop - start > 1 else -own
            return new.reshape(output.shape)

        return replace

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._own, self._taken = True, 0

    def _leave(self, module: nn.Module, args: Any) -> None:
        self._own = False

    def _return(self, module: nn.Module, args: Any, output: Any) -> None:
        self._own = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._own = False

    def softmax(self, value: Tensor) -> None:
        """Told of probabilities that were made somewhere in the pass."""
        making, heads = self._subject.attention.making, self._subject.heads
        if not self._own or making is None:
            return
        self._taken += 1
        if self._taken != making.number + 1:
            return
        if value.ndim == 3 and value.shape[0] == self._rows * heads:
            value = value.unflatten(0, (-1, heads))
        if value.ndim == 4 and value.shape[:3] == (self._rows, heads, self._tokens):
            self._pattern = value.detach().float()

    def _mixed(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        value, heads = first_input((args, kwargs)), self._subject.heads
        if value.shape[-1] == self._subject.width and value.numel() == self._rows * self._tokens * value.shape[-1]:
            self._made = value.detach().float().reshape(self._rows, self._tokens, heads, -1)
            self._eps = torch.finfo(value.dtype).eps

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        raise _Seen

    def compare(self) -> None:
        """Hold each row against the first."""
        pattern, made = self._pattern, self._made
        self._pattern = self._made = None
        if pattern is None or made is None or pattern.shape[0] != made.shape[0]:
            return
        for level in _HALF_UNITS if self._half else _UNITS:
            self._effects.setdefault(level, []).extend(self._changes(pattern, made, level * self._eps))

    def _changes(self, pattern: Tensor, made: Tensor, some: float) -> Iterator[_Effect]:
        """What each row changed by more than the share `some`."""
        scores = ((pattern - pattern[:1]).abs() > some * torch.maximum(pattern, pattern[:1])).any(-1)
        differences = (made - made[:1]).abs().amax(-1).transpose(1, 2)
        values = differences > some * made.abs().max()
        others = [position for position in range(self._tokens) if position != self._position]
        for row, (path, start, stop) in enumerate(self._chosen, 1):
            kind, seen = "", scores[row]
            if bool(scores[row][:, others].any()):
                kind = "k"
            elif bool(scores[row].any()):
                kind = "q"
            elif bool(values[row].any()):
                kind, seen = "v" if bool(values[row][:, others].any()) else "gate", values[row]
            heads = frozenset(seen.any(-1).nonzero().flatten().tolist())
            yield _Effect(path, start, stop, kind, heads, int(differences[row, :, self._position].argmax()))

    @property
    def _half(self) -> bool:
        return self._eps > 1e-4

    def roles(self) -> Roles:
        if not self._effects:
            return Roles.none(
                f"with {self._tokens} tokens its attention makes something else than a row of probabilities, and of "
                "values, for each of them"
            )
        found = [self._roles(effects) for effects in self._effects.values()]
        return max(found, key=lambda roles: len(roles.parts))

    def _roles(self, effects: list[_Effect]) -> Roles:
        found = Roles(gated=any(effect.kind == "gate" for effect in effects))
        queries = [effect for effect in effects if effect.kind == "q"]
        found.told = bool(queries) and all(effect.heads == {effect.most} for effect in queries)
        for name in _NAMES:
            own = [effect for effect in effects if effect.kind == name]
            paths = list(dict.fromkeys(effect.path for effect in own))
            if len(paths) > 1:
                made = ", ".join(paths)
                found.absent[name] = f"its {_NAMES[name]} are put together of what several modules return ({made})"
                found.unclear |= self._half
                continue
            part = self._part(name, paths[0], own) if paths else None
            if part is not None:
                found.parts[name] = part
                continue
            found.unclear = True
            found.absent[name] = (
                f"which columns of {paths[0]} are the {_NAMES[name]} of which head cannot be told"
                if paths
                else f"no projection of its attention returns {_NAMES[name]}"
            )
        return found

    def _part(self, name: str, path: str, effects: list[_Effect]) -> Part | None:
        heads = self._subject.heads
        groups: dict[frozenset[int], list[int]] = {}
        for effect in effects:
            groups.setdefault(effect.heads, []).extend(range(effect.start, effect.stop))
        ordered = sorted(groups, key=min)
        size = heads // len(ordered)
        in_turn = [frozenset(range(first, first + size)) for first in range(0, heads, size)]
        alike = len({len(columns) for columns in groups.values()}) == 1
        each = len(next(iter(groups.values())))
        fits = each == self._subject.width // heads if name == "v" else True
        if ordered != in_turn or not alike or not fits or (name == "q" and size > 1):
            return None
        width = dict(self._subject.widths)[path]
        return Part(path, Columns(tuple(tuple(sorted(groups[group])) for group in ordered), width))
