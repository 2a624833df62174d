"""From what a caller names (objects, paths, patterns) to the modules to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from actcache.errors import OptionError, UnknownModuleError, UnknownSiteError, did_you_mean
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.sites import Site
from actcache.model.structure import descend, has_forward, is_script

Modules = str | nn.Module | Sequence[str | nn.Module]


def module_table(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module for every module of `model`, "" first; a module with two names goes by its first. What a module
    compiled by ``torch.jit`` holds does not run as modules, and is left out."""
    table: dict[str, nn.Module] = {"": model}
    _walk(model, "", table, {id(model)})
    return table


def _walk(parent: nn.Module, prefix: str, table: dict[str, nn.Module], seen: set[int]) -> None:
    if is_script(parent):
        return
    # Not a closure: one that calls itself would keep the model alive until the garbage collector comes.
    for name, child in parent._modules.items():
        if child is not None and id(child) not in seen:
            seen.add(id(child))
            path = prefix + name
            table[path] = child
            if child._modules:
                _walk(child, path + ".", table, seen)


def every_module(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module for every module that can be called."""
    runs: dict[type, bool] = {}
    table: dict[str, nn.Module] = {}
    for path, module in module_table(model).items():
        kind = type(module)
        if kind not in runs:
            runs[kind] = has_forward(module)
        if runs[kind] or "forward" in module.__dict__:
            table[path] = module
    return table


def resolve_modules(model: nn.Module, modules: Modules) -> dict[str, nn.Module]:
    """Path -> module, in the order asked.

    Strings are paths as in ``model.named_modules()`` or patterns (``*`` within one name, ``**`` across names, ``?``,
    ``[...]``); "model" or "" is the root. Raises `UnknownModuleError` that names the nearest paths.
    """
    wanted: dict[str, nn.Module] = {}
    table: dict[str, nn.Module] | None = None
    if not isinstance(modules, (str, nn.Module, Iterable)):
        raise OptionError(f"modules is {modules!r}: expected paths or torch.nn.Module objects, one or a list of them")
    for item in [modules] if isinstance(modules, (str, nn.Module)) else modules:
        if isinstance(item, str) and not _is_pattern(item):
            found = _exact(model, item)
            if found is not None:
                if is_script(found[1]):
                    _require_module(model, found[0])
                wanted[found[0]] = _runnable(*found)
                continue
        table = module_table(model) if table is None else table
        if isinstance(item, nn.Module):
            path = next((p for p, module in table.items() if module is item), None)
            if path is None:
                raise UnknownModuleError(
                    f"this {type(item).__name__} is not a module of the {type(model).__name__} to capture: "
                    "pass modules of that same model object, or their paths"
                )
            wanted[path] = _runnable(path, item)
        elif isinstance(item, str):
            wanted.update(_matching(item, table, model))
        else:
            raise OptionError(f"modules holds {item!r}: expected paths or torch.nn.Module objects")
    if not wanted:
        raise OptionError("modules is empty: name at least one module, or pass None for every module that runs")
    return wanted


def resolve_sites(
    model: nn.Module, anatomy: Anatomy, sites: str | Site | Sequence[str | Site], layers: Any
) -> dict[Site, ReadPoint]:
    """`Anatomy.points`, whose `UnknownSiteError` for the path of a module says where that goes."""
    if not isinstance(sites, (str, Site, Iterable)):
        raise OptionError(f"sites is {sites!r}: expected a name such as 'resid_post', or a list of them")
    try:
        return anatomy.points(sites, layers)
    except UnknownSiteError:
        for item in [sites] if isinstance(sites, (str, Site)) else sites:
            if isinstance(item, str) and not Site.looks_like(item) and _names_module(model, item):
                raise UnknownSiteError(
                    f"{item!r} is no site but a module of this {type(model).__name__}: name it in modules={item!r}"
                ) from None
        raise


def _names_module(model: nn.Module, item: str) -> bool:
    try:
        return bool(resolve_modules(model, item))
    except UnknownModuleError:
        return False


def _exact(model: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """The module that `path` leads to, as written or without a leading "model.", behind its path; None when none is."""
    try:
        return path, descend(model, path.split(".") if path else ())
    except KeyError:
        bare = "" if path == "model" else path.removeprefix("model.")
        return _exact(model, bare) if bare != path else None


def _require_module(model: nn.Module, path: str) -> None:
    """Raise `UnknownModuleError` for what lies inside a module that runs as compiled code."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        if is_script(descend(model, names[:depth])):
            holder = ".".join(names[:depth]) or "model"
            raise UnknownModuleError(
                f"{path!r} lies inside {holder!r}, which torch.jit compiled: it does not run as a module. Capture "
                f"{holder!r} itself, or the model before it was compiled."
            )


def _runnable(path: str, module: nn.Module) -> nn.Module:
    if not has_forward(module):
        inside = ", ".join(repr(f"{path}.{name}") for name, _ in list(module.named_children())[:3])
        raise UnknownModuleError(
            f"{path!r} is a {type(module).__name__}, which only holds modules: name those, such as {inside}"
        )
    return module


def _is_pattern(text: str) -> bool:
    return "*" in text or "?" in text or "[" in text


def _matching(item: str, table: dict[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
    if _is_pattern(item):
        for pattern in (item, item.removeprefix("model.")):
            expression = _expression(pattern)
            found = {p: m for p, m in table.items() if p and expression.fullmatch(p) and has_forward(m)}
            if found:
                return found
        what = f"pattern {item!r} matches no module"
    else:
        what = f"no module {item!r}"
    if Site.looks_like(item):
        hint = f" It is the name of a site: sites={item!r}."
    elif _is_pattern(item):
        deeper = f"**.{item}"
        expression = _expression(deeper)
        reaches = any(expression.fullmatch(path) for path in table)
        hint = f" Did you mean {deeper!r}?" if reaches else did_you_mean(item, table)
    else:
        # Short for a path, an end of one is like none of them as text.
        ends = [path for path in table if path.endswith("." + item)][:3]
        hint = f" Did you mean {' or '.join(map(repr, ends))}?" if ends else did_you_mean(item, table)
    hint = hint or f" Its modules: {', '.join(list(table)[1:6])}, ..."
    raise UnknownModuleError(f"{what} in this {type(model).__name__}.{hint}")


_WILD = re.compile(r"\*\*|\*|\?|\[[^\]]*\]")


def _expression(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one name of a path, `**` crosses dots."""
    expression, end = "", 0
    for wild in _WILD.finditer(pattern):
        meaning = {"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(wild[0]) or wild[0].replace("[!", "[^")
        expression += re.escape(pattern[end : wild.start()]) + meaning
        end = wild.end()
    return re.compile(expression + re.escape(pattern[end:]))
