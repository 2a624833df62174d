"""Batches of a DataLoader's worker in memory that the process which asked for them reads in place, and gives back."""

from __future__ import annotations

import mmap
import os
import uuid
import weakref
from collections.abc import Callable
from multiprocessing.reduction import register
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_HEAD = 64
"""Bytes before the values; the first two tell whether the maker and the receiver of a batch still look at them."""
_MAKER, _RECEIVER = 0, 1

Bytes = npt.NDArray[np.uint8]


class Lent(torch.Tensor):
    """A tensor in a `_Block`. Sent to another process it is a plain tensor there, in the same memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    block: _Block


class _Block:
    """Memory with a file descriptor but no name, which other processes of this user map by it: it goes with the last
    of them."""

    def __init__(self, size: int) -> None:
        self.size, self.process, self.name = size, os.getpid(), uuid.uuid4().hex
        self._fd = os.memfd_create(f"actcache-{self.name}")
        os.truncate(self._fd, _HEAD + size)
        self.memory = _mapping(self._fd)
        self._head = self.memory[:_HEAD]
        weakref.finalize(self, os.close, self._fd)

    @property
    def path(self) -> str:
        return f"/proc/{self.process}/fd/{self._fd}"

    @property
    def free(self) -> bool:
        return not self._head[:2].any()

    def send(self) -> bool:
        """Whether what is in it now has not been sent before; from now on it has."""
        first = not self._head[_RECEIVER]
        self._head[_RECEIVER] = 1
        return first


def _mapping(fd: int) -> Bytes:
    return np.frombuffer(mmap.mmap(fd, 0), np.uint8)


_blocks: list[_Block] = []
"""Those of this process."""

_leases: set[weakref.finalize[Any, Any]] = set()


def _leased(data: Bytes, side: int, dtype: torch.dtype, shape: Any) -> torch.Tensor:
    """The tensor in a block, which is in use on this side for as long as anything refers to it."""
    size = int(np.prod(shape)) * dtype.itemsize
    values = data[_HEAD : _HEAD + size]
    data[side] = 1
    process = os.getpid()
    lease = weakref.finalize(values, lambda: _end(lease, data, side, process))
    lease.atexit = False
    _leases.add(lease)
    # The tensor's storage, which its views share, holds `values`.
    return torch.from_numpy(values).view(dtype).view(shape)


def _end(lease: weakref.finalize[Any, Any], data: Bytes, side: int, process: int) -> None:
    _leases.discard(lease)
    if os.getpid() == process:
        data[side] = 0


def _keep() -> None:
    """Never use again the blocks of tensors that a child process is about to inherit: it shares their memory."""
    for lease in list(_leases):
        lease.detach()
    _leases.clear()


os.register_at_fork(before=_keep, after_in_child=_blocks.clear)


def _reduced(lent: Lent) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
    if not lent.block.send():
        return torch.clone, (lent.as_subclass(torch.Tensor).clone(),)
    return _received, (lent.block.path, lent.block.name, lent.block.process, lent.dtype, tuple(lent.shape))


register(Lent, _reduced)

_mapped: dict[str, tuple[int, Bytes]] = {}
"""Blocks of other processes by name, with the process: what stays mapped is not mapped again for the next batch."""


def _received(path: str, name: str, maker: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in _mapped:
        for other in [other for other, (process, _) in _mapped.items() if not _runs(process)]:
            del _mapped[other]
        fd = os.open(path, os.O_RDWR)
        try:
            _mapped[name] = maker, _mapping(fd)
        finally:
            os.close(fd)
    return _leased(_mapped[name][1], _RECEIVER, dtype, shape)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def can_lend() -> bool:
    """Whether the process that started this one can map what is made here."""
    return hasattr(os, "memfd_create") and os.access(f"/proc/{os.getppid()}/fd", os.R_OK | os.X_OK)


def lent(batch: Any) -> Any:
    """A batch, all tensors of which cost nothing to send: in dicts, in tuples and named tuples, or itself.

    A tensor that a worker makes is otherwise copied into new memory of the system for each batch, which costs more than
    making it. Here the same blocks serve again, each as soon as nothing refers to the tensor in it, or to a view
    of it, on either side. There are as many as were in use at once.
    """
    if isinstance(batch, torch.Tensor):
        return _lent(batch)
    if isinstance(batch, dict):
        return {name: lent(value) for name, value in batch.items()}
    return batch._make(map(lent, batch)) if hasattr(batch, "_make") else tuple(map(lent, batch))


def _lent(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.nbytes:
        return tensor
    fitting = (block for block in _blocks if block.free and tensor.nbytes <= block.size <= 2 * tensor.nbytes)
    block = next(fitting, None)
    if block is None:
        block = _Block(tensor.nbytes)
        _blocks.append(block)
    made = torch.Tensor._make_subclass(Lent, _leased(block.memory, _MAKER, tensor.dtype, tensor.shape))
    made.copy_(tensor)
    made.block = block
    return made
