"""The forward passes inside one capture block: what each was given, which tokens are kept, how steps join.

Generation runs the model once per token. A pass that continues the one before it (its KV cache holds earlier
positions, or its token ids extend them) is a step of the same sequences; any other pass brings new sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from actcache.capture.positions import each_prompt, resolve_positions
from actcache.capture.values import kv_length

_ID_NAMES = ("input_ids", "decoder_input_ids", "inputs_embeds")


@dataclass
class Pass:
    """One run of the backbone: token ids ``[B, S]`` (None when it was given embeddings), the mask over all positions
    so far ``[B, past + S]`` (None: all real), and how many positions came before."""

    ids: Tensor | None
    mask: Tensor | None
    batch: int
    length: int
    past: int
    keep: Tensor | None = None
    """Kept positions ``[B, n]`` of this pass, -1 where a prompt keeps fewer than others; None keeps all."""

    def real(self) -> Tensor:
        """Which of this pass's positions are real: bool ``[B, S]``."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool)
        return self.mask[:, -self.length :].to(device="cpu", dtype=torch.bool)


class Passes:
    """Notes each pass, and cuts values down to the positions asked for."""

    def __init__(self, positions: Any) -> None:
        self.passes: list[Pass] = []
        self._positions = None if isinstance(positions, str) and positions == "all" else positions
        self._open = False

    def listeners(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, _PassListener]]:
        """What to put on the modules with which a pass may begin: a call inside a call is the same pass."""
        return [(module, _PassListener(self, module)) for module in {id(m): m for m in modules}.values()]

    @property
    def current(self) -> int:
        """Index of the pass that is running, -1 before the first."""
        return len(self.passes) - 1

    def start(self, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
        """Note a pass; False when it is part of one already noted, or what it was given shows no tokens."""
        if self._open:
            return False
        tokens = next((t for name in _ID_NAMES if isinstance(t := given.get(name), Tensor)), None)
        if tokens is None:
            tokens = next((t for t in args if isinstance(t, Tensor)), None)
        if tokens is None or tokens.ndim < 2:
            return False
        mask = given.get("attention_mask")
        one = Pass(
            ids=None if tokens.is_floating_point() else tokens.detach().clone(),
            mask=mask.detach().clone() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            batch=tokens.shape[0],
            length=tokens.shape[1],
            past=kv_length(given.get("past_key_values")),
        )
        if self._positions is not None:
            one.keep = _kept(one, self._positions).to(tokens.device)
        self.passes.append(one)
        self._open = True
        return True

    def finish(self) -> None:
        self._open = False

    @property
    def cuts(self) -> bool:
        return self._positions is not None

    def cut(self, tensor: Tensor) -> Tensor:
        """The kept positions of a ``[B, S, ...]`` tensor of the running pass; other tensors are left as they are."""
        one = self.passes[-1] if self.passes else None
        if one is None or one.keep is None or tensor.shape[:2] != (one.batch, one.length):
            return tensor
        return take_positions(tensor, one.keep)


class _PassListener:
    __slots__ = ("_names", "_passes")

    def __init__(self, passes: Passes, module: nn.Module) -> None:
        self._passes = passes
        self._names = _argument_names(type(module).forward)

    def begin(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        args, kwargs = inputs
        return self._passes.start(args, {**dict(zip(self._names, args, strict=False)), **kwargs})

    def end(self, token: bool, output: Any) -> None:
        if token:
            self._passes.finish()

    def fail(self, token: bool) -> None:
        if token:
            self._passes.finish()


@cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def take_positions(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[b, index[b]]`` for every row: ``[B, S, ...]`` and ``[B, n]`` -> ``[B, n, ...]``, zero where -1."""
    index = index.to(tensor.device)
    rows = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    taken = tensor[rows, index.clamp_min(0)]
    absent = index < 0
    if bool(absent.any()):
        taken[absent] = 0
    return taken


def _kept(one: Pass, positions: Any) -> Tensor:
    rows: list[Tensor] = []
    for choice, real in zip(each_prompt(positions, one.batch), one.real(), strict=True):
        at = real.nonzero()[:, 0]
        rows.append(at[resolve_positions(choice, len(at))])
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=-1) for row in rows])


@dataclass
class Sequences:
    """Passes that are steps of the same sequences. `base` is how many positions came before the first of them."""

    steps: list[int]
    base: int


def group(passes: Sequence[Pass]) -> list[Sequences]:
    """Which passes belong to the same sequences, in order."""
    groups: list[Sequences] = []
    for index, one in enumerate(passes):
        before = passes[index - 1] if index else None
        if before is not None and before.batch == one.batch and (one.past > 0 or _extends(before, one)):
            groups[-1].steps.append(index)
        else:
            groups.append(Sequences([index], base=one.past))
    return groups


def _extends(before: Pass, one: Pass) -> bool:
    """Whether this pass repeats the one before it and adds tokens: generation without a KV cache."""
    if before.ids is None or one.ids is None or before.past or one.length <= before.length:
        return False
    return torch.equal(one.ids[:, : before.length], before.ids)


def join_steps(parts: Sequence[tuple[Pass, Tensor]], sequences: Sequences) -> Tensor:
    """One value over the steps of its sequences, along dim 1.

    A step whose cache was cut back (a rejected draft) replaces what it takes back; a step that runs everything again
    replaces all. Values that hold fewer positions than their pass (kept positions, the logits of the last token)
    are strung together.
    """
    joined: Tensor | None = None
    for one, value in parts:
        if joined is None:
            joined = value
        elif value.ndim < 2 or value.shape[1] != one.length or one.keep is not None:
            joined = torch.cat([joined, value], 1)
        else:
            before = max(one.past - sequences.base, 0)
            joined = value if before == 0 else torch.cat([joined[:, :before], value], 1)
    assert joined is not None
    return joined


def tokens_of(
    passes: Sequence[Pass], groups: Sequence[Sequences], ends: frozenset[int]
) -> tuple[Tensor | None, Tensor]:
    """Token ids (None when a pass was given embeddings) and mask of what the joined values hold: ``[B, S]`` each.

    The mask leaves out padding, and whatever generation appended to a row after one of the `ends` (token ids).
    """
    ids, masks = [], []
    for sequences in groups:
        steps = [passes[i] for i in sequences.steps]
        known = all(one.ids is not None for one in steps)
        row_ids = (
            join_steps([(one, _only_kept(one, one.ids)) for one in steps if one.ids is not None], sequences)
            if known
            else None
        )
        if steps[-1].keep is None:
            width = row_ids.shape[1] if row_ids is not None else steps[-1].past - sequences.base + steps[-1].length
            mask = steps[-1].mask
            mask = (
                torch.ones(steps[0].batch, width, dtype=torch.bool) if mask is None else mask[:, -width:].cpu().bool()
            )
        else:
            mask = join_steps([(one, one.keep >= 0) for one in steps if one.keep is not None], sequences).cpu()
        if row_ids is not None and len(steps) > 1 and ends:
            prompt = sum(one.length for one in steps if one.length > 1) if steps[-1].past else steps[0].length
            mask = mask & ~_after_end(row_ids.cpu(), prompt, ends) if steps[-1].keep is None else mask
        ids.append(row_ids)
        masks.append(mask)
    given = [one for one in ids if one is not None]
    return (join_batches(given).cpu() if len(given) == len(ids) else None), join_batches(masks)


def _only_kept(one: Pass, values: Tensor) -> Tensor:
    return values if one.keep is None else take_positions(values, one.keep)


def _after_end(ids: Tensor, prompt: int, ends: frozenset[int]) -> Tensor:
    """Positions behind the first end token that was generated: bool ``[B, S]``."""
    end = torch.isin(ids, torch.tensor(sorted(ends)))
    end[:, :prompt] = False
    return end.cumsum(1) - end.long() > 0


def join_batches(values: Sequence[Tensor]) -> Tensor:
    """Independent passes, one after the other along dim 0; shorter ones are padded on the right with zeros."""
    if len(values) == 1:
        return values[0]
    if any(v.ndim < 2 for v in values):
        return torch.cat(list(values))
    longest = max(v.shape[1] for v in values)
    padded = [
        v if v.shape[1] == longest else torch.nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1]))
        for v in values
    ]
    return torch.cat(padded)
