"""Length-sorted batches under a token budget, equal lengths together first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actcache.errors import OptionError
from actcache.model.invariance import Lengths

CPU_TOKEN_BUDGET = 512
ACCELERATOR_TOKEN_BUDGET = 16_384


@dataclass(frozen=True)
class Batch:
    """Prompts that go through the model together.

    Attributes:
        indices: positions in the list of lengths, in the order of the batch's rows.
        length: the padded length, that of the longest.
        ragged: whether lengths differ, so that a mask is needed.
    """

    indices: tuple[int, ...]
    length: int
    ragged: bool


def check_limits(batch_size: int | None, max_batch_tokens: int | None) -> None:
    """Refuse limits that are not positive integers (`OptionError`)."""
    for name, value in (("batch_size", batch_size), ("max_batch_tokens", max_batch_tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name} is {value!r}: expected a positive integer, or None for no limit of that kind.")


def token_budget(device: str) -> int:
    """Padded tokens per batch that suit a device when the caller asks for nothing."""
    return CPU_TOKEN_BUDGET if device.split(":")[0] == "cpu" else ACCELERATOR_TOKEN_BUDGET


def make_batches(
    lengths: Sequence[int], *, max_tokens: int, batch_size: int | None = None, together: Lengths = "any"
) -> list[Batch]:
    """Split prompts of the given token counts into batches that hold every prompt once, longest first.

    Lengths that fill a batch of their own go first: such a batch has no padding, needs no mask, and gives
    each prompt the very numbers it has alone. What is left over is padded to the longest of its batch.
    A batch holds at most `max_tokens` padded tokens (one prompt alone may exceed it) and at most
    `batch_size` prompts. `together` says which may share one: those of "any" length, of "equal" length, or none
    ("alone").
    The longest batches run first, so that memory runs out at once or never.
    """
    if together == "alone":
        batch_size = 1
    by_length: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_length.setdefault(n, []).append(i)
    batches: list[Batch] = []
    left: list[int] = []
    for length in sorted(by_length, reverse=True):
        same = by_length[length]
        room = _room(length, max_tokens, batch_size)
        full = len(same) if together == "equal" else len(same) - len(same) % room
        batches += [Batch(tuple(same[k : k + room]), length, False) for k in range(0, full, room)]
        left += same[full:]
    start = 0
    while start < len(left):
        length = lengths[left[start]]
        chosen = left[start : start + _room(length, max_tokens, batch_size)]
        start += len(chosen)
        batches.append(Batch(tuple(chosen), length, lengths[chosen[-1]] != length))
    batches.sort(key=lambda b: -b.length)
    return batches


def _room(length: int, max_tokens: int, batch_size: int | None) -> int:
    room = max(1, max_tokens // max(1, length))
    return room if batch_size is None else min(room, batch_size)
