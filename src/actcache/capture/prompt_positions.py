"""Where the positions of an edit are in the pass that is running.

Positions are those of what the caller hands over. In a call of the model that is the sequence as of that call: the
tokens in its KV cache, whose positions are done, and the new ones. In a call of `generate` it is the prompt, with and
without a KV cache, and however many beams each prompt has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.generation import Generation, Watch
from actcache.capture.media import needs_ids, on_model, told_by_ids
from actcache.capture.passes import Pass, Passes, argument_names
from actcache.capture.positions import each_prompt, resolve_positions
from actcache.capture.shown import shown_by
from actcache.capture.stacks import way_to_backbone
from actcache.errors import EditError, OptionError
from actcache.model.anatomy import Anatomy
from actcache.model.structure import descend


@dataclass(frozen=True)
class Chosen:
    """Positions of one pass: element ``i`` is position ``at[i]`` of row ``rows[i]``, which is the ``number[i]``-th one
    that was asked for of prompt ``prompts[i]``."""

    rows: Tensor
    at: Tensor
    number: Tensor
    prompts: Tensor
    counts: tuple[int, ...]
    """How many positions were asked for of each prompt."""
    beams: bool
    """Whether several prompts, one below the other, may be the beams of one: in generation."""
    asked: tuple[Tensor, ...]
    """Of each row, the columns that were asked for, counted from the first token in the KV cache."""
    keys: tuple[Tensor, ...]
    """Of each row, the columns of the prompt's real tokens, counted in the same way."""
    end: int
    """How many columns there are after this pass."""

    def key_columns(self, columns: Tensor, n_keys: int) -> Tensor:
        """Which of `n_keys` keys these columns are, -1 for those that were let go (a sliding window keeps the last
        ones only)."""
        first = max(self.end - n_keys, 0)
        return torch.where(columns >= first, columns - first, -1)


@dataclass
class _Running:
    """The passes of one stack."""

    passes: Passes
    known: bool = False
    first: Pass | None = None
    """The pass in which `generate` ran the prompt; None outside of it."""
    chosen: dict[str, Chosen] = field(default_factory=dict)


