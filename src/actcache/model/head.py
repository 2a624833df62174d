"""From the last block's output to logits: the model's own final norm and head, in parts that fit in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn

from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import Anatomy, describe
from actcache.model.factors import ROUNDINGS, roundings
from actcache.model.forward_inputs import accepts
from actcache.model.head_way import Way, find_way
from actcache.model.norms import Norm, measure_norm
from actcache.model.probe import probe_inputs, undisturbed
from actcache.model.sites import Site
from actcache.model.structure import descend

_BYTES = 2**28


class Head:
    """The way from the residual stream behind the last block (of the decoder) to logits.

    It runs the model's own modules, as they are now, without their hooks; it is differentiable. Holds a model that
    somebody has weakly; the parts that `load_head` reads by themselves it keeps.

    Args:
        model: what has the modules.
        way: the modules, in order.
        norm: the final norm as it was measured; None where the model has none.
        behind: how many of the modules come before and with the final norm.
        device: where the modules are.
        sizes: width of the residual stream, and number of logits.
        keep: hold `model`, which nobody else does.

    Attributes: `norm`, `width`, `vocab_size`, `way`, `device`.
    """

    def __init__(
        self,
        model: nn.Module,
        way: Way,
        norm: Norm | None,
        behind: int,
        device: torch.device,
        sizes: tuple[int, int],
        *,
        keep: bool = False,
    ) -> None:
        self.norm = norm
        self.way = way
        self._model = weakref.ref(model)
        self._kept = model if keep else None
        self.width, self.vocab_size = sizes
        self.device = device
        self._modules = [weakref.ref(step.module(model)) for step in way.steps]
        self._behind = behind

    @property
    def model(self) -> nn.Module:
        """What has the modules; raises `ReferenceError` when it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model this head belongs to is gone")
        return model

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits ``[..., V]`` of the stream behind the last block ``[..., D]``, on its device."""
        return self._run(residual, 0)

    def unembed(self, normalised: Tensor) -> Tensor:
        """Logits ``[..., V]`` of what the final norm returned ``[..., D]``, on its device."""
        return self._run(normalised, self._behind)

    def in_parts(self, rows: Tensor, max_bytes: int = _BYTES, *, normalised: bool = False) -> Iterator[Tensor]:
        """Logits ``[n, V]`` of rows ``[N, D]`` of the stream (or of what the final norm made of it), in order,
        `max_bytes` at a time (one row at least)."""
        for part in rows.split(max(1, max_bytes // (4 * self.vocab_size))):
            yield self._run(part, self._behind if normalised else 0)

    def directions(self, ids: Tensor) -> Tensor:
        """For each token id ``[...]`` the direction ``[..., D]`` in the normalised stream along which its logit grows:
        the gradient of the logit (before a soft cap) by the centred stream divided by its scale.

        Raises `SiteUnavailableError` where something behind the norm is not linear.
        """
        model = self.model
        weights = [_weight(step.module(model)) for step in self.way.steps[self._behind :]]
        found = self._gradients(ids) if None in weights else self._read(ids, [w for w in weights if w is not None])
        return found * self.norm.weight.to(found.device) if self.norm is not None else found

    def _read(self, ids: Tensor, weights: list[Tensor]) -> Tensor:
        """The directions in what the final norm returned, from the weights behind it."""
        factors = [step.factor for step in self.way.steps[self._behind :]]
        found = weights[-1][ids.to(weights[-1].device)] * (factors[-1] * self.way.end.factor)
        for weight, factor in zip(reversed(weights[:-1]), reversed(factors[:-1]), strict=True):
            found = found @ weight.to(found.device) * factor
        return found

    def _gradients(self, ids: Tensor) -> Tensor:
        """The same where weights cannot be read (adapters, quantised or offloaded layers), token by token."""
        tokens, place = ids.unique(return_inverse=True)
        found: list[list[Tensor]] = []
        dtype = self.way.steps[self._behind].dtype
        for point in (torch.zeros, torch.ones):
            with torch.enable_grad():
                x = point(1, self.width, dtype=dtype, device=self.device, requires_grad=True)
                logits = self._run(x, self._behind, capped=False)[0]
                grads = (torch.autograd.grad(logits[token], x, retain_graph=True)[0][0] for token in tokens.tolist())
                found.append([grad.detach() for grad in grads])
        directions, others = map(torch.stack, found)
        if roundings(directions, others) > ROUNDINGS:
            names = ", ".join(repr(step.path) for step in self.way.steps[self._behind :])
            raise SiteUnavailableError(
                f"the logits have no fixed directions in the residual stream: what follows it ({names}) is not linear"
            )
        return directions[place.to(directions.device)]

    def current(self) -> bool:
        """Whether the model still has the modules that were found."""
        with suppress(KeyError):
            pairs = zip(self._modules, self.way.steps, strict=True)
            return all(ref() is step.module(self.model) for ref, step in pairs)
        return False

    def _run(self, value: Tensor, first: int, *, capped: bool = True) -> Tensor:
        device, shape = value.device, value.shape[:-1]
        value = value.reshape(1, -1, value.shape[-1]).to(self.device)
        value = self.way.run(self.model, value, first, capped=capped)
        return value.reshape(*shape, value.shape[-1]).to(device)


_heads: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Anatomy], Head]] = weakref.WeakKeyDictionary()


def find_head(model: nn.Module) -> Head:
    """The head of `model`, shown to give the model's own logits; two short passes when it is first asked for.

    Raises `SiteUnavailableError` when the model has no language-model head, or when what lies between its last block
    and its logits cannot be made out.
    """
    anatomy = describe(model)
    known, head = _heads.get(anatomy.model, (None, None))
    if head is None or known is None or known() is not anatomy or not head.current():
        head = _find(anatomy)
        _heads[anatomy.model] = weakref.ref(anatomy), head
    return head


def _find(anatomy: Anatomy) -> Head:
    model, name = anatomy.model, type(anatomy.model).__name__
    if (why := anatomy.why_not(Site("logits"))) is not None:
        raise SiteUnavailableError(f"{name} gives no logits: {why}")
    final = anatomy.findings.final_norms.get(anatomy.stacks[-1])
    norms: list[Norm | None] = []

    def usable(last: Tensor) -> bool:
        norms.append(None if final is None else measure_norm(descend(model, final.split(".")), last.shape[-1], last))
        return final is None or norms[-1] is not None

    lists = {stack.blocks for stack in anatomy.structure.stacks}
    block = anatomy.blocks_of(anatomy.stacks[-1])[-1]
    with undisturbed(model), torch.no_grad():
        way, last = find_way(model, lists, block, lambda: _logits(anatomy), usable)
    if way is None:
        raise unknown_way(name)
    paths = [step.path for step in way.steps]
    behind = paths.index(final) + 1 if final in paths else 0
    return Head(model, way, norms[0], behind, last.device, (anatomy.d_model, anatomy.vocab_size))


def unknown_way(name: str) -> SiteUnavailableError:
    """The error for a model of the class `name` whose way from its last block to logits was not found."""
    return SiteUnavailableError(
        f"what lies between the last block of {name} and its logits cannot be made out: no chain of its modules, with "
        "factors, a bias and a cap of its own, gives its logits"
    )


def _logits(anatomy: Anatomy) -> Tensor:
    given = probe_inputs(anatomy)
    # The model may take fewer arguments than its backbone.
    output = anatomy.model(**{name: value for name, value in given.items() if accepts(anatomy.model, name)})
    return anatomy.read_point(Site("logits")).extract(output)


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer; None of what is none, or keeps it in another form or place."""
    weight = getattr(module, "weight", None)
    readable = type(module) is nn.Linear and isinstance(weight, Tensor) and not weight.is_meta
    return weight.detach() if readable and weight is not None else None
