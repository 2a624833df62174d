"""Attribute access to what was captured: ``cache.transformer.h[0].output``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from actcache.capture.entry import Entry
from actcache.capture.names import Names
from actcache.errors import LayerRangeError, UnknownKeyError, did_you_mean

_OF_ENTRY = ("output", "inputs", "input", "hidden", "grad", "hidden_grad")


class Node:
    """One module path within a cache: its entry when it was captured, and the way to what lies below it.

    ``node.name`` and ``node[2]`` go down, ``node["h.0"]`` goes down several steps, ``node.output`` and the like read
    the module's own entry. Where a module holds no numbered modules, ``node[i]`` is the visit ``i``.
    """

    __slots__ = ("_called", "_data", "_model", "_path", "_spelled")

    def __init__(
        self,
        data: Mapping[str, Any],
        path: str,
        model: weakref.ref[nn.Module] | None,
        called: Names | None = None,
        spelled: str = "",
    ) -> None:
        self._data = data
        self._path = path
        self._model = model
        self._called = called
        # The way here as the caller went it: its "model" may be a name of theirs, or the root.
        self._spelled = spelled

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _OF_ENTRY:
            return getattr(self._entry(), name)
        child = self._child(name)
        if child is None:
            names = sorted(self._names())
            there = ", ".join(names[:6]) or "nothing captured below it"
            hint = did_you_mean(name, names) or did_you_mean(name, self._modules())
            raise AttributeError(f"{name!r} was not captured below {self._path or 'model'!r}, which has {there}.{hint}")
        return child

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            node: Node | None = self
            for name in index.split("."):
                node = node._child(name) if node is not None else None
            if node is None:
                raise UnknownKeyError(f"{index!r} was not captured below {self._path or 'model'!r}")
            return node
        numbers = [int(name) for name in self._names() if name.isdigit()]
        if not numbers:
            entry = self._data.get(self._path)
            if isinstance(entry, Entry):
                return entry[index]
            raise UnknownKeyError(f"{self._path or 'model'!r} holds no numbered modules")
        size = self._size(numbers)
        if not -size <= index < size:
            raise LayerRangeError(f"index {index} is out of range: {self._path!r} holds {size} modules")
        child = self._child(str(index % size))
        if child is None:
            raise LayerRangeError(
                f"{self._path}.{index % size} was not captured: there are {', '.join(map(str, numbers))}"
            )
        return child

    def __len__(self) -> int:
        """Runs of the module; of what only holds modules, those that were captured."""
        if isinstance(self._data.get(self._path), Entry):
            return len(self._entry())
        return sum(name.isdigit() for name in self._names()) or len(self._entry())

    def __iter__(self) -> Iterator[Any]:
        numbers = sorted(int(name) for name in self._names() if name.isdigit())
        return (self[i] for i in numbers) if numbers else iter(self._entry())

    def __dir__(self) -> list[str]:
        called = set(self._called.given.values()) if self._called is not None else ()
        return sorted({*_OF_ENTRY, *self._names(), *(name for name in called if self._child(name) is not None)})

    def __repr__(self) -> str:
        entry = self._data.get(self._path)
        return (
            f"Node({self._path or 'model'!r}, {entry!r})" if entry is not None else f"Node({self._path or 'model'!r})"
        )

    def _entry(self) -> Entry:
        entry = self._data.get(self._path)
        if not isinstance(entry, Entry):
            raise UnknownKeyError(f"{self._path or 'model'!r} itself was not captured, only modules below it")
        return entry

    def _child(self, name: str) -> Node | None:
        path = f"{self._path}.{name}" if self._path else name
        spelled = f"{self._spelled}.{name}" if self._spelled else name
        if self._holds(path):
            return Node(self._data, path, self._model, self._called, spelled)
        meant = self._called.find(spelled, self._holds) if self._called is not None else None
        if meant is not None:
            return Node(self._data, meant, self._model, self._called, spelled)
        if path == "model":
            return self
        # The root may be spelled out, as in keys: "model" is the root where no module has that name.
        bare = path.removeprefix("model.")
        if bare == path or not self._holds(bare):
            return None
        return Node(self._data, bare, self._model, self._called, bare)

    def _holds(self, path: str) -> bool:
        below = path + "."
        return any(
            key == path or key.startswith(below) for key, value in self._data.items() if isinstance(value, Entry)
        )

    def _names(self) -> set[str]:
        start = self._path + "." if self._path else ""
        entries = (key for key, value in self._data.items() if isinstance(value, Entry))
        return {key[len(start) :].partition(".")[0] for key in entries if key.startswith(start) and key != self._path}

    def _modules(self) -> list[str]:
        """What the captured model itself has here, also below the "model" that may be spelled out."""
        model = self._model() if self._model is not None else None
        found: list[str] = []
        for path in (self._path, "model") if not self._path else (self._path,):
            with suppress(AttributeError):
                found += [name for name, _ in model.get_submodule(path).named_children()] if model is not None else []
        return found

    def _size(self, numbers: list[int]) -> int:
        """How many modules the captured model holds here; what was captured tells when the model is gone."""
        model = self._model() if self._model is not None else None
        try:
            return len(model.get_submodule(self._path)._modules) if model is not None else max(numbers) + 1
        except AttributeError:
            return max(numbers) + 1
