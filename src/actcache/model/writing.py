"""Where each site is written: the way back from a site's value to what the model goes on with."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import OptionError, SiteUnavailableError
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.forms import BlockForm, Place, Step, deviation, first_input, first_tensor
from actcache.model.probe import probe_inputs, undisturbed
from actcache.model.sites import Site
from actcache.model.structure import descend

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class WritePoint:
    """Where one site is written.

    `write` takes what the module returned, or ``(args, kwargs)`` it was called with, and the site's new value in the
    shape, dtype and device of the old one; it returns what takes its place. The tensor it is given belongs to the model
    from then on, which may add to it in place.
    """

    read: ReadPoint
    write: Callable[[Any, Tensor], Any]


def write_point(anatomy: Anatomy, site: Site) -> WritePoint:
    """Where `site` is written.

    Raises as `Anatomy.require` does, and `SiteUnavailableError` where the model would not go on with what is written.
    """
    point = anatomy.read_point(site)
    _, place, _ = anatomy.place(site)
    if site.name == "logits":
        return WritePoint(point, _write_logits)
    if site.name == "resid_mid":
        _require_carried(anatomy, site)
        if place.side == "input":
            # The stream goes on beside the norm that is given it: only the tensor itself reaches both.
            return WritePoint(point, _overwrite(place))
    if place.side == "input":
        return WritePoint(point, _write_input)
    return WritePoint(point, _Output(place))


def with_first_tensor(output: Any, new: Tensor) -> Any:
    """What a module returned, with `new` in the place of its `first_tensor`."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, dict):
        first = next(iter(output))
        return _with_item(output, first, with_first_tensor(output[first], new))
    rest = (with_first_tensor(output[0], new), *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _write_input(call: Inputs, new: Tensor) -> Inputs:
    """A call with `new` in the place of its `first_input`."""
    args, kwargs = call
    if not (args and isinstance(args[0], Tensor)):
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": new}
        old = first_input(call)
        name = next((name for name, value in kwargs.items() if value is old), None)
        if name is not None:
            return args, {**kwargs, name: new}
        at = next(i for i, value in enumerate(args) if value is old)
        return (*args[:at], new, *args[at + 1 :]), kwargs
    return (new, *args[1:]), kwargs


def _write_logits(output: Any, new: Tensor) -> Any:
    if isinstance(getattr(output, "logits", None), Tensor):
        if getattr(output, "loss", None) is not None:
            raise OptionError(
                "logits cannot be edited in a pass that computes a loss, which was made of the logits as they were: "
                "leave labels out, and compute the loss of the logits that the model returns"
            )
        return _with_item(output, "logits", new)
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor) and value.ndim > 1)
    return type(output)([*output[:at], new, *output[at + 1 :]])


def _with_item(output: Any, key: str, new: Any) -> Any:
    items = {**output, key: new}
    # A model output is built from its fields; what the module returned may be held by somebody else.
    return type(output)(**items) if hasattr(type(output), "__dataclass_fields__") else type(output)(items)


class _Output:
    """Writes what a module returned: in its own rows, without the factor with which it joins the stream."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __call__(self, output: Any, new: Tensor) -> Any:
        old = first_tensor(output)
        own = new if self._place.scale == 1.0 else new / self._place.scale
        return with_first_tensor(output, own.reshape(old.shape))


def _overwrite(place: Place) -> Callable[[Inputs, Tensor], Inputs]:
    def write(call: Inputs, new: Tensor) -> Inputs:
        old = first_input(call)
        old.copy_(new.reshape(old.shape))
        return call

    return write


# -- whether what is written to the middle of a block goes on along the stream

_checking = threading.Lock()
_checked: weakref.WeakKeyDictionary[Anatomy, dict[tuple[str | None, int], str | None]] = weakref.WeakKeyDictionary()


def _require_carried(anatomy: Anatomy, site: Site) -> None:
    # Two passes at once on one model would read each other's values.
    with _checking:
        known = _checked.get(anatomy)
        if known is None:
            known = _checked[anatomy] = _carried(anatomy)
    layer = (site.layer or 0) % anatomy.depth(site.stack)
    why = known.get((site.stack, layer), "its block did not run")
    if why is not None:
        raise SiteUnavailableError(
            f"site {str(site)!r} cannot be edited on {type(anatomy.model).__name__}, only read: {why}. "
            f"Edit {str(replace(site, name='resid_post'))!r}, or what is added to the stream."
        )


def _carried(anatomy: Anatomy) -> dict[tuple[str | None, int], str | None]:
    """By block, why a value written to its middle would not go on; None where it does.

    One short pass, in which every block's middle is moved away from what it was: what the block then returns must
    still be the middle plus the MLP's part.
    """
    watched: list[_Middle] = []
    with undisturbed(anatomy.model), torch.no_grad(), ExitStack() as hooks:
        for (stack, layer), form in anatomy.findings.forms.items():
            if form is not None and "resid_mid" in form.places():
                watched.append(_Middle(anatomy, stack, layer, form))
                watched[-1].listen(hooks)
        anatomy.backbone(**probe_inputs(anatomy))
    return {(one.stack, one.layer): one.why() for one in watched}


class _Middle:
    """Moves the middle of one block, and notes what comes of it."""

    def __init__(self, anatomy: Anatomy, stack: str | None, layer: int, form: BlockForm) -> None:
        self.stack = stack
        self.layer = layer
        self._block = anatomy.blocks_of(stack)[layer]
        self._place = form.places()["resid_mid"]
        self._last: Step = form.steps[-1]
        self._middle: Tensor | None = None
        self._branch: Tensor | None = None
        self._total: Tensor | None = None

    def listen(self, hooks: ExitStack) -> None:
        place, (branch_name, branch) = self._place, self._last.branches[0]
        assert branch_name == "mlp_out"
        middle = self._module(place)
        if place.side == "input":
            hooks.callback(middle.register_forward_pre_hook(self._move_input, with_kwargs=True).remove)
        else:
            hooks.callback(middle.register_forward_hook(self._move_output).remove)
        hooks.callback(self._module(branch).register_forward_hook(self._note_branch).remove)
        total = self._last.total
        if total is None:
            hooks.callback(self._block.register_forward_hook(self._note_output).remove)
        else:
            hooks.callback(self._module(total).register_forward_pre_hook(self._note_input, with_kwargs=True).remove)

    def why(self) -> str | None:
        if self._middle is None or self._branch is None or self._total is None:
            return "a module of its block did not run in a short pass"
        rows = self._middle.shape
        parts = [(self._middle, 1.0), (self._branch.reshape(rows), self._last.branches[0][1].scale)]
        if deviation(self._total.reshape(rows), parts)[0]:
            return None
        return "what is written where it is read does not go on along the stream"

    def _module(self, place: Place) -> nn.Module:
        return descend(self._block, place.path.split("."))

    def _moved(self, old: Tensor) -> Tensor:
        new = old.flip(-1) * 1.5 + 0.25
        self._middle = new.clone()
        return new

    def _move_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        _overwrite(self._place)((args, kwargs), self._moved(first_input((args, kwargs))))

    def _move_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return with_first_tensor(output, self._moved(first_tensor(output)))

    def _note_branch(self, module: nn.Module, args: Any, output: Any) -> None:
        self._branch = first_tensor(output).clone()

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._total = first_tensor(output).clone()

    def _note_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._total = first_input((args, kwargs)).clone()
