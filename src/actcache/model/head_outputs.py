"""What each head adds to attention's output: the output projection, taken apart."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from actcache.errors import SiteUnavailableError
from actcache.model.columns import Columns
from actcache.model.draws import Draws, draws_numbers
from actcache.model.forms import first_input
from actcache.model.read_points import Inputs
from actcache.model.taps import Guard, bare, changes_of
from actcache.model.threads import unseen


class _Call(threading.local):
    depth = 0
    random = False
    given: Tensor | None = None
    draws: Draws | None = None
    replaced: dict[int, Tensor] | None = None


class HeadOutputs:
    """The calls of one block's output projection; everybody who reads or edits the heads' outputs shares this object.

    `guard` stands around each call, once or several times; `note` is told what the projection is given, behind all
    edits of that. An edit of what the projection returns calls `replace` with the heads' new values, and returns what
    is then `made`; who reads later in the same call meets the new ones.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._call = _Call()

    def guard(self, module: nn.Module) -> Guard:
        """What to put around the calls of the projection."""

        def around(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            here = self._call
            if not here.depth:
                here.random = draws_numbers(module)
            here.depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                here.depth -= 1
                if not here.depth:
                    here.given = here.draws = here.replaced = None

        return around

    def note(self, inputs: Inputs) -> None:
        here = self._call
        here.given = given = first_input(inputs)
        here.draws = Draws(given.device) if here.random else None

    def given(self) -> Tensor:
        """What the projection is given in the call that is under way in this thread."""
        given = self._call.given
        if given is None:
            raise SiteUnavailableError("the output projection of attention was not called where its heads are read")
        return given

    def read(self, module: nn.Module, head: int | None = None) -> Tensor:
        """What the heads add ``[..., H, D]``, or one of them ``[..., D]``; `module` is the projection."""
        replaced, again = self._call.replaced or {}, self._call.draws
        if head is not None:
            return replaced[head] if head in replaced else one_head(module, self.given(), self.columns, head, again)
        if len(replaced) == self.columns.heads:
            return torch.stack([replaced[h] for h in range(self.columns.heads)], -2)
        value = all_heads(module, self.given(), self.columns, again)
        if replaced:
            heads = torch.tensor(sorted(replaced), device=value.device)
            value = value.index_copy(-2, heads, torch.stack([replaced[h] for h in sorted(replaced)], -2))
        return value

    def replace(self, new: dict[int, Tensor]) -> None:
        """Put `new` ``[..., D]`` in the place of what these heads add."""
        here = self._call
        here.replaced = {**(here.replaced or {}), **new}

    def made(self, module: nn.Module) -> Tensor:
        """What the projection returns with everything in place that was replaced in this call, hooks aside."""
        given, replaced, again = self.given(), self._call.replaced, self._call.draws
        if not replaced:
            return projected(module, given, again)
        kept = torch.ones(self.columns.heads, 1, dtype=given.dtype, device=given.device)
        kept[list(replaced)] = 0
        output = projected(module, self.columns.write(given, self.columns.read(given) * kept), again)
        for value in replaced.values():
            output = output + value
        return output


def all_heads(module: nn.Module, given: Tensor, columns: Columns, draws: Draws | None = None) -> Tensor:
    """What each head adds to what `module` returns for `given` ``[..., width]``, its bias left out: ``[..., H, D]``."""
    weight = _matrix(module)
    if weight is None:
        return torch.stack([one_head(module, given, columns, head, draws) for head in range(columns.heads)], -2)
    of_heads = columns.read(weight)
    return torch.einsum("...hd,ohd->...ho", columns.read(given), of_heads)


def one_head(module: nn.Module, given: Tensor, columns: Columns, head: int, draws: Draws | None = None) -> Tensor:
    """The same of one head, without computing the others: ``[..., D]``."""
    own = columns.of_heads[head]
    span = slice(own[0], own[-1] + 1)
    weight = _matrix(module)
    if weight is not None:
        return F.linear(given[..., span], weight[:, span])
    alone = torch.zeros_like(given)
    alone[..., span] = given[..., span]
    return projected(module, alone, draws) - projected(module, torch.zeros_like(given), draws)


def projected(module: nn.Module, given: Tensor, draws: Draws | None = None) -> Tensor:
    """What the projection itself makes of `given`: without hooks on it and its parts, and unseen by readers of them.
    Where it draws random numbers, with the same `draws` as in the model's own call of it."""
    with unseen(), bare(_hooked_parts(module)), contextlib.nullcontext() if draws is None else draws.again():
        output: Tensor = module.forward(given)
    return output


def moved_by_others(module: nn.Module) -> bool:
    """Whether hooks of the caller's, or edits of the projection's parts, may have made something else of its output."""
    if module._forward_hooks or torch_module._global_forward_hooks or _hooked_parts(module):
        return True
    return any(changes_of(part) for part in module.modules() if part is not module)


def _hooked_parts(module: nn.Module) -> list[nn.Module]:
    everywhere = bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
    return [
        part
        for part in module.modules()
        if part is not module and (everywhere or part._forward_hooks or part._forward_pre_hooks)
    ]


def _matrix(module: nn.Module) -> Tensor | None:
    """The weight ``[D, width]`` of a projection that is this matrix and a bias, and in memory."""
    kind = type(module)
    own = getattr(module.__dict__.get("forward"), "__func__", kind.forward)
    linear = kind is nn.Linear or (issubclass(kind, nn.Linear) and kind.__name__ == "FalconLinear")
    # What accelerate puts there brings the weights in for the call.
    if own is not kind.forward or not (linear or kind.__name__ == "Conv1D"):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    return weight if linear else weight.T
