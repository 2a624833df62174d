"""What a norm computes, measured on the module itself, and which norms stand before a block's attention and MLP.

No table of classes: a norm is what behaves like one, whatever it is called and however its weight is kept (Gemma's is
``1 + weight``).
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import Anatomy
from actcache.model.forms import first_input
from actcache.model.modes import evaluating
from actcache.model.probe import of_this_thread, probe_inputs, undisturbed
from actcache.model.sites import Site

# Inputs this small make epsilon visible in what a norm returns.
_SMALL = 1e-3


@dataclass(frozen=True)
class Norm:
    """``(x - mean(x)) / scale(x) * weight + bias`` over the last dimension, ``scale(x) = sqrt(mean(square) + eps)``.

    Without `centred` (RMS norms) the mean stays. `weight` and `bias` are ``[D]``.
    """

    centred: bool
    eps: float
    weight: Tensor
    bias: Tensor

    def centre(self, x: Tensor) -> Tensor:
        """`x` without its mean, where this norm takes it away."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """What `x` ``[..., D]`` is divided by, ``[..., 1]``, in float32 or wider."""
        wide = self.centre(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def divide(self, x: Tensor, scale: Tensor) -> Tensor:
        """`x` centred and divided by `scale`: the norm without weight and bias, in the dtype of `x`."""
        return (self.centre(x.to(scale.dtype)) / scale).to(x.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """Weight and bias, on what `divide` gave."""
        return x * self.weight.to(x.device, x.dtype) + self.bias.to(x.device, x.dtype)


@torch.no_grad()
def measure_norm(module: nn.Module, width: int, like: Tensor) -> Norm | None:
    """The norm that `module` computes over `width` dimensions, or None when it is not one.

    `like` has the dtype and device of the model's values. Hooks of the module are not run.
    """

    def run(x: Tensor) -> Tensor | None:
        try:
            with evaluating(module):
                given = module.forward(x.to(like.device, like.dtype)[None, None])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        fits = isinstance(given, Tensor) and given.shape == (1, 1, width)
        return given[0, 0].double().cpu() if fits else None

    # No mean, and nowhere zero, also for an odd width.
    flat = torch.ones(width, dtype=torch.float64)
    flat[1::2] = -1.0
    if width % 2:
        flat[-1] = -2.0
        flat[-3:-1] = 1.0
    found = [run(x) for x in (flat, -flat, flat * _SMALL, flat * -_SMALL, flat + 1.0)]
    up, down, small_up, small_down, shifted = found
    if up is None or down is None or small_up is None or small_down is None or shifted is None:
        return None
    bias, steep, small = (up + down) / 2, (up - down) / 2, (small_up - small_down) / 2
    if not bool(steep.isfinite().all()) or not float(steep.norm()):
        return None
    square = float(flat.square().mean())
    tiny = square * _SMALL**2
    share = float(small.norm() / steep.norm()) ** 2
    if share < 1.1 * _SMALL**2:
        # As a linear map does: nothing is normalised.
        return None
    measured = max(0.0, square * tiny * (1 - share) / (share * square - tiny))
    own = [value for value in vars(module).values() if type(value) is float and abs(value - measured) < 0.05 * value]
    eps = own[0] if own else measured
    weight = steep / flat * (square + eps) ** 0.5
    centred = bool((shifted - up).abs().max() < (shifted - bias - steep * _uncentred(flat)).abs().max())
    norm = Norm(centred, eps, weight, bias)
    # Many compute in float32 inside, also what they are given in float64.
    if not _agrees(norm, run, width, max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)):
        return None
    kept = torch.promote_types(like.dtype, torch.float32)
    return Norm(centred, eps, weight.to(kept), bias.to(kept))


def _uncentred(flat: Tensor) -> Tensor:
    """How an RMS norm would give ``flat + 1`` relative to `flat`."""
    moved = flat + 1.0
    return moved / flat * (flat.square().mean() / moved.square().mean()).sqrt()


def _agrees(norm: Norm, run: Any, width: int, eps: float) -> bool:
    """Whether the formula gives what the module gives, on inputs that nothing was measured with."""
    steps = torch.arange(width, dtype=torch.float64)
    for factor, shift in ((3.0, 0.5), (0.02, -0.01)):
        x = (steps * 0.7 + steps.square() * 0.31).sin() * factor + shift
        # As the module sees it.
        x = x.float().double() if eps < 1e-4 else x.bfloat16().double() if eps > 5e-3 else x.half().double()
        given = run(x)
        made = norm.finish(norm.divide(x, norm.scale(x)))
        if given is None or float((made - given).abs().max()) > 16 * eps * float(given.abs().max().clamp_min(1.0)):
            return False
    return True


# By stack, layer, and the stream that the norm is given.
Found = dict[tuple[str | None, int, str], Norm | None]
_found: weakref.WeakKeyDictionary[Anatomy, Found] = weakref.WeakKeyDictionary()


def norm_before(anatomy: Anatomy, stack: str | None, layer: int, stream: str) -> Norm | None:
    """The norm of block `layer` that is given `stream`: of ``"resid_pre"`` the one before attention, of ``"resid_mid"``
    the one before the MLP. The number of blocks stands for the final norm. None where the stream is used as it is.

    One short pass of the model when it is first asked for. Raises `SiteUnavailableError` when what is given the stream
    cannot be made out.
    """
    if anatomy not in _found:
        _found[anatomy] = _find(anatomy)
    try:
        return _found[anatomy][stack, layer, stream]
    except KeyError:
        raise SiteUnavailableError(
            f"the norm that {type(anatomy.model).__name__} puts on {stream}.{layer} cannot be made out: no module that "
            "is given that stream as it is was shown to be one"
        ) from None


def norm_behind_heads(anatomy: Anatomy, stack: str | None, layer: int) -> tuple[Norm, Tensor | None]:
    """The norm that takes the sum of what the heads of a block's attention add, with what its output is multiplied by,
    and the output projection's bias, which is in that sum too (None where it has none). Of a block with such a norm."""
    names, place, _ = anatomy.place(Site("attn_out", layer, stack=stack))
    projection = anatomy.read_point(Site("head_out", layer, stack=stack)).module
    bias = getattr(projection, "bias", None)
    module = anatomy.model.get_submodule(".".join(names))
    like = next((p for p in module.parameters() if not p.is_meta), torch.zeros(()))
    norm = measure_norm(module, anatomy.d_model, like.detach())
    if norm is None:
        raise SiteUnavailableError(
            f"what heads add to the stream of {type(anatomy.model).__name__} cannot be told: {'.'.join(names)}, which "
            "takes their sum, was not shown to be a norm"
        )
    scaled = replace(norm, weight=norm.weight * place.scale, bias=norm.bias * place.scale)
    return scaled, bias.detach() if isinstance(bias, Tensor) else None


