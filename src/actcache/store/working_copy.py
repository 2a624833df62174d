"""This host's working copy of a store whose objects lie elsewhere: a folder laid out as a store on files.

In the folder of a space lie mirrors of segments (see `actcache.store.mirror`), whole copies of tombs and of the
space's description, and what was written here and is not put yet: segments without a sidecar, and files that grow.
Only the latter must not be lost. All processes of the host share the folder.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from actcache.errors import BackendError, StoreAccessError
from actcache.store import behind, mirror
from actcache.store.backend import CacheBackend
from actcache.store.fetcher import Fetcher, Threads
from actcache.store.files import log, remove
from actcache.store.pulling import MOST_SMALL, Pull, begin_mirror, bring, same_head
from actcache.store.spaces import ROOT
from actcache.store.spool import Spool

# Of the limit so many parts are fetched before anybody looks at what all mirrors take.
_LOOKS = 16


def usable(folder: Path, url: str) -> Path:
    """`folder`, or a temporary one where it cannot be made or written, with a warning."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    if folder not in _instead:
        made = _instead[folder] = Path(tempfile.mkdtemp(prefix="actcache-"))
        atexit.register(_forget, made, os.getpid())
        log.warning(
            "%s cannot be written: what this process reads of %s, and writes before it is put there, is kept in %s, "
            "and goes with it; choose another folder with index_dir= or XDG_CACHE_HOME", folder, url, made,
        )  # fmt: skip
    return _instead[folder]


_instead: dict[Path, Path] = {}
"""Temporary folders, by what could not be written."""


