"""Where each site is written: the way back from a site's value to what the model goes on with."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from actcache.errors import OptionError, SiteUnavailableError
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.carried import carried_inputs, carried_logits
from actcache.model.forms import BlockForm, Place, Step, deviation, first_input, first_tensor
from actcache.model.inner import INNER
from actcache.model.inner_writing import (
    OneOfHeads,
    PutColumns,
    PutHeadOutputs,
    PutItem,
    put_input,
    put_pattern,
    reading_of,
    whole_pattern,
)
from actcache.model.probe import of_this_thread, probe_inputs, undisturbed
from actcache.model.read_points import Inputs
from actcache.model.readings import HeadOutReading, HeadReading, PatternReading
from actcache.model.replacing import with_first_tensor, with_item
from actcache.model.sites import Site
from actcache.model.structure import descend

# What a branch is given, and what it adds.
_GIVEN = {"attn_in": "attn_out", "mlp_in": "mlp_out"}


@dataclass(frozen=True)
class WritePoint:
    """Where one site is written.

    `side` is what of the module is changed (`taps.Change`): what it returns, ``(args, kwargs)`` it is called with, or
    the probabilities of attention. `take` makes the site's value of it; `write` is given it, the new value in the
    shape, dtype and device of the old one, and the old one, and returns what takes its place. The new value belongs to
    the model from then on, which may add to it in place. `early`: before other edits of the same thing.
    """

    read: ReadPoint
    side: Literal["input", "output", "pattern"]
    take: Callable[[Any], Tensor]
    write: Callable[[Any, Tensor, Tensor], Any]
    early: bool = False


def write_point(anatomy: Anatomy, site: Site) -> WritePoint:
    """Where `site` is written.

    Raises as `Anatomy.require` does, and `SiteUnavailableError` where the model would not go on with what is written.
    """
    point = anatomy.read_point(site)
    _, place, _ = anatomy.place(site)
    if site.name in INNER:
        return _inner_write_point(anatomy, site, point)
    if site.name == "logits":
        return _at(point, _write_logits)
    if site.name == "resid_mid":
        _require_carried(anatomy, site)
        if place.side == "input":
            # The stream goes on beside the norm that is given it: only the tensor itself reaches both.
            return _at(point, _overwrite(place))
    if place.side == "input":
        return _at(point, put_input)
    return _at(point, _Output(place))


def _at(point: ReadPoint, write: Callable[[Any, Tensor, Tensor], Any], *, early: bool = False) -> WritePoint:
    return WritePoint(point, point.side, point.extract, write, early or point.early)


def _inner_write_point(anatomy: Anatomy, site: Site, point: ReadPoint) -> WritePoint:
    at = site.stack, (site.layer or 0) % anatomy.depth(site.stack)
    branch = _GIVEN.get(site.name)
    if branch is not None and at not in _known(anatomy, site.name, carried_inputs):
        why = "what is written where it is read reaches more than the branch that begins with it, or not all of that"
        raise _only_read(anatomy, site, why, branch, "what modules of the branch are given, by hooks on them")
    if site.name == "router_logits" and at not in _known(anatomy, "router_logits", carried_logits):
        why = "its router goes on with scores that it makes of the logits by itself"
        raise _only_read(anatomy, site, why, "mlp_in", f"what the module {point.path!r} returns")
    reading = reading_of(anatomy, site)
    if isinstance(reading, PatternReading):
        if site.head is None:
            return WritePoint(point, "pattern", whole_pattern, put_pattern)
        one = OneOfHeads(site.head)
        return WritePoint(point, "pattern", one.take, one.put)
    if isinstance(reading, HeadOutReading):
        # What is made of all heads is edited behind them, where it is read at the same module.
        return _at(point, PutHeadOutputs(reading.outputs, point.module, site.head), early=True)
    if isinstance(reading, HeadReading):
        return _at(point, PutColumns(reading.columns, point.side))
    return _at(point, put_input if point.side == "input" else PutItem(reading.item))


def _write_logits(output: Any, new: Tensor, old: Tensor) -> Any:
    if isinstance(getattr(output, "logits", None), Tensor):
        if getattr(output, "loss", None) is not None:
            raise OptionError(
                "logits cannot be edited in a pass that computes a loss, which was made of the logits as they were: "
                "leave labels out, and compute the loss of the logits that the model returns"
            )
        return with_item(output, "logits", new)
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor) and value.ndim > 1)
    return type(output)([*output[:at], new, *output[at + 1 :]])


class _Output:
    """Writes what a module returned: in its own rows, without the factor with which it joins the stream."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __call__(self, output: Any, new: Tensor, old: Tensor) -> Any:
        own = new if self._place.scale == 1.0 else new / self._place.scale
        return with_first_tensor(output, own.reshape(first_tensor(output).shape))


def _overwrite(place: Place) -> Callable[[Inputs, Tensor, Tensor], Inputs]:
    def write(call: Inputs, new: Tensor, old: Tensor) -> Inputs:
        there = first_input(call)
        there.copy_(new.reshape(there.shape))
        return call

    return write


# -- whether what is written to the middle of a block goes on along the stream

_checking = threading.Lock()
# By site name, what was found.
_checked: weakref.WeakKeyDictionary[Anatomy, dict[str, Any]] = weakref.WeakKeyDictionary()


def _known(anatomy: Anatomy, name: str, find: Callable[[Anatomy, str], Any]) -> Any:
    # Two passes at once on one model would read each other's values.
    with _checking:
        found = _checked.setdefault(anatomy, {})
        if name not in found:
            found[name] = find(anatomy, name)
        return found[name]


def _require_carried(anatomy: Anatomy, site: Site) -> None:
    known = _known(anatomy, "resid_mid", _carried)
    why = known.get((site.stack, (site.layer or 0) % anatomy.depth(site.stack)), "its block did not run")
    if why is not None:
        raise _only_read(anatomy, site, why, "resid_post", "what is added to the stream")


def _only_read(anatomy: Anatomy, site: Site, why: str, instead: str, other: str) -> SiteUnavailableError:
    return SiteUnavailableError(
        f"site {str(site)!r} cannot be edited on {type(anatomy.model).__name__}, only read: {why}. "
        f"Edit {str(replace(site, name=instead))!r}, or {other}."
    )


def _carried(anatomy: Anatomy, name: str) -> dict[tuple[str | None, int], str | None]:
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
            hooks.callback(middle.register_forward_pre_hook(of_this_thread(self._move_input), with_kwargs=True).remove)
        else:
            hooks.callback(middle.register_forward_hook(of_this_thread(self._move_output)).remove)
        hooks.callback(self._module(branch).register_forward_hook(of_this_thread(self._note_branch)).remove)
        total = self._last.total
        if total is None:
            hooks.callback(self._block.register_forward_hook(of_this_thread(self._note_output)).remove)
        else:
            hooks.callback(
                self._module(total).register_forward_pre_hook(of_this_thread(self._note_input), with_kwargs=True).remove
            )

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
        old = first_input((args, kwargs))
        _overwrite(self._place)((args, kwargs), self._moved(old), old)

    def _move_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return with_first_tensor(output, self._moved(first_tensor(output)))

    def _note_branch(self, module: nn.Module, args: Any, output: Any) -> None:
        self._branch = first_tensor(output).clone()

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._total = first_tensor(output).clone()

    def _note_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._total = first_input((args, kwargs)).clone()
