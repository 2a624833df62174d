"""Work in several threads at once, which take turns often."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns every few instructions, as they rarely do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, all begun at once; the first error is raised."""
    start, errors = threading.Barrier(len(works)), []

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in another thread."""
    results: list[Any] = []
    together(lambda: results.append(work()))
    return results[0]
