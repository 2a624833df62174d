"""A thread that writes segments behind the next forward pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from actcache.store.files import log
from actcache.store.quantize import BLOCK_ROWS
from actcache.store.records import Records

_GROUP_BYTES = 32 << 20
# Rows that are written together share scales, of which fewer rows need as many.
_SCALED_ROWS, _SCALED_LINGER = 4 * BLOCK_ROWS, 1.0


class SegmentWriter:
    """Takes records and makes them durable in the background; a context manager.

    `put` blocks while more than `max_bytes` wait, and never drops. What waits and agrees in layout, sites,
    dtypes and text context goes into one segment: the thread comes round when 32 MB wait, `linger` seconds
    after the first (a second, for so few rows of int8 or float8_e4m3 that their scales would weigh as much as they),
    or at `flush` and `close`. An error of the thread is raised by the next of these calls
    (DiskFullError, StoreAccessError, ...); what was written before it stays. The arrays in the records must
    not be changed after `put`.
    """

    def __init__(
        self,
        append: Callable[[list[Records]], object],
        finish: Callable[[bool], object],
        *,
        max_bytes: int,
        linger: float,
    ) -> None:
        self._append = append
        self._finish = finish
        self._max_bytes = max_bytes
        self._linger = linger
        self._changed = threading.Condition()
        self._queue: deque[Records] = deque()
        self._queued = 0
        self._writing = False
        self._first = 0.0
        self._hurry = False
        self._closing = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.bytes_written = 0
        """Bytes of vectors and index that are durable so far."""

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(merge=error is None)
        except Exception as second:
            # The caller's own error says more; what was not written shows as missing.
            if error is None:
                raise
            log.warning("and the last batches could not be stored: %s", second)

    def put(self, records: Records) -> None:
        """Queue `records`; blocks while the queue is full."""
        records.check()
        size = records.nbytes
        with self._changed:
            while self._queued and self._queued + size > self._max_bytes and self._error is None:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait()
            self._raise()
            if self._closing:
                raise ValueError("the writer is closed")
            if not self._queue:
                self._first = time.monotonic()
            self._queue.append(records)
            self._queued += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="actcache-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Return when everything put so far is durable."""
        with self._changed:
            while (self._queue or self._writing) and self._error is None:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait()
            self._raise()

    def close(self, *, merge: bool = True) -> None:
        """Flush, end the thread, and merge the small segments that have piled up."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None
        try:
            self._raise()
        except BaseException:
            self._finish(False)
            raise
        self._finish(merge and self.bytes_written > 0)

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    if self._closing and not self._queue:
                        return
                    remaining = self._late_at() - time.monotonic() if self._queue else None
                    self._changed.wait(remaining)
                group = self._next_group()
                self._writing = True
            try:
                self._append(group)
                size = sum(r.nbytes for r in group)
            except BaseException as error:
                with self._changed:
                    # Later batches would fail for the same reason; the caller decides.
                    self._error = error
                    self._queue.clear()
                    self._queued = 0
                    self._writing = False
                    self._thread = None
                    self._changed.notify_all()
                return
            with self._changed:
                self.bytes_written += size
                self._queued -= size
                self._writing = False
                self._first = time.monotonic()
                self._hurry = self._hurry and bool(self._queue)
                self._changed.notify_all()

    def _due(self) -> bool:
        if not self._queue:
            return False
        late = time.monotonic() >= self._late_at()
        return self._closing or self._hurry or late or self._queued >= _GROUP_BYTES

    def _late_at(self) -> float:
        few = self._queue[0].is_scaled and sum(int(r.row_offset[-1]) for r in self._queue) < _SCALED_ROWS
        return self._first + (max(self._linger, _SCALED_LINGER) if few else self._linger)

    def _next_group(self) -> list[Records]:
        group = [self._queue.popleft()]
        signature: tuple[Any, ...] = group[0].signature
        size = group[0].nbytes
        # Only neighbours are joined, so that what was put first is never written after what came later.
        while self._queue and size < 2 * _GROUP_BYTES and self._queue[0].signature == signature:
            group.append(self._queue.popleft())
            size += group[-1].nbytes
        return group
