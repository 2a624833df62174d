"""Several things at a time, until one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from actcache.store.locks import is_ending

T = TypeVar("T")


def together(
    jobs: Sequence[Callable[[], T]],
    threads: int,
    *,
    ended_by: type[BaseException] = BaseException,
    undo: Callable[[T], object] | None = None,
) -> list[T]:
    """What each of `jobs` gives, in their order, with at most so many `threads`.

    Behind an error that is `ended_by` none begins any more: it might fail for as long again. When those that had begun
    have ended, the first error is raised, and what the others gave is handed to `undo`.
    """
    if len(jobs) < 2 or threads < 2 or is_ending():
        return _one_by_one(jobs, undo)
    over = threading.Event()

    def result(job: Callable[[], T]) -> list[T]:
        if over.is_set():
            return []
        try:
            return [job()]
        except ended_by:
            # Here, and not where it is waited for: this thread takes the next one at once.
            over.set()
            raise

    with ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="actcache-together") as pool:
        futures = [pool.submit(result, job) for job in jobs]
        try:
            wait(futures)
            return [given for future in futures for given in future.result()]
        except BaseException:
            over.set()
            pool.shutdown(cancel_futures=True)
            for future in futures:
                if undo is not None and not future.cancelled() and future.exception() is None:
                    for given in future.result():
                        undo(given)
            raise


def _one_by_one(jobs: Sequence[Callable[[], T]], undo: Callable[[T], object] | None) -> list[T]:
    given: list[T] = []
    try:
        given.extend(job() for job in jobs)
    except BaseException:
        if undo is not None:
            for one in given:
                undo(one)
        raise
    return given
