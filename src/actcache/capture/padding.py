"""Values of different lengths as one tensor: shorter ones are padded behind their end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_axis(tensor: Tensor, axis: int, size: int, fill: float = 0) -> Tensor:
    """`tensor` made `size` long along `axis` by values `fill` behind its end."""
    missing = size - tensor.shape[axis]
    if missing == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (0, missing), value=fill)


def pad_front(tensor: Tensor, axis: int, size: int) -> Tensor:
    """`tensor` made `size` long along `axis` by zeros before its beginning."""
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (size - tensor.shape[axis], 0))


def join_tensors(parts: Sequence[Tensor], axes: tuple[int, ...] = (1,)) -> Tensor:
    """Tensors joined on dim 0, shorter ones padded with zeros behind their end along `axes`; 0-d ones give a row."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim < 2:
        return torch.cat([part[None] if part.ndim == 0 else part for part in parts])
    return torch.cat(padded(parts, axes))


def padded(parts: Sequence[Tensor], axes: tuple[int, ...]) -> list[Tensor]:
    """`parts`, each as long along `axes` as the longest of them."""
    found = list(parts)
    if len({part.shape for part in found}) > 1:
        for axis in axes:
            if axis < found[0].ndim:
                longest = max(part.shape[axis] for part in found)
                found = [pad_axis(part, axis, longest) for part in found]
    return found
