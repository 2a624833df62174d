"""Work in a second thread, beside what its owner does meanwhile."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

LARGE = 4 << 20
"""What so many bytes are looked at for is done beside writing them; for less a thread is not worth its beginning."""


class Beside:
    """`work` in a thread of its own while a ``with`` block runs, which waits for it, and raises what it has raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="actcache-beside", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            # No thread can be started any more, as at the end of a process.
            self._thread = None
            self._run()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except BaseException:
            # What has ended the block says more.
            if error is None:
                raise

    def wait(self) -> None:
        """Return when it is done, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error


class Background:
    """A thread that does one thing after another as its owner tells it, who computes meanwhile. Not thread-safe.

    In a child process it is another one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def do(self, work: Callable[[], object]) -> None:
        """Have `work` done when all that was told before is; not at all, where something of that has failed."""
        if self._pid != os.getpid():
            self._begin_anew()
        if self._error is not None:
            return
        if self._thread is None:
            thread = threading.Thread(target=_do_all, args=(self._asked, self._answers), daemon=True, name=self._name)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:
                # No thread can be started any more, as at the end of a process.
                self._error = _raised(work)
                return
        self._asked.put(work)

    def wait(self) -> None:
        """Return when all is done, and raise what the first to fail has raised."""
        if self._pid != os.getpid():
            self._begin_anew()
        error, self._error = self._error, None
        if self._thread is not None:
            self._asked.put(_answer)
            error = self._answers.get() or error
        if error is not None:
            raise error

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Wait at the end of the block, whatever happens in it: what is worked on is nobody else's before that."""
        try:
            yield
        except BaseException:
            # What has ended the block says more.
            with contextlib.suppress(BaseException):
                self.wait()
            raise
        self.wait()

    def stop(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread = None


def _answer() -> None:
    """What asks for an answer."""


def _raised(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def _do_all(
    asked: queue.SimpleQueue[Callable[[], object] | None], answers: queue.SimpleQueue[BaseException | None]
) -> None:
    error: BaseException | None = None
    while (work := asked.get()) is not None:
        if work is _answer:
            answers.put(error)
            error = None
        elif error is None:
            error = _raised(work)
        # What it refers to is not kept until there is more to do.
        del work
