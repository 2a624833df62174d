"""Which strategy joins the values of a key: the registered one that is most specific, else the default of its name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from actcache.capture.aggregate import flatten, keep_newest, layernorm_statistics
from actcache.errors import JoinError, OptionError, UnknownKeyError, UnsavableError, did_you_mean
from actcache.model.sites import Site

Strategy = Callable[[Any, Any], Any]

# Where nothing was registered.
_DEFAULTS: dict[str, Strategy] = {
    "mapping_index": keep_newest,
    "offset": flatten,
    "token_dict": flatten,
    "last_layernorm": layernorm_statistics,
}


class Strategies:
    """The strategies registered with a cache, by key or pattern."""

    def __init__(self) -> None:
        self.rules: dict[str, Strategy] = {}
        # Registered since the last join: whether they match anything is not known yet.
        self.new: set[str] = set()

    def register(self, pattern: str, function: Strategy) -> None:
        if not isinstance(pattern, str) or not pattern:
            raise OptionError(f"a strategy is registered for a key or a pattern of keys, not {pattern!r}")
        if not callable(function):
            raise OptionError(f"the strategy for {pattern!r} is {function!r}: expected function(old_or_None, new)")
        # The latest registration comes last, and wins among equals.
        self.rules.pop(pattern, None)
        self.rules[pattern] = function
        self.new.add(pattern)

    def remove(self, pattern: str) -> None:
        if pattern not in self.rules:
            held = ", ".join(map(repr, self.rules)) or "none"
            hint = did_you_mean(str(pattern), self.rules)
            raise UnknownKeyError(f"no strategy is registered for {pattern!r}; registered: {held}.{hint}")
        del self.rules[pattern]
        self.new.discard(pattern)

    def of(self, key: str) -> Strategy | None:
        """The most specific strategy that was registered for `key`, else the default of its name, else None."""
        fitting = [pattern for pattern in self.rules if _matches(pattern, key)]
        if fitting:
            # max gives the first of equals.
            return self.rules[max(reversed(fitting), key=_specificity)]
        return _DEFAULTS.get(key)

    def prove(self, keys: Iterable[str]) -> None:
        """Raise `JoinError` for a new pattern that matches none of `keys`."""
        held = list(keys)
        for pattern in sorted(self.new):
            if not any(_matches(pattern, key) for key in held):
                longer = f"{pattern}*" if any(key.startswith(pattern) for key in held) else None
                hint = f" Did you mean {longer!r}?" if longer else did_you_mean(pattern, held)
                raise JoinError(
                    f"the strategy registered for {pattern!r} matches no key: a pattern is a whole key, or has "
                    f"wildcards, such as {pattern + '*'!r}.{hint} (remove_aggregation takes it back)"
                )

    def update(self, other: Strategies) -> None:
        for pattern, function in other.rules.items():
            self.rules.pop(pattern, None)
            self.rules[pattern] = function
        self.new |= other.new

    def __copy__(self) -> Strategies:
        twin = Strategies()
        twin.rules, twin.new = dict(self.rules), set(self.new)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Strategies:
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        for pattern, function in self.rules.items():
            importable_name(function, pattern)
        return self.__dict__.copy()


class Named:
    """A strategy known by its importable name, which is imported when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, old: Any, new: Any) -> Any:
        return self.function()(old, new)

    def function(self) -> Strategy:
        from importlib import import_module

        module, _, path = self.name.partition(":")
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        function: Strategy = found
        return function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def importable_name(function: Strategy, pattern: str) -> str:
    """``module:name`` of a strategy; raises `UnsavableError` for one that cannot be found by its name again."""
    if isinstance(function, Named):
        return function.name
    name = f"{getattr(function, '__module__', None)}:{getattr(function, '__qualname__', None)}"
    try:
        found: object = Named(name).function()
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise UnsavableError(
            f"the strategy registered for {pattern!r} cannot be kept: {function!r} is no function that can be imported "
            f"by its name. Define it at the top of a module, or remove_aggregation({pattern!r}) first."
        )
    return name


def _matches(pattern: str, key: str) -> bool:
    if pattern == key:
        return True
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(key, pattern)
    return Site.looks_like(pattern) and Site.looks_like(key) and Site.parse(pattern) == Site.parse(key)


def _specificity(pattern: str) -> tuple[bool, int]:
    wild = sum(map(pattern.count, "*?["))
    return wild == 0, len(pattern) - wild
