"""How the residual stream runs through one block: where each part is read, and whether the parts add up.

A form is a chain of steps. Each step adds one or more branches to the stream; what comes out is the stream of the
next step, in post-norm blocks behind a norm:

- sequential (pre-norm): ``resid_pre + attn_out = resid_mid``, ``resid_mid + mlp_out = resid_post``
- parallel: ``resid_pre + attn_out + mlp_out = resid_post``
- post-norm: ``resid_mid = norm(resid_pre + attn_out)``, ``resid_post = norm(resid_mid + mlp_out)``
- mixer: ``resid_pre + mixer_out = resid_post``

A decoder with cross-attention has one more step, ``cross_attn_out``, in front of ``resid_mid``. Where something other
than attention mixes the positions and an MLP follows (Jamba), ``mixer_out`` takes the place of ``attn_out``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Side = Literal["output", "input"]
Kind = Literal["sequential", "parallel", "post-norm", "mixer"]


@dataclass(frozen=True)
class Place:
    """One value of a block: what the module at `path` (relative to the block) returned or was called with.

    `scale` is the factor with which it joins the stream; `flat` says that its rows come as ``[B * S, D]``.
    """

    path: str
    side: Side
    scale: float = 1.0
    flat: bool = False


@dataclass(frozen=True)
class Step:
    """``stream + sum(branches) = total``.

    `total` is the place of the sum (None: the block's output), `norm` the place of the stream behind it where a norm
    follows the sum (None: the sum is the stream).
    """

    branches: tuple[tuple[str, Place], ...]
    total: Place | None = None
    norm: Place | None = None

    @property
    def stream(self) -> Place | None:
        """Where the stream after this step is read; None: it is the block's output."""
        return self.norm or self.total


@dataclass(frozen=True)
class BlockForm:
    """One kind of block: its steps, in order.

    `middle` is where ``resid_mid`` is read when that is not where the last step but one leaves the stream.
    """

    kind: Kind
    steps: tuple[Step, ...]
    middle: Place | None = None

    def places(self) -> dict[str, Place]:
        """Site name -> where it is read, for the sites inside the block."""
        found = {name: place for step in self.steps for name, place in step.branches}
        if len(self.steps) > 1:
            middle = self.middle or self.steps[-2].stream
            assert middle is not None
            found["resid_mid"] = middle
        return found

    def identities(self) -> Iterator[tuple[str, Step]]:
        """Each step with what it claims, in words."""
        stream = "resid_pre"
        names = {len(self.steps): "resid_post", len(self.steps) - 1: "resid_mid"}
        for number, step in enumerate(self.steps, 1):
            made = " + ".join([stream, *(name for name, _ in step.branches)])
            name = names.get(number)
            if step.norm is not None:
                made = f"norm({made})"
                yield f"{name} = {made}" if name else made, step
            else:
                yield f"{made} = {name}" if name else made, step
            stream = name or made


@dataclass
class Call:
    """One run of a module inside a block: copies of its first tensor argument and of what it returned, as
    ``[B, S, D]``; None for values of another size. `flat` names the sides whose rows came as ``[B * S, D]``."""

    path: str
    kind: str
    begun: int
    ended: int = -1
    input: Tensor | None = None
    output: Tensor | None = None
    runs: int = 1
    flat: set[Side] = field(default_factory=set)


@dataclass
class BlockRun:
    """What one block did with one short input: its own input `pre` and output `post` ``[B, S, D]``, and every module
    that ran inside it, in order."""

    pre: Tensor
    post: Tensor
    calls: list[Call] = field(default_factory=list)

    def value(self, place: Place) -> Tensor | None:
        """What is at `place`, without its factor; None when its module did not run once."""
        for call in self.calls:
            if call.path == place.path and call.runs == 1:
                return call.output if place.side == "output" else call.input
        return None


def check_form(form: BlockForm, run: BlockRun) -> tuple[list[tuple[str, float]], str | None]:
    """Each identity of `form` with the size of its error on this run, and why it does not hold (None when all do)."""
    stream = run.pre
    errors: list[tuple[str, float]] = []
    for text, step in form.identities():
        total = run.post if step.total is None else run.value(step.total)
        found = [(run.value(place), place.scale) for _, place in step.branches]
        branches = [(tensor, scale) for tensor, scale in found if tensor is not None]
        if total is None or len(branches) < len(found):
            return errors, f"{text} cannot be checked: a module that should be read did not run once"
        holds, error = deviation(total, [(stream, 1.0), *branches])
        errors.append((text, error))
        if not holds:
            return errors, f"{text} is off by {error:.2g} of the largest value"
        stream = total
        if step.norm is not None:
            behind = run.value(step.norm)
            if behind is None:
                return errors, f"{text} cannot be checked: its norm did not run once"
            stream = behind
    if form.middle is not None:
        middle, behind = run.value(form.middle), run.value(form.steps[-2].stream or form.middle)
        if middle is None or behind is None or not torch.equal(middle, behind):
            return errors, "resid_mid is not what the last branch is computed from"
    holds, error = (True, 0.0) if stream is run.post else deviation(run.post, [(stream, 1.0)])
    return errors, None if holds else f"the block returns something else than its last norm (off by {error:.2g})"


def deviation(whole: Tensor, parts: Sequence[tuple[Tensor, float]]) -> tuple[bool, float]:
    """Whether `whole` is the sum of `parts` (tensor, factor) to within rounding, and max |difference| / max |whole|.

    Each addition, and each factor, rounds once, in the dtype of the stream, by at most half an eps of what it gives.
    So the error of an element is bounded by one eps of the sum of its parts' magnitudes, element by element: an
    outlier dimension hides nothing in the others. One part alone must be the same numbers.
    """
    if _same(whole, parts):
        return True, 0.0
    eps = max(torch.finfo(t.dtype).eps for t in (whole, *(part for part, _ in parts)))
    wide = whole.double()
    error, size = -wide, wide.abs()
    largest = float(size.max())
    for part, factor in parts:
        scaled = part.double() if factor == 1.0 else part.double() * factor
        error = error + scaled
        size = size + scaled.abs()
    error = error.abs()
    worst = float(error.max())
    holds = math.isfinite(worst) and bool((error <= eps * (len(parts) - 1) * size).all())
    return holds, worst / max(largest, 1e-300)


def _same(whole: Tensor, parts: Sequence[tuple[Tensor, float]]) -> bool:
    """Whether adding the parts as they are, in either order, gives `whole` bit for bit."""
    first, *rest = (part if factor == 1.0 else part * factor for part, factor in parts)
    if not rest:
        return torch.equal(first, whole)
    if torch.equal(sum(rest, first), whole):
        return True
    return len(rest) > 1 and torch.equal(first + sum(rest[1:], rest[0]), whole)


def first_tensor(output: Any) -> Tensor:
    """The hidden-state tensor of what a module returned: blocks and attention return it bare or first in a tuple,
    depending on the version of transformers."""
    while not isinstance(output, Tensor):
        if isinstance(output, dict):
            output = next(iter(output.values()))
        else:
            output = output[0]
    return output


def first_input(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The hidden-state tensor a module was called with: its first tensor argument, positional or by keyword."""
    args, kwargs = call
    if args and isinstance(args[0], Tensor):
        return args[0]
    if "hidden_states" in kwargs:
        hidden = kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return hidden
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
