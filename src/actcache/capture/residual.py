"""The residual stream of one prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from actcache.capture.positions import one_number
from actcache.errors import JoinError, LayerRangeError, OptionError


class FullActivationCache:
    """The residual stream of one prompt: ``[T, D]`` for each layer that it holds.

    Layers are numbered as in the model, also where only some of them are held; negative numbers count from the end of
    the model where its depth is known, else from the last layer held. `site` says what the rows are.
    """

    def __init__(self, *, site: str | None = None) -> None:
        self.site = site
        self._layers: dict[int, Tensor] = {}
        self._capacity = 0

    @classmethod
    def with_capacity(cls, n_layers: int, *, site: str | None = None) -> Self:
        """An empty cache for a model of `n_layers` layers. Raises `OptionError` for what is no number of layers."""
        if isinstance(n_layers, bool) or not hasattr(n_layers, "__index__") or n_layers < 0:
            raise OptionError(f"n_layers is {n_layers!r}: expected a number of layers, 0 or more")
        cache = cls(site=site)
        cache._capacity = int(n_layers)
        return cache

    def push(self, tensor: Tensor, layer: int | None = None) -> None:
        """Hold `tensor` ``[T, D]`` (itself, not a copy) as `layer`, or behind the last layer held.

        Raises `JoinError` (a `ValueError`) when it has other dimensions, shape or dtype than what is held, or the layer
        is held already; `LayerRangeError` for a negative layer.
        """
        number = max(self._layers, default=-1) + 1 if layer is None else int(layer)
        if number < 0:
            raise LayerRangeError(f"layer {number} cannot be pushed: layers are numbered from 0")
        if number in self._layers:
            raise JoinError(f"layer {number} is held already")
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise JoinError(f"layer {number} is {found}: expected a tensor [T, D] of one prompt")
        held = next(iter(self._layers.values()), None)
        if held is not None and (tensor.shape != held.shape or tensor.dtype != held.dtype):
            raise JoinError(
                f"layer {number} is {tensor.dtype} {list(tensor.shape)}, the layers held are {held.dtype} "
                f"{list(held.shape)}: all layers are of the same prompt"
            )
        self._layers[number] = tensor

    def get_layer(self, layer: int) -> Tensor | None:
        """One layer, ``[T, D]``, or None when it is not held; an `OptionError` for a layer that is no int."""
        return self._layers.get(self._number(layer))

    def get_position(self, layer: int, position: int) -> Tensor:
        """One position of one layer, ``[D]``; negative positions count from the end.

        Raises `LayerRangeError` (an `IndexError`) naming the layer, or the position and the range, `OptionError` for a
        layer or position that is no int.
        """
        position = one_number(position, "position")
        value = self.get_layer(layer)
        if value is None:
            held = ", ".join(map(str, self.layer_numbers())) or "none"
            raise LayerRangeError(f"layer {layer} is not in the cache, which holds layers {held}")
        if not -value.shape[0] <= position < value.shape[0]:
            raise LayerRangeError(
                f"position {position} of layer {layer} is out of range: seq_len is {value.shape[0]} "
                f"(0 to {value.shape[0] - 1})"
            )
        return value[position]

    def layer_numbers(self) -> list[int]:
        """The layers held, in ascending order."""
        return sorted(self._layers)

    @property
    def n_layers(self) -> int:
        """How many layers are held."""
        return len(self._layers)

    def seq_len(self) -> int:
        """Tokens of the prompt; raises `LayerRangeError` on an empty cache."""
        for value in self._layers.values():
            return int(value.shape[0])
        raise LayerRangeError("the cache is empty: it has no positions")

    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._layers

    def stack(self) -> Tensor:
        """Every held layer, ``[L, T, D]``, in ascending order. Raises `LayerRangeError` where there is none."""
        if not self._layers:
            raise LayerRangeError("the cache is empty: it holds no layer")
        return torch.stack([self._layers[number] for number in self.layer_numbers()])

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._layers[number] for number in self.layer_numbers())

    def __repr__(self) -> str:
        shape = next((f", each {str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in self), "")
        numbers = ", ".join(map(str, self.layer_numbers()))
        what = f" of {self.site}" if self.site else ""
        return f"FullActivationCache with {self.n_layers} layers{what}" + (f" ({numbers}){shape}" if numbers else "")

    def _number(self, layer: int) -> int:
        layer = one_number(layer, "layer")
        return layer + max(self._capacity, max(self._layers, default=-1) + 1) if layer < 0 else layer
