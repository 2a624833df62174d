"""What goes to obstore and what it answers, as bytes and numbers."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from actcache.store.backend import Bytes
from actcache.store.object_errors import ShortBodyError


def taken(answer: Any) -> tuple[Bytes, int]:
    """The bytes of an answer, and the size of the whole object; ShortBodyError where fewer came than it announced."""
    start, stop = answer.range
    data = memoryview(answer.bytes())
    if len(data) != stop - start:
        raise ShortBodyError(f"{len(data)} bytes came where {stop - start} were announced")
    return data, answer.meta["size"]


def buffer_of(source: Bytes | Path) -> memoryview:
    """The bytes of `source`; a file is mapped, not read into memory."""
    if not isinstance(source, Path):
        return memoryview(source).cast("B")
    with source.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        # Not closed here: a request that was given up may hold it for another moment.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def nanoseconds(moment: Any) -> int:
    """A `datetime` as nanoseconds since 1970; 0 for None."""
    return 0 if moment is None else int(moment.timestamp() * 10**9)