def _find(anatomy: Anatomy) -> Found:
    taken: dict[tuple[str | None, int, str], list[nn.Module]] = {}
    like: list[Tensor] = []
    # Before the model is put aside: they may cost a pass of their own.
    final_norms = anatomy.findings.final_norms
    with undisturbed(anatomy.model), torch.no_grad(), ExitStack() as hooks:
        for stack in anatomy.stacks:
            for layer, block in enumerate(anatomy.blocks_of(stack)):
                _Watch(anatomy, stack, layer, block, taken, like).listen(hooks)
        anatomy.backbone(**probe_inputs(anatomy))
        found: Found = {}
        for key, modules in taken.items():
            measured = (measure_norm(module, like[0].shape[-1], like[0]) for module in modules)
            found[key] = next((norm for norm in measured if norm is not None), None)
        for stack, path in final_norms.items():
            final = (
                None if path is None else measure_norm(anatomy.model.get_submodule(path), like[0].shape[-1], like[0])
            )
            if path is None or final is not None:
                found[stack, anatomy.depth(stack), "resid_pre"] = final
    return found


class _Watch:
    """Notes which modules of one block without children are given its stream as it is."""

    def __init__(
        self, anatomy: Anatomy, stack: str | None, layer: int, block: nn.Module, taken: Any, like: list[Tensor]
    ) -> None:
        self._block = block
        self._key = stack, layer
        self._taken = taken
        self._like = like
        self._streams: dict[str, Tensor] = {}
        self._given: list[tuple[nn.Module, Tensor]] = []
        middle = Site("resid_mid", layer, stack=stack)
        self._middle = anatomy.read_point(middle) if anatomy.why_not(middle) is None else None

    def listen(self, hooks: ExitStack) -> None:
        for module in self._block.modules():
            if module is not self._block and not any(True for _ in module.children()):
                hooks.callback(module.register_forward_pre_hook(of_this_thread(self._leaf), with_kwargs=True).remove)
        if self._middle is not None:
            module, extract = self._middle.module, self._middle.extract

            def middle(_: Any, args: Any, rest: Any) -> None:
                self._streams["resid_mid"] = extract((args, rest)).clone()

            def middle_after(_: Any, args: Any, output: Any) -> None:
                self._streams["resid_mid"] = extract(output).clone()

            if self._middle.side == "input":
                hooks.callback(module.register_forward_pre_hook(of_this_thread(middle), with_kwargs=True).remove)
            else:
                hooks.callback(module.register_forward_hook(of_this_thread(middle_after)).remove)
        hooks.callback(self._block.register_forward_pre_hook(of_this_thread(self._begin), with_kwargs=True).remove)
        hooks.callback(self._block.register_forward_hook(of_this_thread(self._end)).remove)
        for around, note in () if self._middle is None else self._middle.around:
            noted = of_this_thread(lambda _, args, rest, note=note: note((args, rest)))
            hooks.callback(around.register_forward_pre_hook(noted, with_kwargs=True).remove)

    def _begin(self, _: Any, args: Any, kwargs: Any) -> None:
        self._streams = {"resid_pre": first_input((args, kwargs)).clone()}
        self._given = []

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if given is not None and self._streams and given.numel() == self._streams["resid_pre"].numel():
            self._given.append((module, given.clone()))

    def _end(self, _: Any, args: Any, output: Any) -> None:
        for name, stream in self._streams.items():
            same = [m for m, given in self._given if torch.equal(given.reshape(stream.shape), stream)]
            if same:
                self._taken.setdefault((*self._key, name), []).extend(same)
        if not self._like and self._streams:
            self._like.append(self._streams["resid_pre"])
        self._streams, self._given = {}, []