class PromptPositions:
    """Follows the passes of a model while an edit needs to know them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        self._model = model
        self._shown = shown_by(model, anatomy)
        self.forget()
        stacks = anatomy.structure.stacks if anatomy is not None else ()
        if anatomy is not None and len(stacks) == 2:
            self._paths = {stack.name: stack.blocks.rpartition(".")[0] for stack in stacks}
        else:
            self._paths = {None: anatomy.structure.backbone if anatomy is not None else ""}
        self._last = next(reversed(self._paths))
        self._generating = way_to_backbone(model, anatomy)
        self._begins = [(descend(model, path.split(".") if path else ()), stack) for stack, path in self._paths.items()]

    def forget(self) -> None:
        """Start anew: nothing has run yet."""
        self._stacks: dict[str | None, _Running] = {}
        # Calls of `generate` that are running, and the tokens of the outermost one's prompt.
        self._depth = 0
        self._prompt: int | None = None

    def state(self) -> Callable[[], AbstractContextManager[None]]:
        """What brings back, for a while, the pass that is running now."""
        noted = _copied(self._stacks)

        @contextmanager
        def brought_back() -> Iterator[None]:
            now, self._stacks = self._stacks, _copied(noted)
            try:
                yield
            finally:
                self._stacks = now

        return brought_back

    def listeners(self) -> list[tuple[nn.Module, Any]]:
        """What to put on the modules with which passes begin."""
        shown = [] if self._shown is None else self._shown.listeners(self._generating)
        return shown + [(module, _Begins(self, stack, module)) for module, stack in self._begins]

    def watch(self) -> Watch:
        """Begin to watch `generate`."""
        return Watch(self._generating, self)

    def stack_of(self, path: str) -> str | None:
        """The stack that holds a module; the last one (of an encoder-decoder, the decoder) for one that none holds."""
        inside = (stack for stack, own in self._paths.items() if own == "" or f"{path}.".startswith(f"{own}."))
        return next(inside, self._last)

    def find(self, positions: Any, stack: str | None, value: Tensor, target: str) -> Chosen:
        """Where `positions` are in `value` ``[B, S, ...]`` of the pass that is running.

        Raises `LayerRangeError` for a position outside a prompt, `EditError` where positions cannot be told.
        """
        running, one, missing = self._pass_of(stack, value, f"the positions of an edit of {target!r}")
        key = f"{positions!r}"
        if key not in running.chosen:
            running.chosen[key] = self._choose(positions, running, one)
        chosen = running.chosen[key]
        if not missing:
            return chosen
        there = chosen.at >= missing
        return replace(
            chosen,
            rows=chosen.rows[there],
            at=chosen.at[there] - missing,
            number=chosen.number[there],
            prompts=chosen.prompts[there],
        )

    def real(self, stack: str | None, value: Tensor, target: str) -> Tensor:
        """Which positions of `value` ``[B, S, ...]`` are real tokens: bool ``[B, S]`` on the CPU, or `EditError`."""
        _, one, missing = self._pass_of(stack, value, f"the positions of {target}")
        return one.real()[:, missing:]

    def number_of(self, stack: str | None, row: int, position: int) -> int:
        """Which token of its sequence a position of the running pass is, padding not counted."""
        one = self._stacks[stack if stack in self._paths else self._last].passes.passes[-1]
        return int(_real(one)[row, : one.past + position].sum())

    def _pass_of(self, stack: str | None, value: Tensor, what: str) -> tuple[_Running, Pass, int]:
        """The pass that is running, and how many of its first positions `value` lacks."""
        running = self._stacks.get(stack if stack in self._paths else self._last)
        one = running.passes.passes[-1] if running is not None and running.known else None
        rows, length = value.shape[:2] if value.ndim > 1 else (0, 0)
        # In generation logits are computed for the last positions only.
        missing = 0 if one is None else one.length - length
        if running is None or one is None or rows != one.batch or missing < 0 or (missing and not self._depth):
            given = (
                "this pass shows no token ids" if one is None else f"this pass has {one.batch} x {one.length} tokens"
            )
            raise EditError(
                f"{what} cannot be told: {given}, and the value is {list(value.shape)}. Leave positions out to edit "
                "all of them."
            )
        return running, one, missing

    def _choose(self, positions: Any, running: _Running, one: Pass) -> Chosen:
        first = running.first
        real = self._prompt_of(first) if first is not None else _real(one)
        if one.batch % real.shape[0]:
            raise EditError(f"a pass of {one.batch} rows does not continue one of {real.shape[0]} rows")
        if needs_ids(positions):
            positions = self._told(positions, real, one if first is None else first)
        listed = isinstance(positions, list) and bool(positions) and all(isinstance(p, list) for p in positions)
        # In generation a prompt has a row for each of its beams, one below the other.
        per_list = real.shape[0] // len(positions) if listed and first is not None else 1
        choices = each_prompt(positions, real.shape[0] // max(per_list, 1))
        columns, keys = [], []
        for row, here in enumerate(real):
            at = here.nonzero()[:, 0]
            keys.append(at)
            columns.append(at[resolve_positions(choices[row // max(per_list, 1)], len(at))])
        repeat = one.batch // real.shape[0]
        rows, ats, numbers, prompts = [], [], [], []
        for row in range(one.batch):
            at = columns[row // repeat] - one.past
            number = ((at >= 0) & (at < one.length)).nonzero()[:, 0]
            ats.append(at[number])
            numbers.append(number)
            rows.append(torch.full_like(number, row))
            prompts.append(torch.full_like(number, row // repeat))
        return Chosen(
            torch.cat(rows),
            torch.cat(ats),
            torch.cat(numbers),
            torch.cat(prompts),
            tuple(map(len, columns)),
            first is not None,
            tuple(columns[row // repeat] for row in range(one.batch)),
            tuple(keys[row // repeat] for row in range(one.batch)),
            one.end,
        )

    def _told(self, positions: Any, real: Tensor, one: Pass) -> Any:
        """`positions` in numbers, of prompts whose real positions are `real` and which `one` runs from their start."""
        if one.past:
            raise EditError("tokens_of is told by all token ids of a prompt, and some of them are in the KV cache only")
        one.real_ids()
        assert one.ids is not None
        ids = one.ids.cpu()[:, : real.shape[1]]
        return told_by_ids(on_model(positions, self._model), [row[here] for row, here in zip(ids, real, strict=True)])

    # -- told by the modules with which passes begin, and by `generate`

    def began(self, stack: str | None, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
        if stack not in self._stacks:
            self._stacks[stack] = _Running(Passes("all", self._shown if stack != "decoder" else None))
        running = self._stacks[stack]
        passes = running.passes
        inside = passes.running
        started = passes.start(args, given)
        if not inside:
            running.known = started
            running.chosen = {}
        if started:
            one = passes.passes[-1]
            # An edit may stay for thousands of passes; the last one is what positions are told by.
            del passes.passes[:-1]
            if self._depth and running.first is None:
                running.first = one
        return started

    def finished(self, stack: str | None, output: Any) -> None:
        self._stacks[stack].passes.finish(output)

    def _prompt_of(self, one: Pass) -> Tensor:
        """Which positions of the prompt are real, told by the pass that ran it."""
        prompt = self._prompt
        if prompt is None:
            return _real(one)
        if one.end < prompt:
            raise EditError(
                f"generate runs the {prompt} tokens of its prompt in chunks of {one.length}, so that positions of the "
                "prompt cannot be told: leave prefill_chunk_size out, or edit all positions"
            )
        # A draft model's tokens may come in the same pass. Embeddings have what was put in front of the prompt.
        return _real(one) if one.ids is None else _real(one)[:, :prompt]

    def begins(self, prompt: int | None) -> None:
        if self._depth == 0:
            self._prompt = prompt
            self._end_of_prompt()
        self._depth += 1

    def noted(self) -> int:
        return 0

    def generated(self, generation: Generation) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._end_of_prompt()

    def _end_of_prompt(self) -> None:
        for running in self._stacks.values():
            running.first = None


def _copied(stacks: dict[str | None, _Running]) -> dict[str | None, _Running]:
    return {stack: replace(running, passes=running.passes.copy()) for stack, running in stacks.items()}


class _Begins:
    """A listener on a module with which passes of a stack begin."""

    __slots__ = ("_names", "_positions", "_stack")

    def __init__(self, positions: PromptPositions, stack: str | None, module: nn.Module) -> None:
        self._positions = positions
        self._stack = stack
        forward: Callable[..., Any] = type(module).forward
        self._names = argument_names(forward)

    def begin(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        args, kwargs = inputs
        return self._positions.began(self._stack, args, {**dict(zip(self._names, args, strict=False)), **kwargs})

    def end(self, token: bool, output: Any) -> None:
        if token:
            self._positions.finished(self._stack, output)

    def fail(self, token: bool) -> None:
        if token:
            self._positions.finished(self._stack, None)


def _real(one: Pass) -> Tensor:
    """Which positions up to the end of a pass are real, bool ``[B, past + S]`` on the CPU."""
    if one.mask is None:
        return torch.ones(one.batch, one.end, dtype=torch.bool)
    if one.mask.shape[1] != one.end:
        raise OptionError(
            f"positions cannot be told: the attention mask covers {one.mask.shape[1]} positions, and there are "
            f"{one.end} ({one.past} in the KV cache). Pass a mask over all of them."
        )
    return one.mask.to(device="cpu", dtype=torch.bool)
