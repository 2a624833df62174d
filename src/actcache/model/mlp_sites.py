"""Where the inside of an MLP is read: its input, its hidden activations, and the logits of a mixture's router.

Found in one run of a block, by values: what the last projection returns is what the MLP returns, bit for bit, and the
first one is given what the modules around it are given. No table of names; those that are looked at tell norms and
attention apart from projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcache.model.discovery import named_attention, named_norm, passes_on
from actcache.model.forms import BlockForm, Place, Side, first_input
from actcache.model.read_points import Inputs, ReadPoint, Unflatten
from actcache.model.readings import Found, Given, Reading
from actcache.model.runs import InsideRun, Ran
from actcache.model.sites import Site

_MIXER = "its block has one branch, 'mixer_out', in place of attention and MLP"
_EXPERTS = (
    "its MLP is a mixture of experts, and each of its experts has hidden activations of its own, for the tokens that "
    "are routed to it"
)
_DENSE = "its MLP is no mixture of experts: nothing in it makes a number for each of several experts"
_FUSED = "no module in its MLP is a last projection, which returns what the MLP returns and is given something else"
_OFFLOADED = "its router keeps the logits to itself, and its weights are not in memory between calls"
_UNSEEN = "what its MLP is given is not seen: no module in it has weights and is called with a tensor"


@dataclass(frozen=True)
class Computed(Reading):
    """Logits of a router that returns only what it makes of them: computed once more from what it is given, in `dtype`
    as it does itself."""

    dtype: torch.dtype = torch.float32

    def point(self, module: nn.Module, path: str, block: nn.Module, site: Site) -> ReadPoint:
        def logits(call: Inputs) -> Tensor:
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            assert weight is not None
            given = first_input(call).to(self.dtype)
            return F.linear(given, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

        unflatten = Unflatten(site, logits)
        return ReadPoint(module, path, "input", unflatten, ((block, unflatten.note),))


def find_mlp_sites(run: InsideRun, form: BlockForm, experts: frozenset[int]) -> Found:
    """`mlp_in`, `mlp_act` and `router_logits` of a block, or why it lacks them; `experts` are the numbers of experts
    that a mixture of this model may have."""
    found = Found({}, {})
    region = _find_region(run, form)
    if region is None:
        without = _MIXER if "mlp_out" not in form.places() else _UNSEEN
        found.absent = dict.fromkeys(("mlp_in", "mlp_act", "router_logits"), without)
        return found
    given = given_input(region.modules)
    if given:
        beside = tuple(one.path for one in given if not given[0].holds(one))
        found.readings["mlp_in"] = Given(_place(given[0], "input"), beside=beside)
    else:
        found.absent["mlp_in"] = _UNSEEN
    router = _find_router(region.modules, experts)
    if router is not None:
        one, item = router
        if item is not None:
            found.readings["router_logits"] = Reading(_place(one, "output", item), item)
        elif all(weight.is_meta for weight in one.module.parameters()):
            found.absent["router_logits"] = _OFFLOADED
        else:
            found.readings["router_logits"] = Computed(_place(one, "input"), dtype=_wide(one))
        found.absent["mlp_act"] = _EXPERTS
        return found
    found.absent["router_logits"] = _DENSE
    last = region.last
    if given and last.input is not None and not given[0].given(last.input):
        found.readings["mlp_act"] = Reading(_place(last, "input"))
    else:
        found.absent["mlp_act"] = _FUSED
    return found


def expert_counts(config: object) -> frozenset[int]:
    """The numbers of a config that say how many experts there are to choose from."""
    values = vars(config) if config is not None else {}
    found = ((name, value) for name, value in values.items() if name.endswith("experts") and "shared" not in name)
    return frozenset(value for _, value in found if type(value) is int and value > 1)


def given_input(region: Sequence[Ran]) -> list[Ran]:
    """The modules of an MLP that are given its input, the outermost first: what its first projection is given."""
    first = next((one for one in region if one.input is not None and _computes(one)), None)
    if first is None or first.input is None:
        return []
    return [one for one in region if one.given(first.input) and not passes_on(one.kind)]


@dataclass
class _Region:
    """The modules of an MLP, in the order in which they began, and the last one of those that compute."""

    modules: list[Ran]
    last: Ran


def _find_region(run: InsideRun, form: BlockForm) -> _Region | None:
    calls = [one for one in run.ran if one.runs == 1 and one.ended >= 0]
    end = _end_of(form, calls)
    if end is None:
        return None
    makers = [one for one in calls if one.gave(end) and not passes_on(one.kind) and not named_norm(one.kind)]
    if not makers:
        return None
    outer = max(makers, key=lambda one: one.ended)
    makers = [one for one in makers if outer.holds(one)]
    inner = max(makers, key=lambda one: one.begun)
    # A wrapper of the projection (an adapter's) is given the same.
    last = next((one for one in makers if inner.input is not None and one.given(inner.input)), inner)
    before = list(_behind_attention(form, calls, last)) if last is outer else []
    if any(_computes(one) for one in before):
        # No module holds the whole MLP.
        return _Region([*before, last], last)
    return _Region([one for one in calls if outer.holds(one)], last)


def _end_of(form: BlockForm, calls: Iterable[Ran]) -> Tensor | None:
    """What the last projection returns: the branch `mlp_out`, before the norms that it may go through."""
    place = form.places().get("mlp_out")
    by_path = {one.path: one for one in calls}
    one = by_path.get(place.path) if place is not None else None
    while one is not None and named_norm(one.kind):
        value = one.input
        if value is None:
            return None
        before = [call for call in by_path.values() if call.ended < one.begun and call.gave(value)]
        one = max(before, key=lambda call: call.ended, default=None)
    return one.output if one is not None else None


def _behind_attention(form: BlockForm, calls: Sequence[Ran], last: Ran) -> Iterator[Ran]:
    """The modules of an MLP that no module holds: those behind attention, up to its last projection."""
    branches = [dict(step.branches) for step in form.steps]
    others = {place.path for step in branches for name, place in step.items() if name != "mlp_out"}
    own = [one for one in calls if one.path in others]
    ended = max((one.ended for one in own), default=-1) if len(form.steps) > 1 else -1
    for one in calls:
        inside = any(other.holds(one) for other in own)
        if ended < one.begun < last.begun and not inside and not named_attention(one.path, one.kind):
            yield one


def _computes(one: Ran) -> bool:
    """Whether a module has weights of its own, and is no norm."""
    weights = (*one.module._parameters.values(), *one.module._buffers.values())
    return any(weight is not None for weight in weights) and not named_norm(one.kind)


def _find_router(region: Iterable[Ran], experts: frozenset[int]) -> tuple[Ran, int | None] | None:
    """The module that makes a logit for each expert, and which of the tensors that it returns they are; None for one
    that keeps them to itself."""
    for one in region:
        weight = one.module._parameters.get("weight")
        if one.input is None or weight is None or weight.ndim != 2 or weight.shape[0] not in experts:
            continue
        if weight.shape[1] == one.input.shape[-1]:
            return one, next((i for i, given in enumerate(one.outputs) if _product(one, given, weight)), None)
    return None


def _product(one: Ran, found: Tensor, weight: Tensor) -> bool:
    """Whether `found` is the product of a module's input and its weight, to within rounding."""
    assert one.input is not None
    rows = one.input.reshape(-1, one.input.shape[-1])
    if found.shape[-1] != weight.shape[0] or found.numel() != len(rows) * len(weight) or not found.is_floating_point():
        return False
    if weight.is_meta:
        # Brought in for each call: a softmax of the logits, or what is left of it, has no negative numbers.
        return bool((found < 0).any())
    bias = one.module._parameters.get("bias")
    wide, other = rows.double(), weight.detach().to(rows.device).double()
    expected, size = wide @ other.T, wide.abs() @ other.abs().T
    if bias is not None:
        expected = expected + bias.detach().to(rows.device).double()
    eps = max(torch.finfo(t.dtype).eps for t in (rows, weight, found))
    return bool(((found.reshape(expected.shape) - expected).abs() <= 8 * eps * (size + 1e-6)).all())


def _place(one: Ran, side: Side, item: int = 0) -> Place:
    value = one.input if side == "input" else one.outputs[item]
    assert value is not None
    return Place(one.path, side, flat=value.ndim == 2)


def _wide(one: Ran) -> torch.dtype:
    """The dtype in which a router computes: that of the scores which it returns."""
    assert one.input is not None
    return next((value.dtype for value in one.outputs if value.is_floating_point()), one.input.dtype)
