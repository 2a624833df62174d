"""How the value of one site is taken from what a module is given or returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from actcache.errors import SiteUnavailableError
from actcache.model.forms import Place, Side, first_input, first_tensor
from actcache.model.sites import Site
from actcache.model.taps import Guard

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


# Made anew for every capture, so that it is never of a module that was replaced: a frozen one takes far longer.
@dataclass(eq=False)
class ReadPoint:
    """Where one site is read; never changed.

    `extract` turns what the module returned (side "output"), or the pair ``(args, kwargs)`` it was called with (side
    "input"), into the site's tensor. Where that depends on what modules were called with in the same pass and before
    (the surrounding ones, or the module itself), `around` names them, each with the function that wants its inputs.

    `early` says that the value goes on beside the module too, so that edits of what the module is given do not concern
    it.

    `guards` stand around the calls of modules while the site is read (or edited): where there are any, the value is in
    reach only until the module's own is left, so that it is read on the way out, behind the edits. `probabilities` says
    that the value is made of attention probabilities, which some implementations of attention never hold. `scale` is
    the factor by which the site's tensor differs from the module's own.
    """

    module: nn.Module
    path: str
    side: Side
    extract: Callable[[Any], Tensor]
    around: tuple[tuple[nn.Module, Callable[[Inputs], None]], ...] = ()
    guards: tuple[tuple[nn.Module, Guard], ...] = ()
    probabilities: bool = False
    scale: float = 1.0
    early: bool = False


def extractor(site: Site, place: Place) -> Callable[[Any], Tensor]:
    """The way from what is at `place` to a value of the residual stream, or to logits."""
    if site.name == "logits":
        return _logits
    if place.side == "input":
        return first_input
    return first_tensor if place.scale == 1.0 else _Scaled(place.scale)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    # return_dict=False: the loss, when there is one, comes first and has no dimensions.
    return next(value for value in output if isinstance(value, Tensor) and value.ndim > 1)


class _Scaled:
    """A branch output times the factor with which it joins the stream."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, output: Any) -> Tensor:
        return first_tensor(output) * self.factor


class Unflatten:
    """Rows ``[B * S, D]`` of a site in the shape ``[B, S, D]`` of the block that they are read in; `own` counts the
    dimensions that a row has."""

    def __init__(self, site: Site, extract: Callable[[Any], Tensor], own: int = 1) -> None:
        self._site = site
        self._extract = extract
        self._own = own
        self._shape: tuple[int, ...] = ()

    def note(self, call: Inputs) -> None:
        self._shape = tuple(first_input(call).shape[:-1])

    def __call__(self, value: Any) -> Tensor:
        rows = self._extract(value)
        there = rows.shape[: rows.ndim - self._own]
        if there.numel() != math.prod(self._shape):
            # Multi-head latent attention may keep what keys and values are made of, and make them anew in each pass.
            raise SiteUnavailableError(
                f"site {str(self._site)!r} is made for {list(there)} tokens in a pass over {list(self._shape)}: for "
                "those of earlier passes too, which the model keeps. Pass use_cache=False to the model, or to generate"
            )
        return rows.reshape(*self._shape, *rows.shape[-self._own :])
