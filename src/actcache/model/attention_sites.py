"""The parts of a block's attention, found in one run of it by values: what its projections are given, which module
makes its output, where its probabilities are made.

What its projections return is told apart by `attention_probe`; what comes of both is held against the run in
`attention_readings`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from actcache.model.discovery import named_norm, passes_on
from actcache.model.forms import BlockForm, Place
from actcache.model.runs import InsideRun, Ran, Softmax


@dataclass(frozen=True)
class Making:
    """Where the probabilities of an attention are made: paths in the block.

    Attributes:
        module: the innermost module with weights in whose call they are made.
        apart: modules called in that call in which they are not made: of what these take the softmax is their affair.
        number: which of the softmaxes that are left they come of.
        of: how many are left.
        by_row: whether the module is given ``[B, S, D]``, by which it can be told of what it takes the softmax.
    """

    module: str
    apart: tuple[str, ...]
    number: int
    of: int
    by_row: bool


@dataclass(frozen=True)
class Attention:
    """One block's attention: paths in the block.

    Attributes:
        producer: the last projection, which makes the attention's output from the heads' values.
        mixed: the module that is given the values as the probabilities weight them: a norm between them and the
            producer, or the producer itself.
        projections: modules with weights that ran before, in order, those around others too; what they return may be
            queries, keys or values.
        given: where what the first projections are given is read; `beside` are those of them outside of that module.
        making: where its probabilities are made; None where none were seen.
    """

    producer: str
    mixed: str
    projections: tuple[str, ...]
    given: Place
    beside: tuple[str, ...]
    making: Making | None


@dataclass
class Seen:
    """One block's attention, with what of its run shows whether a reading is right.

    Attributes:
        probabilities: ``[B, H, S, K]``, or ``[B * H, S, K]``; None where none were seen.
        ran: the producer, what is given the mixed values, and the projections.
    """

    attention: Attention
    probabilities: Tensor | None
    ran: dict[str, Ran]

    @property
    def producer(self) -> Ran:
        return self.ran[self.attention.producer]

    @property
    def width(self) -> int:
        """Columns of the values of all heads."""
        assert self.producer.input is not None
        return self.producer.input.shape[-1]

    def heads(self) -> Tensor | None:
        """The probabilities ``[B, H, S, K]``, of as many heads as the values have room for."""
        value, given = self.probabilities, self.producer.input
        if value is None or given is None:
            return None
        if value.ndim == 3:
            batch = given.numel() // (given.shape[-1] * value.shape[1])
            value = value.unflatten(0, (batch, -1))
        return value if self.width % value.shape[1] == 0 else None


def find_attention(run: InsideRun, form: BlockForm) -> Seen | str:
    """The attention of a block that ran, or why it is not found."""
    place = form.places().get("attn_out")
    if place is None:
        return "its block has no attention"
    calls = [one for one in run.ran if one.runs == 1 and one.ended >= 0]
    producer = _producer(calls, run.at(place.path))
    if producer is None:
        return "no module makes the output of its attention from the values of the heads"
    made = _made(run, calls, producer)
    projections = _projections(calls, producer, made)
    if not projections:
        return "no module in its attention projects what attention is given"
    mixed = _mixed(calls, producer)
    given, beside = _given(calls, projections)
    attention = Attention(
        producer=producer.path,
        mixed=mixed.path,
        projections=tuple(one.path for one in projections),
        given=given,
        beside=beside,
        making=None if made is None else _making(run, calls, made),
    )
    ran = {one.path: one for one in (producer, mixed, *projections)}
    return Seen(attention, None if made is None else made.value, ran)


def _producer(calls: list[Ran], end: Ran | None) -> Ran | None:
    """The last projection: it returns what attention returns, before a norm behind that."""
    while end is not None and _is_norm(end):
        value = end.input
        if value is None:
            return None
        before = [one for one in calls if 0 <= one.ended < end.begun and one.gave(value)]
        end = max(before, key=lambda one: one.ended, default=None)
    if end is None or end.output is None:
        return None
    output = end.output
    makers = [one for one in calls if end.holds(one) and one.gave(output) and _computes(one)]
    inner = max(makers, key=lambda one: one.begun, default=None)
    if inner is None or inner.input is None:
        return None
    value = inner.input
    # A wrapper of the projection (an adapter's) is given the same.
    return next(one for one in makers if one.given(value))


def _computes(one: Ran) -> bool:
    """Whether a module has weights, and is no norm."""
    return not passes_on(one.kind) and not _is_norm(one) and bool(_weights(one))


def _is_norm(one: Ran) -> bool:
    """Whether a module is a norm: whole parts of models are called after those that they hold."""
    return named_norm(one.kind) and not one.module._modules


def _weights(one: Ran) -> list[Tensor]:
    """Matrices of a module and of those inside it, also those of quantised layers."""
    tensors = [*one.module.parameters(), *one.module.buffers()]
    return [tensor for tensor in tensors if tensor.ndim > 1]


def _made(run: InsideRun, calls: list[Ran], producer: Ran) -> Softmax | None:
    """The last softmax over keys before the producer, in the attention that holds it: an earlier one may be of a cross
    attention, or choose experts."""
    batch, tokens = run.pre.shape[:2]
    fitting = [
        one
        for one in run.softmaxes
        if one.at < producer.begun
        and one.value.shape[-2] == tokens <= one.value.shape[-1]
        and (one.value.shape[0] == batch if one.value.ndim == 4 else one.value.shape[0] % batch == 0)
    ]
    return fitting[-1] if fitting else None


def _projections(calls: list[Ran], producer: Ran, made: Softmax | None) -> list[Ran]:
    """What computes before the producer, in the smallest module that holds it, what makes the probabilities, and any;
    in the block where none does."""

    def has_made(one: Ran) -> bool:
        return made is not None and one.begun < made.at < one.ended

    before = [
        one
        for one in calls
        if one.ended < producer.begun
        and not has_made(one)
        and one.input is not None
        and one.output is not None
        and one.output.is_floating_point()
        and _computes(one)
    ]
    around = [one for one in calls if one is not producer and one.holds(producer) and (made is None or has_made(one))]
    for region in sorted(around, key=lambda one: -one.begun):
        inside = [one for one in before if region.holds(one)]
        if inside:
            return inside
    return before if made is not None and not around else []


def _given(calls: list[Ran], projections: list[Ran]) -> tuple[Place, tuple[str, ...]]:
    """Where what the first projections are given is read: on the innermost module around all of them that is given it
    too, or on the first of them, beside which there are others then."""
    first = projections[0]
    value = first.input
    assert value is not None
    fed = [one for one in projections if one.given(value)]
    around = [one for one in calls if one.given(value) and all(one.holds(other) for other in fed)]
    inner = max(around, key=lambda one: one.begun, default=first)
    place = Place(inner.path, "input", flat=inner.input is not None and inner.input.ndim != 3)
    return place, tuple(one.path for one in fed if not inner.holds(one))


def _mixed(calls: list[Ran], producer: Ran) -> Ran:
    """What is given the weighted values: norms may lie between them and the producer."""
    found = producer
    while found.input is not None:
        value = found.input
        norms = [one for one in calls if 0 <= one.ended < found.begun and _is_norm(one) and one.gave(value)]
        if not norms:
            break
        found = norms[-1]
    return found


def _making(run: InsideRun, calls: list[Ran], made: Softmax) -> Making | None:
    """Where the probabilities are made."""
    around = [one for one in calls if one.begun < made.at < one.ended and bool(_weights(one))]
    inner = max(around, key=lambda one: one.begun, default=None)
    if inner is None:
        return None
    inside = [one.path for one in run.ran if one is not inner and inner.holds(one) and one.path not in made.within]
    apart = tuple(path for path in inside if not any(path.startswith(f"{other}.") for other in inside))
    own = [one for one in run.softmaxes if inner.path in one.within and not set(apart) & set(one.within)]
    given = inner.input
    by_row = given is not None and given.ndim == 3 and given.shape[:2] == run.pre.shape[:2]
    return Making(inner.path, apart, next(n for n, one in enumerate(own) if one is made), len(own), by_row)
