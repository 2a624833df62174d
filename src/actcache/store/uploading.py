"""A thread that uploads what is stored in a working copy, in few and large objects."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.errors import BackendError, StoreAccessError
from actcache.store import adoption, merging
from actcache.store.files import OPEN_NAME, SEGMENT_NAME, SPACE_NAME, log
from actcache.store.index import SpaceIndex
from actcache.store.salvage import salvage
from actcache.store.spool import PATIENCE_S
from actcache.store.working_copy import WorkingCopy

if TYPE_CHECKING:
    from actcache.store.appending import Appender

LINGER_S = 10.0
"""How long what was stored on its own waits for more."""

_LEAST = 8 << 20
_MOST_SPOOLED = 2 << 30
_AGAIN_S, _IDLE_S = 60.0, 30.0


class Uploader:
    """Uploads what lies in a working copy alone, whichever process of this host has written it. Thread-safe.

    An error of the thread is raised by the next `check`, `make_room` or `flush` (BackendError, StoreAccessError, ...);
    what could not be uploaded stays, and the thread tries again after a minute.
    """

    def __init__(self, copy: WorkingCopy, index: Callable[[str], SpaceIndex], lock_folder: Path) -> None:
        self._copy, self._index, self._lock_folder = copy, index, lock_folder
        self._changed, self._merging = threading.Condition(), threading.Lock()
        self._due: dict[str, float] = {}
        """When all of a space is to be uploaded, of `time.monotonic`."""
        self._grown: set[str] = set()
        self._errors: dict[str, Exception] = {}
        self._thread: threading.Thread | None = None
        self._appenders: weakref.WeakSet[Appender] = weakref.WeakSet()
        self._begun = False
        self.has_written = False
        """Whether this process has stored anything: only then do errors concern it."""

    # -- what there is to do -------------------------------------------------------------------------------

    def begin(self) -> None:
        """At the first use of a store: upload what other processes have left, in the background."""
        if self._begun:
            return
        with self._changed:
            self._begun = True
            for space in self._waiting():
                self._due[space] = 0.0
            if self._due:
                self._start()

    def note(self, space: str, *, linger: bool, written: Path | None = None) -> None:
        """Something was stored in a space: it is uploaded when much has gathered, with `linger` in any case soon.

        `written`: the segment, where this process has written it just now.
        """
        if written is not None:
            self._copy.spool.vouched.add(written)
        with self._changed:
            self.has_written = True
            self._grown.add(space)
            if linger:
                self._due.setdefault(space, time.monotonic() + LINGER_S)
            self._start()

    def watch(self, appender: Appender) -> None:
        """`flush` makes segments of what this one has written so far."""
        self._appenders.add(appender)

    def hurry(self) -> None:
        """Nobody will ask for it any more: whatever waits is uploaded now, in the background."""
        with self._changed:
            for space in self._waiting() if self.has_written else ():
                self._due[space] = 0.0
            if self._due:
                self._start()

    def check(self) -> None:
        """Raise the error of the thread, if there is one."""
        with self._changed:
            errors = list(self._errors.values())
            self._errors.clear()
        if errors:
            raise errors[0]

    def make_room(self, space: str) -> None:
        """Return when not too much waits in a space, after uploading some of it where that is needed."""
        self.check()
        if sum(size for _, size in self._copy.spool.spooled(space)) > _MOST_SPOOLED:
            self._put(space, _LEAST, PATIENCE_S)

    def flush(self, spaces: Iterable[str] | None = None) -> None:
        """Return when all that is finished in these spaces (None: in all) is uploaded.

        Raises as the backend does, also what the thread has met; what could not be uploaded stays.
        """
        for appender in list(self._appenders) if spaces is None else ():
            appender.seal()
        wanted = self._waiting() if spaces is None else list(spaces)
        with self._changed:
            for space in wanted:
                self._errors.pop(space, None)
                self._due.pop(space, None)
                self._grown.discard(space)
        errors = []
        for space in wanted:
            try:
                self._upload_all(space, PATIENCE_S)
            except Exception as error:
                errors.append(error)
                with self._changed:
                    self._due[space] = time.monotonic() + _AGAIN_S
                    self._start()
        if errors:
            raise errors[0]

    def _waiting(self) -> list[str]:
        """The spaces with something to upload: spooled segments, and files that grew, or still do."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for space in sorted(filter(SPACE_NAME.fullmatch, os.listdir(self._copy.root))):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    names = set(os.listdir(self._copy.root / space))
                    if any(
                        OPEN_NAME.fullmatch(n) or (SEGMENT_NAME.fullmatch(n) and f"{n[:32]}.have" not in names)
                        for n in names
                    ):
                        found.append(space)
        return found

    # -- doing it ------------------------------------------------------------------------------------------

    def _upload_all(self, space: str, wait_s: float) -> None:
        """Make few segments of what lies here alone, and upload them."""
        index = self._index(space)
        # One after the other: what one merges the other would upload meanwhile.
        with self._merging:
            try:
                adoption.adopt(index, self._lock_folder)
                merging.merge_spooled(index, self._lock_folder, few=2)
            except (BackendError, StoreAccessError):
                raise
            except OSError as error:
                log.warning("merging before an upload failed: %s", error)
            done = self._put(space, 0, wait_s)
        if wait_s and not done:
            raise BackendError(f"another process goes on uploading to {self._copy.backend.url}: try again later")

    def _put(self, space: str, least: int, wait_s: float) -> bool:
        """Upload the spooled segments of at least `least` bytes; False where some are left to others, who are at it."""
        spool = self._copy.spool
        broken: list[Path] = []
        paths = [path for path, size in spool.spooled(space) if size >= least]

        def put(paths: list[Path]) -> bool:
            return spool.put_all(
                paths, wait_s=wait_s, superseded=lambda name: self._superseded(space, name), damaged=broken.append
            )

        done = put(paths)
        for path in broken.copy():
            index = self._index(space)
            done &= put([index.path(name) for name in salvage(index, self._lock_folder, path.name[:32])])
        # What is uploaded can be read again, and need not stay.
        self._copy.keep_size()
        return done

    def _superseded(self, space: str, name: str) -> bool:
        index = self._index(space)
        with index.lock:
            index.refresh()
            held = [index.path(info.name) for _, info in index.segments() if name in info.replaces]
        return any(not self._copy.spool.is_here_alone(path) for path in held)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="actcache-uploader", daemon=True)
            _at_work.add(self)
            # Where no thread can be started any more, what is stored is uploaded at the end.
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                idle_since = time.monotonic()
                while not (self._grown or self._ready()):
                    now = time.monotonic()
                    if not self._due and now - idle_since >= _IDLE_S:
                        self._thread = None
                        if not self._waiting():
                            _at_work.discard(self)
                        return
                    self._changed.wait(min([_IDLE_S, *(due - now for due in self._due.values())]))
                ready, grown = self._ready(), self._grown
                self._grown = set()
                for space in ready:
                    del self._due[space]
            for space in {*ready, *grown}:
                try:
                    if space in ready:
                        self._upload_all(space, 0.0)
                    elif self._has_gathered(space):
                        self._put(space, _LEAST, 0.0)
                    else:
                        continue
                except Exception as error:
                    self._failed(space, error)
                else:
                    with self._changed:
                        self._errors.pop(space, None)

    def _ready(self) -> list[str]:
        now = time.monotonic()
        return [space for space, due in self._due.items() if due <= now]

    def _has_gathered(self, space: str) -> bool:
        sizes = [size for _, size in self._copy.spool.spooled(space)]
        # One that is almost full does not wait for another.
        return 8 * sum(size for size in sizes if size >= _LEAST) >= 7 * merging.GATHERED

    def _failed(self, space: str, error: Exception) -> None:
        log.warning("uploading to %s failed, what is stored stays on this host: %s", self._copy.backend.url, error)
        with self._changed:
            if self.has_written:
                self._errors[space] = error
            self._due.setdefault(space, time.monotonic() + _AGAIN_S)

    # -- at the end ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Upload what waits; for the end of a process, when errors can only be said."""
        try:
            self.flush()
        except Exception as error:
            log.warning(
                "not everything could be uploaded to %s; what is left lies in %s, and whichever process opens the "
                "store next on this host uploads it: %s", self._copy.backend.url, self._copy.folder, error,
            )  # fmt: skip

    def after_fork(self) -> None:
        """In a child process: there is no thread, and what waits is the parent's to upload."""
        self._changed, self._merging = threading.Condition(), threading.Lock()
        self._due, self._grown, self._thread, self._errors = {}, set(), None, {}
        self.has_written = False
        self._appenders = weakref.WeakSet()


_at_work: set[Uploader] = set()


@atexit.register
def _at_exit() -> None:
    for uploader in list(_at_work):
        uploader.end()


if hasattr(os, "register_at_fork"):
    # Also those of stores that are no more, whose threads the child does not have: they are the parent's.
    os.register_at_fork(after_in_child=_at_work.clear)
