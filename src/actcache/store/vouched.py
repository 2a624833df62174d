"""Which files are what this process has written a moment ago, so that nobody needs to read them again to know."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# To read and hash less than that takes no time.
_LEAST = 4 << 20


class Vouched:
    """Files that were written in one go from memory, as they were when they were finished. Thread-safe."""

    def __init__(self) -> None:
        self._states: dict[Path, tuple[int, ...]] = {}

    def add(self, path: Path) -> None:
        """The file at `path` is finished, and as it should be. A small one is not noted."""
        state = _state(path)
        if state and state[0] >= _LEAST:
            self._states[path] = state

    def discard(self, path: Path) -> None:
        """Nobody will ask for it any more."""
        self._states.pop(path, None)

    def __contains__(self, path: Path) -> bool:
        """Whether it has been noted, and nobody has touched it since."""
        return bool(state := self._states.get(path)) and state == _state(path)


def _state(path: Path) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino
    return ()
