"""Sites that are one tensor of what a module is given or returns: what another process can be told as plain data."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from actcache.errors import SiteUnavailableError
from actcache.model.forms import first_input
from actcache.model.forward_inputs import accepts
from actcache.model.inner import INNER
from actcache.model.probe import of_this_thread, probe_inputs, undisturbed
from actcache.model.readings import Given, Reading
from actcache.model.runs import tensors_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actcache.model.anatomy import Anatomy
    from actcache.model.forms import Side
    from actcache.model.sites import Site

# Made of several values of a pass, or of columns of them.
NOT_PLAIN = ("q", "k", "v", "z", "head_out", "pattern")


@dataclass(frozen=True)
class Plain:
    """Where a site is, as data.

    Attributes:
        path: the module, "" for the model itself.
        side: what it is given ("input", its first tensor) or returns ("output").
        item: which of the tensors that it returns, in order, tuples taken apart.
        scale: the factor with which it is the site.
    """

    path: str
    side: Side
    item: int = 0
    scale: float = 1.0


def require_plain(site: Site, why: str) -> None:
    """Raise `SiteUnavailableError` for a site that is not plain on any model; `why` it would have to be, for people."""
    if site.name in NOT_PLAIN:
        raise _made_of_parts(site, why)


def _made_of_parts(site: Site, why: str) -> SiteUnavailableError:
    return SiteUnavailableError(
        f"site {str(site)!r} is made of parts of what modules return, and {why}: backend='local' has it."
    )


def plain(anatomy: Anatomy, site: Site, why: str) -> Plain:
    """Where `site` is on this model. Raises as `Anatomy.require` and `require_plain` do."""
    require_plain(site, why)
    names, place, _ = anatomy.place(site)
    path = ".".join(names)
    if site.name in INNER:
        found = anatomy.inner.blocks[anatomy._index(site)].readings[site.name]
        if type(found) not in (Reading, Given):
            raise _made_of_parts(site, why)
        return Plain(path, place.side, found.item)
    return Plain(path, place.side, scale=place.scale)


def in_order(anatomy: Anatomy, found: Mapping[str, Plain]) -> list[tuple[str, Side, list[str]]]:
    """The names of `found` by module and side, in the order in which a pass reaches these: a short one is run."""
    reached: list[tuple[str, Side]] = []
    wanted: dict[tuple[str, Side], list[str]] = {}
    for name, where in found.items():
        wanted.setdefault((where.path, where.side), []).append(name)

    def note(key: tuple[str, Side]) -> None:
        if key not in reached:
            reached.append(key)

    model: Any = anatomy.model
    with undisturbed(model), torch.no_grad(), ExitStack() as hooks:
        for key in wanted:
            module = model.get_submodule(key[0])
            hook = of_this_thread(lambda *_, key=key: note(key))
            register = module.register_forward_pre_hook if key[1] == "input" else module.register_forward_hook
            hooks.callback(register(hook).remove)
        # Those of the backbone: the model around it need not take each of them.
        model(**{name: value for name, value in probe_inputs(anatomy).items() if accepts(model, name)})
    return [(*key, wanted[key]) for key in reached]


def value_at(where: Plain, value: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """The site's tensor ``[B, S, ...]`` out of what its module was given, ``(args, kwargs)``, or has returned."""
    tensor = first_input(value) if where.side == "input" else next(islice(tensors_of(value), where.item, None))
    if where.scale != 1.0:
        tensor = tensor * where.scale
    # Experts are given rows without their batch.
    return tensor.reshape(*shape, -1) if tensor.ndim == 2 else tensor