def _content(path: Path) -> bytes | None:
    """What is in a file; None where there is none, as when another process has just removed it."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _forget(made: Path, process: int) -> None:
    """At the end of a process: remove its temporary folder, unless something in it was not put."""
    if process != os.getpid():
        return
    alone = [p for p in made.glob(f"{ROOT}/*/*.safetensors") if not mirror.is_mirror(p)]
    if alone or any(made.glob(f"{ROOT}/*/*.open")):
        log.warning("%s is kept: what is stored in it lies nowhere else", made)
    else:
        shutil.rmtree(made, ignore_errors=True)


class WorkingCopy:
    """The objects of `backend` as files below `folder`; thread-safe, and shared by the processes of this host.

    `local_bytes`: how much mirrors may hold of rows that were read; None is no limit.
    """

    def __init__(self, backend: CacheBackend, folder: Path, local_bytes: int | None = None) -> None:
        self.backend, self.local_bytes = backend, local_bytes
        self.folder = usable(folder, backend.url)
        self.root = self.folder / ROOT
        self.spool = Spool(self)
        """The way of what is stored here, and of all of it out again."""
        self._fetched: float = math.inf
        self._pulling = threading.Lock()
        self._pulled: dict[str | None, float] = {}
        self._threads = Threads(backend)
        self._scope = threading.local()
        self.trim: Callable[[], object] = lambda: None
        """Brings mirrors below their limit; who knows when each was read says how."""

    def name_of(self, path: Path) -> str:
        """The name of the object that the file at `path` stands for, or will be put as."""
        return path.relative_to(self.folder).as_posix()

    # -- reading ---------------------------------------------------------------------------------------

    def pull(self, space: str | None = None, *, unless_since: float = math.inf) -> bool:
        """Take notice of what others have put or deleted, in one space or in all; whether anything has changed here.

        Nothing is done where another thread's pull has begun after the moment `unless_since` (of `time.monotonic`).

        One listing, and one read for each segment and tomb that is new. Raises BackendError or StoreAccessError.
        """
        with self._pulling:
            began = time.monotonic()
            if self._last_pull(space) > unless_since:
                return False
            changed = Pull(self, space).run()
            self._pulled[space] = began
            return changed

    def pulled_since(self, space: str | None, moment: float) -> bool:
        """Whether a pull of `space` has begun after `moment` (of `time.monotonic`), and is done."""
        moment = min(moment, getattr(self._scope, "began", moment))
        return self._last_pull(space) > moment

    def _last_pull(self, space: str | None) -> float:
        """When the last pull of `space` began that is done; 0 where there was none."""
        return max(self._pulled.get(space, 0.0), self._pulled.get(None, 0.0))

    @contextlib.contextmanager
    def looking_once(self) -> Iterator[None]:
        """For this thread, what has been pulled since the beginning of the block is fresh enough in it."""
        if hasattr(self._scope, "began"):
            yield
            return
        self._scope.began = time.monotonic()
        try:
            yield
        finally:
            del self._scope.began

    def begin(self, space: str | None) -> None:
        """`pull` unless this was done since the store was opened."""
        if not self.pulled_since(space, 0.0):
            self.pull(space)

    def begin_writing(self, space: str) -> None:
        """`begin`, for whoever is about to store something; the errors say that nothing was stored."""
        try:
            self.begin(space)
        except (BackendError, StoreAccessError) as error:
            raise type(error)(f"nothing was stored in {self.backend.url}: {error}") from None

    def forget(self) -> None:
        """What was pulled is to be looked at again at its next use."""
        self._pulled.clear()
        self._threads.forget()
        # Another process is to find what this one has read.
        behind.settle()

    @property
    def lacks_room(self) -> bool:
        """Whether the disk had no room lately for what was read, which was answered all the same."""
        return self._threads.lacks_room

    @lacks_room.setter
    def lacks_room(self, there: bool) -> None:
        self._threads.lacks_room = there

    def fetcher(self, path: Path, fd: int) -> Fetcher | None:
        """What fetches the rows of the file at `path`, opened as `fd`; None for one that is whole.

        FileNotFoundError when it has gone in the meantime.
        """
        if mirror.is_mirror(path):
            return Fetcher(self._threads, self.name_of(path), path, os.fstat(fd), self.note)
        # A mirror that is removed goes before its sidecar: this may be one, full of holes.
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise FileNotFoundError(str(path))
        return None

    def note(self, size: int) -> None:
        """So many bytes more are in mirrors."""
        self._fetched += size

    def note_trimmed(self) -> None:
        """Count anew."""
        self._fetched = 0

    def keep_size(self) -> None:
        """`trim`, when mirrors may have grown beyond their limit since that was looked at last."""
        if self.local_bytes is not None and self._fetched > self.local_bytes // _LOOKS:
            self.trim()

    def drop(self, path: Path) -> None:
        """Forget the mirror at `path`, whose object is gone; what was mapped of it stays readable."""
        with self.locked(path.parent.name):
            if mirror.is_mirror(path):
                remove(path)
                remove(mirror.sidecar_of(path))

    def renew(self, path: Path) -> bool:
        """Read the head of the mirror at `path` anew, and drop all else of it; whether there was one."""
        if not mirror.is_mirror(path):
            return False
        said = mirror.read_sidecar(path)
        size = said.size if said is not None else path.stat().st_size
        head = begin_mirror(self, path, size, 0 if said is None else said.put_ns)
        with self.locked(path.parent.name):
            head.link(path)
        return True

    def renew_small(self, path: Path) -> bool:
        """Read a tomb or a description anew, as far as there is one; whether the file here has changed."""
        before = _content(path)
        try:
            bring(self, path, MOST_SMALL)
        except FileNotFoundError:
            return False
        return _content(path) != before

    def check_head(self, path: Path) -> None:
        """See to it that the head of the mirror at `path` is that of its object, right or wrong."""
        if not mirror.is_mirror(path):
            return
        head = begin_mirror(self, path, path.stat().st_size)
        try:
            same = same_head(head.fd, path)
        finally:
            head.discard()
        if not same:
            self.renew(path)

    # -- beside others ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self, space: str) -> Iterator[None]:
        """Nobody else on this host makes, replaces or drops mirrors of `space` while the block runs: keep it short."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / f"mirrors-{space}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _held.add(fd)
        try:
            # Where the file system has no locks, what can happen is a block that is read twice.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # In a child that was made meanwhile it is closed already.
            if fd in _held:
                _held.discard(fd)
                os.close(fd)

    def after_fork(self) -> None:
        """In a child process: what a thread of the parent held is free."""
        self._pulling = threading.Lock()
        self._threads.after_fork()


_held: set[int] = set()


def _after_fork() -> None:
    # A lock belongs to parent and child together: the child must not go on holding it.
    for fd in _held:
        os.close(fd)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
