"""Files on their way into a dataset: made once, kept until they have arrived.

A staging folder belongs to one target and one content: its name has a digest of both, so that what is made of other
prompts, vectors, labels or settings is never taken for this. Files are listed when they are whole (`done`) and when
they have arrived (`sent`); what is not listed is made or sent again. So is what the digests of its blocks are not known
of any more: they are kept beside the files, and longer than these.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from actcache.errors import ActCacheError, DatasetAccessError, DiskFullError
from actcache.share import blocks
from actcache.share.shard_files import ShardFile
from actcache.store.files import DENIED, FULL, log

_DONE, _SENT, _LOCK = "done.jsonl", "sent.jsonl", "lock"
_ROOM = 16 << 20
"""What is left free beside what is staged: index, card, the file system's own."""


@contextlib.contextmanager
def writing_to(folder: Path, needed: int = 0, *, absent: bool = False) -> Iterator[None]:
    """Turn errors of the operating system inside the block into ours, naming `folder` and what to do; those of folders
    that are not there only where `absent`, since files of a store may go meanwhile."""
    try:
        yield
    except ActCacheError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in FULL:
            raise DiskFullError(
                f"no room in {folder} for {needed:,} more bytes ({reason}): free space there, or raise the quota."
            ) from error
        if error.errno in DENIED or (absent and error.errno == errno.ENOENT):
            raise DatasetAccessError(
                f"cannot write to {folder} ({reason}): change its permissions, or choose another place."
            ) from error
        raise


@dataclass(frozen=True)
class Staged:
    """A file: its path inside the dataset, its bytes, their SHA-256; `file` is None when they are no longer here.

    `fresh`: written by this process, which saw every byte.
    """

    path: str
    size: int
    sha256: str
    file: Path | None = None
    fresh: bool = False


