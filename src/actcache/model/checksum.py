"""Checksums of a tensor's bytes, computed where the tensor lies, at about the speed of its memory."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

_BLOCK = 4096
# Blocks at a time on an accelerator: the products need room.
_CHUNK = 2048


def local_checksum(tensor: Tensor) -> int:
    """A number that changes with any byte of `tensor`; 0 as of `checksum`. On another device it is another number.

    On the processor it is xxh3-128 of the bytes, which takes no longer than reading them: `checksum` takes twice that.
    """
    if not tensor.is_cpu or _has_no_bytes(tensor):
        return checksum(tensor)
    octets: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_128_intdigest(octets)


def checksum(tensor: Tensor) -> int:
    """A number that changes with any byte of `tensor`, the same on every device; 0 for what has no bytes of its own
    (meta tensors) or hides them (torch's quantised dtypes).

    The bytes are read as integers of 64 bits and multiplied with odd weights, modulo 2**64, by blocks of 32 KiB: no
    change of one integer leaves its block's sum as it was. The sums, and the bytes behind the last whole block, are
    hashed with xxh3-64.
    """
    if _has_no_bytes(tensor):
        return 0
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = octets.numel() // (8 * _BLOCK) * 8 * _BLOCK
    hasher = xxhash.xxh3_64()
    if whole:
        weights = torch.arange(1, 2 * _BLOCK, 2, device=octets.device)
        head = octets[:whole]
        if head.data_ptr() % 8 or head.storage_offset() % 8:
            # A slice of a file may begin at any byte.
            head = head.clone()
        blocks = head.view(torch.int64).view(-1, _BLOCK)
        if blocks.is_cpu:
            sums = blocks @ weights
        else:
            sums = torch.cat([(chunk * weights).sum(1) for chunk in blocks.split(_CHUNK)]).cpu()
        hasher.update(sums.numpy().tobytes())
    hasher.update(octets[whole:].cpu().numpy().tobytes())
    return hasher.intdigest()


def _has_no_bytes(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.is_quantized or tensor.numel() == 0
