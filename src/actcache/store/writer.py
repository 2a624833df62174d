"""A thread that writes segments behind the next forward pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from actcache.store.files import log
from actcache.store.quantize import BLOCK_ROWS
from actcache.store.records import Records

_GROUP_BYTES = 32 << 20
# Rows that are written together share scales, of which fewer rows need as many.
_SCALED_ROWS, _SCALED_LINGER = 4 * BLOCK_ROWS, 1.0


class Ticket:
    """What `put` gives for records: whether they are durable, once that is known."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._durable = False

    def wait(self) -> bool:
        """Return when the records are durable (True), or when they never will be (False)."""
        self._known.wait()
        return self._durable

    def settle(self, durable: bool) -> None:
        """Tell those who wait."""
        self._durable = durable
        self._known.set()


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Records in the queue, and the ticket of what has to be durable before them."""

    records: Records
    after: Ticket | None
    ticket: Ticket = field(default_factory=Ticket)


class SegmentWriter:
    """Takes records and makes them durable in the background; a context manager.

    `put` blocks while more than `max_bytes` wait, and never drops. What waits and agrees in layout, sites,
    dtypes and text context goes into one segment: the thread comes round when 32 MB wait, `linger` seconds
    after the first (a second, for so few rows of int8 or float8_e4m3 that their scales would weigh as much as they),
    or at `flush` and `close`. An error of the thread is raised by the next of these calls
    (DiskFullError, StoreAccessError, ...); what was written before it stays. The arrays in the records must
    not be changed after `put`.

    What is computed from other records is put with their ticket: it is never durable before them, and left out
    where they could not be stored.
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
        self._queue: deque[_Waiting] = deque()
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

    def put(self, records: Records, *, after: Ticket | None = None) -> Ticket:
        """Queue `records`; blocks while the queue is full.

        `after`: another writer's ticket, of what they are computed from.
        """
        records.check()
        waiting = _Waiting(records, after)
        size = records.nbytes
        with self._changed:
            while self._queued and self._queued + size > self._max_bytes and self._error is None:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait()
            self._raise()
            if self._closing:
                raise ValueError("the writer is closed")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="actcache-writer", daemon=True)
                # Before anything is in the queue: where no thread can be started, nobody would ever take it out.
                thread.start()
                self._thread = thread
            if not self._queue:
                self._first = time.monotonic()
            self._queue.append(waiting)
            self._queued += size
            self._changed.notify_all()
        return waiting.ticket

    def flush(self) -> None:
        """Return when everything put so far is durable."""
        with self._changed:
            while (self._queue or self._writing) and self._error is None:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait()
            self._raise()

    @contextmanager
    def flushed(self) -> Iterator[SegmentWriter]:
        """A block behind which everything is durable that was put, also where the block itself failed."""
        try:
            yield self
        except BaseException:
            try:
                self.flush()
            except Exception as second:
                # The caller's own error says more; what was not written shows as missing.
                log.warning("and the last batches could not be stored: %s", second)
            raise
        self.flush()

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
            if not self._written(group):
                return
            # Whoever waits for the next records does not hold these.
            del group

    def _written(self, group: list[_Waiting]) -> bool:
        """Store what was taken from the queue; False where that failed, and nothing more is stored."""
        try:
            # Outside the lock: what is waited for is another writer's, which nobody here holds up.
            stored = [w for w in group if w.after is None or w.after.wait()]
            if stored:
                self._append([w.records for w in stored])
        except BaseException as error:
            with self._changed:
                # Later batches would fail for the same reason; the caller decides.
                self._error = error
                for lost in (*group, *self._queue):
                    lost.ticket.settle(False)
                self._queue.clear()
                self._queued = 0
                self._writing = False
                self._thread = None
                self._changed.notify_all()
            return False
        if len(stored) < len(group):
            log.info("%d batches are left out: what they were computed from was not stored", len(group) - len(stored))
        for each in group:
            each.ticket.settle(each in stored)
        with self._changed:
            self.bytes_written += sum(w.records.nbytes for w in stored)
            self._queued -= sum(w.records.nbytes for w in group)
            self._writing = False
            self._first = time.monotonic()
            self._hurry = self._hurry and bool(self._queue)
            self._changed.notify_all()
        return True

    def _due(self) -> bool:
        if not self._queue:
            return False
        late = time.monotonic() >= self._late_at()
        return self._closing or self._hurry or late or self._queued >= _GROUP_BYTES

    def _late_at(self) -> float:
        rows = sum(int(w.records.row_offset[-1]) for w in self._queue)
        few = self._queue[0].records.is_scaled and rows < _SCALED_ROWS
        return self._first + (max(self._linger, _SCALED_LINGER) if few else self._linger)

    def _next_group(self) -> list[_Waiting]:
        group = [self._queue.popleft()]
        signature: tuple[Any, ...] = group[0].records.signature
        size = group[0].records.nbytes
        # Only neighbours are joined, so that what was put first is never written after what came later.
        while self._queue and size < 2 * _GROUP_BYTES and self._queue[0].records.signature == signature:
            group.append(self._queue.popleft())
            size += group[-1].records.nbytes
        return group
