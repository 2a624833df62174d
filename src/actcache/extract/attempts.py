"""Batches that fail are tried again, where that may help."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from actcache.errors import ActCacheError, EngineUnavailableError, OptionError, TransientEngineError
from actcache.extract.backends import SweepingSession
from actcache.extract.batching import Batch
from actcache.store.files import log

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from actcache.extract.backends import Backend, Rows, Session

T = TypeVar("T")

# Seconds before the first repetition, twice as many before each further one, and the most.
_FIRST, _MOST = 2.0, 60.0
# Batches in a row that failed for good without reaching anybody, or at a service that is out of order.
_IN_A_ROW = 3


class Attempts:
    """Runs batches, each up to ``most + 1`` times.

    What is tried again: errors that a backend calls transient, and those that are not ours (a driver's, a disk's).

    Args:
        most: repetitions of one batch; None for what suits the backend.
    """

    def __init__(self, backend: Backend, most: int | None = None) -> None:
        self.most = backend.retries if most is None else most
        self._lost = 0

    def all_rows(
        self,
        session: Session,
        todo: Sequence[Batch],
        ids: Sequence[npt.NDArray[np.int32]],
        positions: Sequence[Any] | None,
        on_failure: Callable[[Batch, Exception], None] | None,
    ) -> Iterator[tuple[Batch, Rows]]:
        """The same as `rows` for each batch of `todo`; many at once where the session can."""
        if len(todo) > 1 and isinstance(session, SweepingSession) and session.sweeps:
            given = (([ids[i] for i in b.indices], positions and [positions[i] for i in b.indices]) for b in todo)
            for batch, rows in zip(todo, session.sweep(given), strict=True):
                if rows is not None:
                    yield batch, rows
                else:
                    yield from self.rows(session, batch, ids, positions, on_failure)
            return
        for batch in todo:
            yield from self.rows(session, batch, ids, positions, on_failure)

    def rows(
        self,
        session: Session,
        batch: Batch,
        ids: Sequence[npt.NDArray[np.int32]],
        positions: Sequence[Any] | None,
        on_failure: Callable[[Batch, Exception], None] | None,
    ) -> Iterator[tuple[Batch, Rows]]:
        """`batch` and its rows, or where memory runs out its halves and theirs; what fails is passed to `on_failure`,
        without it raised."""
        from torch import OutOfMemoryError

        sequences = [ids[i] for i in batch.indices]
        where = positions and [positions[i] for i in batch.indices]
        try:
            rows = self.run(lambda: session.run(sequences, where))
        except EngineUnavailableError:
            raise
        except OutOfMemoryError as error:
            if len(batch.indices) == 1:
                _fail(batch, error, on_failure)
                return
            half = len(batch.indices) // 2
            for part in (batch.indices[:half], batch.indices[half:]):
                lengths = [len(ids[i]) for i in part]
                smaller = Batch(part, max(lengths), len(set(lengths)) > 1)
                yield from self.rows(session, smaller, ids, positions, on_failure)
        except Exception as error:
            _fail(batch, error, on_failure)
        else:
            yield batch, rows

    def run(self, batch: Callable[[], T]) -> T:
        """What `batch` returns, at last; else its last error, or `EngineUnavailableError` when nothing would come of
        the next batch either."""
        from torch import OutOfMemoryError

        for attempt in range(self.most + 1):
            try:
                result = batch()
            except OutOfMemoryError:
                raise
            except Exception as error:
                transient = isinstance(error, TransientEngineError)
                if isinstance(error, ActCacheError) and not transient:
                    raise
                if attempt == self.most:
                    self._give_up(error)
                    raise
                seconds = delay(attempt)
                log.warning(
                    "a batch failed (%s: %s); trying again in %.1f s, %d of %d",
                    type(error).__name__, error, seconds, attempt + 1, self.most,
                )  # fmt: skip
                pause(seconds)
            else:
                self._lost = 0
                return result
        raise AssertionError("the last attempt returns or raises")

    def _give_up(self, error: Exception) -> None:
        if not isinstance(error, TransientEngineError):
            return
        self._lost += 1
        if error.unreachable or self._lost >= _IN_A_ROW:
            tried = f" {self.most + 1} times" if self.most else ""
            raise EngineUnavailableError(
                f"{error} (tried{tried}). What was finished is stored: the same call goes on from there."
            ) from error


def _fail(batch: Batch, error: Exception, on_failure: Callable[[Batch, Exception], None] | None) -> None:
    if on_failure is None:
        raise error
    on_failure(batch, error)


def delay(attempt: int) -> float:
    """Seconds before repetition `attempt` (from 0): doubling, and a little different for each of many clients."""
    return min(_MOST, _FIRST * 2.0**attempt) * random.uniform(0.75, 1.25)


def pause(seconds: float) -> None:
    time.sleep(seconds)


def check_retries(max_retries: object) -> None:
    """Raise `OptionError` for what is no number of repetitions; None is the backend's own."""
    if max_retries is None:
        return
    if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
        raise OptionError(f"max_retries is {max_retries!r}: expected 0 or a positive integer, or None for the default.")
