"""Backends by name: ours, and those that installed packages offer under the entry point group ``actcache.backends``."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from actcache.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from actcache.extract.backends import Backend, BackendFactory, Setting

GROUP = "actcache.backends"
_OURS = {"local": ("local", "LocalBackend"), "nnsight": ("nnsight", "open_backend")}


def open_backend(name: object, setting: Setting) -> Backend:
    """The backend called `name` for one model.

    Raises:
        OptionError: no such backend, one that cannot be imported, or one that refuses the setting.
    """
    return _factory(name)(setting)


def refuse_remote(backend: str, remote: object) -> None:
    """Raise `OptionError` where something else than False is asked of a backend that runs models in this process."""
    if remote is not False:
        raise OptionError(
            f"remote={remote!r}: backend {backend!r} runs models in this process. Leave it out, or take a backend that "
            "has a service: backend='nnsight'."
        )


def _factory(name: object) -> BackendFactory:
    if isinstance(name, str):
        if name in _OURS:
            module, attribute = _OURS[name]
            return cast("BackendFactory", getattr(import_module(f"{__package__}.{module}"), attribute))
        # Looked for only now: it reads the metadata of every installed package.
        for point in entry_points(group=GROUP):
            if point.name == name:
                try:
                    return cast("BackendFactory", point.load())
                except (ImportError, AttributeError) as error:
                    raise OptionError(f"the backend {name!r} ({point.value}) cannot be imported: {error}.") from error
    known = sorted({*_OURS, *(point.name for point in entry_points(group=GROUP))})
    hint = did_you_mean(name, known) if isinstance(name, str) else ""
    raise OptionError(
        f"unknown backend {name!r}: expected one of {', '.join(map(repr, known))} (packages add others as entry points "
        f"of the group {GROUP!r}).{hint}"
    )
