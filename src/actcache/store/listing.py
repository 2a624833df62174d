"""The names in a folder in which others are at work."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from actcache.store.files import OPEN_NAME, SEGMENT_NAME, TEMP_NAME

_RACY_NS, _COARSE_NS = 250_000_000, 2_500_000_000
_LISTINGS = 8
_NEVER, _ABANDONED_NS = 1 << 63, 3_600_000_000_000


class Listing:
    """Lists a folder when something in it may have changed: one `stat` when nothing did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = str(folder)
        self._seen: tuple[int, int] | None = None
        """When it was listed, and the folder's time stamp of then, as far as what was listed has been taken in."""
        self._last: tuple[int, int] | None = None
        self.writing_since = _NEVER
        """When the oldest file was begun, in nanoseconds, that others were writing at the last look."""

    def settle(self) -> None:
        """What the last look has found is taken in."""
        self._seen = self._last

    def forget(self) -> None:
        """List at the next look, whatever the time stamp says."""
        self._seen = self._last = None

    def look(self, *, force: bool = False) -> set[str] | None:
        """Every name in the folder; None where nothing can have changed since the last look that was settled."""
        changed = self._stamp()
        if not force and self._seen is not None:
            listed_at, seen = self._seen
            # A change within one tick of the file system's clock leaves the same time stamp.
            if changed == seen and _is_settled(listed_at, changed):
                return None
        listed_at = time.time_ns()
        names = self._whole(changed, _is_settled(listed_at, changed)) if changed >= 0 else set()
        self._last = listed_at, changed
        begun = [int(name[:16], 16) for name in names if TEMP_NAME.fullmatch(name)]
        self.writing_since = min((ns for ns in begun if ns > listed_at - _ABANDONED_NS), default=_NEVER)
        return names

    def _stamp(self) -> int:
        try:
            return os.stat(self._path).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return -1

    def _whole(self, changed: int, settled: bool) -> set[str]:
        """The names, listed until nothing goes missing in between.

        No instant is listed: a merged segment can appear behind the reading position and its sources go before it
        gets to them, so that one listing shows neither; likewise a file that grew and now has its final name.
        """
        names = self._names()
        if settled and self._stamp() == changed:
            return names
        for _ in range(_LISTINGS):
            before, names = names, self._names()
            if not any(SEGMENT_NAME.fullmatch(name) or OPEN_NAME.fullmatch(name) for name in before - names):
                break
        return names

    def _names(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return {e.name for e in entries}
        return set()


def _is_settled(listed_at: int, changed: int) -> bool:
    """Whether any later change must show in the folder's time stamp."""
    # Some file systems keep whole seconds, or even ones.
    return listed_at - changed > (_RACY_NS if changed % 1_000_000_000 else _COARSE_NS)