class Staging:
    """The staging folder of one push; a context manager that keeps other pushes to the same target out."""

    def __init__(self, root: Path, target: str, content: str) -> None:
        self._root = root
        self._mine = hashlib.sha256(target.encode()).hexdigest()[:16]
        self.folder = root / f"{self._mine}-{content[:32]}"
        self.files = self.folder / "files"
        self.done: dict[str, Staged] = {}
        self.sent: dict[str, Staged] = {}
        self.sent_before: set[tuple[str, str]] = set()
        """What earlier pushes to this target have sent, of whatever content: path and digest."""
        self.sent_here: set[tuple[str, str]] = set()
        """What earlier pushes of this content have sent."""
        self._target = target
        self._lock = -1

    @property
    def owner(self) -> str:
        """What the names of everything that is of this target begin with, its lock's too."""
        return self._mine

    def __enter__(self) -> Staging:
        with writing_to(self._root, absent=True):
            # What is in a folder that nobody else may look into is on its way here.
            self._root.mkdir(0o700, parents=True, exist_ok=True)
            self._lock = self._locked()
            self.sent_before = {(s.path, s.sha256) for s in self._of_this_target(_SENT)}
            self.files.mkdir(parents=True, exist_ok=True)
        before = list(self._read(self.folder / _SENT))
        self.sent_here = {(s.path, s.sha256) for s in before}
        self.sent = {s.path: s for s in before if self._blocks_of(s) is not None}
        for staged in self._read(self.folder / _DONE):
            file = self.files / staged.path
            is_whole = file.is_file() and not file.is_symlink() and file.stat().st_size == staged.size
            if is_whole and self._blocks_of(staged) is not None:
                self.done[staged.path] = Staged(staged.path, staged.size, staged.sha256, file)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            if not self.done and not self.sent and not self.sent_before:
                shutil.rmtree(self.folder, ignore_errors=True)
            if not any(self._root.glob(f"{self._mine}-*")):
                self._lock_file.unlink(missing_ok=True)
            os.close(self._lock)
            # Where other pushes have nothing either, there is nothing left of it.
            self._root.rmdir()

    @property
    def _lock_file(self) -> Path:
        return self._root / f"{self._mine}.{_LOCK}"

    def _locked(self) -> int:
        while True:
            fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise DatasetAccessError(
                    f"another process of this machine is at work on {self._target}: wait for it, then try again."
                ) from None
            except OSError:
                log.info("%s: no locks here, so that two pushes to one target are not kept apart", self._root)
                return fd
            # Whoever held it before may have removed the name, under which somebody else makes a new one.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._lock_file).st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)

    def drop_others(self) -> None:
        """Remove what was staged for this target of other content; what was sent of it stays known."""
        known = sorted(self.sent_before - {(s.path, s.sha256) for s in self.sent.values()})
        with (self.folder / "before.jsonl").open("w") as file:
            file.writelines(json.dumps([path, 0, sha256]) + "\n" for path, sha256 in known)
        for other in self._root.glob(f"{self._mine}-*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def make(self, shard: ShardFile) -> Staged:
        """The file on disk: the one that is there, or a new one."""
        if shard.path in self.done:
            return self.done[shard.path]
        file = self.files / shard.path
        temporary = file.with_name(f"{file.name}.making")
        with self._written(shard.nbytes):
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as out:
                sha256, digests = shard.write(out)
            os.replace(temporary, file)
            staged = Staged(shard.path, shard.nbytes, sha256, file, fresh=True)
            self._keep_blocks(staged, digests)
        self.done[shard.path] = staged
        self._note(_DONE, staged)
        return staged

    def remake(self, shard: ShardFile) -> Staged:
        """A new file in place of one that is not what it was."""
        self.done.pop(shard.path, None)
        return self.make(shard)

    def note_sent(self, staged: Staged) -> None:
        """Remember that a file has arrived."""
        self.sent[staged.path] = Staged(staged.path, staged.size, staged.sha256)
        self._note(_SENT, staged)

    def forget(self, staged: Staged) -> None:
        """Remove a file that is needed no more."""
        (self.files / staged.path).unlink(missing_ok=True)
        self.done.pop(staged.path, None)

    def blocks(self, staged: Staged) -> bytes:
        """The digests of the blocks of a file that was made here, by this process or an earlier one."""
        found = self._blocks_of(staged)
        if found is None:
            raise DatasetAccessError(f"files in {self.folder} change while they are used: what else writes there?")
        return found

    def write_blocks(self, path: Path, files: Iterable[Staged]) -> dict[str, Any]:
        """Write the digests of all `files` into one; what the index says of it."""
        return blocks.write(path, (self.blocks(staged) for staged in sorted(files, key=lambda s: s.path)))

    def check_room(self, needed: int) -> None:
        """`DiskFullError` unless there is room for so many more bytes."""
        with self._written(needed):
            free = shutil.disk_usage(self.folder).free
        if free < needed + _ROOM:
            raise DiskFullError(
                f"{self.folder} needs {needed:,} bytes for what is shared, and {free:,} are free: make room, or pass "
                "stream=True, which keeps only a few shards on disk at a time."
            )

    def remove(self) -> None:
        """Everything has arrived."""
        self.done, self.sent, self.sent_before = {}, {}, set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _of_this_target(self, name: str) -> Iterator[Staged]:
        for folder in self._root.glob(f"{self._mine}-*"):
            yield from self._read(folder / name)
            yield from self._read(folder / "before.jsonl")

    def _keep_blocks(self, staged: Staged, digests: bytes) -> None:
        path = self._blocks_path(staged)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.making")
        temporary.write_bytes(digests + _seal(staged, digests))
        os.replace(temporary, path)

    def _blocks_of(self, staged: Staged) -> bytes | None:
        """None where they are not there, or are not those of these bytes."""
        try:
            data = self._blocks_path(staged).read_bytes()
        except OSError:
            return None
        digests = data[: 8 * blocks.count(staged.size)]
        return digests if data == digests + _seal(staged, digests) else None

    def _blocks_path(self, staged: Staged) -> Path:
        return self.folder / "blocks" / f"{staged.path}.xxh3"

    def _written(self, needed: int) -> Any:
        return writing_to(self.folder, needed)

    def _note(self, name: str, staged: Staged) -> None:
        line = json.dumps([staged.path, staged.size, staged.sha256]) + "\n"
        with self._written(len(line)):
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)

    def _read(self, path: Path) -> Iterator[Staged]:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return
        for line in lines:
            # The last line of a process that was killed may be half a one.
            with contextlib.suppress(ValueError, TypeError):
                name, size, sha256 = json.loads(line)
                yield Staged(str(name), int(size), str(sha256))


def _seal(staged: Staged, digests: bytes) -> bytes:
    """What shows that digests are whole, and of the bytes of `staged`."""
    return xxhash.xxh3_128_digest(staged.sha256.encode() + digests)
