"""Work that is done in a thread of its own, a few steps before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(work: Callable[[In], Out], items: Iterable[In], depth: int) -> Iterator[Out]:
    """``work(item)`` for each of `items`, in order, up to `depth` of them done before they are asked for.

    An error is raised where its result would have come. The thread ends with the iterator; with a `depth` of 0 there
    is none.
    """
    if not depth:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="actcache-stream")
    try:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
