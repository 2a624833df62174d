"""What makes two autoencoders the same: their weights, what else decides what they compute, and their config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from actcache.errors import OptionError
from actcache.model.identity import digest_json
from actcache.model.in_memory import live_weights_digest, settings_of

# Where it runs, and what is said of it, change no feature.
_TOLD = frozenset({"device", "metadata"})
_APART = frozenset({"cfg", "device"})
_PLAIN = (bool, int, float, str, type(None))


class Function:
    """A function that gives features, as an object with `encode`."""

    def __init__(self, function: Any) -> None:
        self.encode = function


def autoencoder(sae: Any) -> Any:
    """`sae` as an object with `encode`: itself, or a stand-in for a function.

    Raises:
        OptionError: it has no `encode` and cannot be called, or is a module without `encode`.
    """
    if callable(getattr(sae, "encode", None)):
        return sae
    if isinstance(sae, nn.Module) or not callable(sae):
        raise OptionError(
            f"a {type(sae).__name__} has no encode(): expected an autoencoder of SAELens or dictionary_learning, an "
            "object with encode, or a function of vectors that returns features"
        )
    return Function(sae)


def autoencoder_digest(sae: Any, given: str | None) -> str:
    """What names the features of `sae`: `given`, or a digest of weights, settings and config of a module.

    Raises:
        OptionError: nothing is given, and it is no module of torch, whose weights say what it computes.
    """
    if given is not None:
        if not isinstance(given, str) or not given.strip():
            raise OptionError(f"digest is {given!r}: expected a name that no other autoencoder has")
        return f"given:{given}"
    if not isinstance(sae, nn.Module):
        function = sae.encode if isinstance(sae, Function) else sae
        name = getattr(function, "__qualname__", type(function).__name__)
        raise OptionError(
            f"{name} is no torch module, so that nothing tells its features from those of another one: give "
            "digest='...', a name that changes whenever what it computes does"
        )
    said = {"weights": live_weights_digest(sae), "settings": settings_of(sae, _APART), "config": _config(sae)}
    return f"module:{digest_json(said)}"


def _config(sae: nn.Module) -> Any:
    config = getattr(sae, "cfg", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not isinstance(config, Mapping):
        return None
    return {str(key): _said(value) for key, value in config.items() if key not in _TOLD}


def _said(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else str(value)


@contextmanager
def evaluating(sae: Any) -> Iterator[None]:
    """The block runs with every module of `sae` in evaluation mode; afterwards each is in the mode it was in."""
    modules = list(sae.modules()) if isinstance(sae, nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
