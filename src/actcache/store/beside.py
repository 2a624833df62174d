"""Work in a second thread, beside what its owner does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
