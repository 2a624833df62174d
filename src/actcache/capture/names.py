"""Names of the caller's own for modules: what they may be, and which real path is meant by one that holds them."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from actcache.capture.requests import module_table
from actcache.errors import OptionError, UnknownModuleError, did_you_mean
from actcache.model.sites import Site


class Names:
    """`given`: from a module's path, or the last parts of it, to its name; as `check_names` accepts them."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self._tails: dict[str, list[tuple[str, ...]]] = {}
        for tail, name in self.given.items():
            self._tails.setdefault(name, []).append(tuple(tail.split(".")))

    def find(self, path: str, held: Callable[[str], bool]) -> str | None:
        """The real path that `path` stands for among those that are `held`, with or without a leading "model."."""
        for spelled in dict.fromkeys([path, path.removeprefix("model.")]):
            found = next(filter(held, self._readings((), spelled.split("."))), None)
            if found is not None:
                return found
        return None

    def _readings(self, start: tuple[str, ...], rest: list[str]) -> Iterator[str]:
        """Every way to read `rest` below `start`, what is written first."""
        if not rest:
            yield ".".join(start)
            return
        part, *rest = rest
        yield from self._readings((*start, part), rest)
        for tail in self._tails.get(part, ()):
            yield from self._readings(start + tail, rest)
            if len(tail) > 1 and start[1 - len(tail) :] == tail[:-1]:
                yield from self._readings((*start, tail[-1]), rest)


def check_names(model: nn.Module, given: Any, taken: Collection[str]) -> Names:
    """The names that the caller gave for modules of `model`; those that are `taken` a cache has for something else.

    Raises `UnknownModuleError` for a path that no module has, and `OptionError` for a name that cannot be told from
    something else.
    """
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for pair in given.items() for text in pair):
        raise OptionError(f"names is {given!r}: expected a dict from paths of modules to names, {{'mlp': 'my_mlp'}}")
    table = module_table(model)
    paths = [path.split(".") for path in table if path]
    homes: dict[tuple[str, str], str] = {}
    for tail, name in given.items():
        _check_name(name, taken)
        parts = tail.split(".")
        n = len(parts)
        found = [path for path in paths if path[-n:] == parts]
        if not found:
            hint = did_you_mean(tail, {".".join(path[-n:]) for path in paths})
            raise UnknownModuleError(f"names: no module of this {type(model).__name__} is called {tail!r}.{hint}")
        for path in found:
            # The name stands in the place of all its parts, or of the last.
            for home in {".".join(path[:-n]), ".".join(path[:-1])}:
                clash = f"{home}.{name}".lstrip(".") if name in table[home]._modules else None
                clash = clash or homes.setdefault((home, name), ".".join(path))
                if clash != ".".join(path):
                    raise OptionError(
                        f"names: {name!r} would stand for {'.'.join(path)!r} and for {clash!r} beside it: choose "
                        f"another name, such as {'my_' + name!r}"
                    )
    return Names(given)


def _check_name(name: str, taken: Collection[str]) -> None:
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        near = re.sub(r"\W", "_", name).strip("_") or "module"
        near = near if near.isidentifier() and not keyword.iskeyword(near) else f"my_{near}"
        raise OptionError(f"names: {name!r} is no name that an attribute may have. Did you mean {near!r}?")
    if name in taken or Site.looks_like(name):
        raise OptionError(f"names: {name!r} means something else in a cache: choose another, such as {'my_' + name!r}")
