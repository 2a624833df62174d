"""Batches on their way onto a device, while the one before is worked on there."""

from __future__ import annotations

import torch

Copied = tuple[torch.cuda.Event, list[torch.Tensor]]
"""When tensors are there that are being copied onto a device, and which they are."""

_streams: dict[torch.device, torch.cuda.Stream] = {}


def sent(tensors: dict[str, torch.Tensor], device: torch.device) -> tuple[dict[str, torch.Tensor], Copied | None]:
    """The same on `device`, and what `await_copy` must be told of before they are used."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}, None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(_streams[device]):
        # What lies in pinned memory is copied without anybody waiting; torch keeps it until that is done.
        found = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
        return found, (_streams[device].record_event(), list(found.values()))


def await_copy(copied: Copied | None, device: torch.device) -> None:
    """Let what is done next on `device` wait until a batch is there, and its memory for what is done with it."""
    if copied is not None:
        ready, tensors = copied
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(current)
