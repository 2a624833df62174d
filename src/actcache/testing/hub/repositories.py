"""What a Hub keeps: bytes under their digests, and repositories whose commits name them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

Files = Mapping[str, bytes]

CHUNK = 2**20
# What the Hub keeps as large files whatever their size, and how large any other may be.
_LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".npz", ".npy", ".arrow", ".zip", ".gz", ".pt")
_LARGE = 10 * 2**20
_NAME = re.compile(r"(?!\.)(?!.*(\.\.|--))[\w.-]{1,96}/(?!\.)(?!.*(\.\.|--))[\w.-]{1,96}")


class RefusedError(ValueError):
    """A name, a path or bytes that a Hub does not take."""


def repository_name(name: str) -> str:
    """`name` when it is ``org/name`` as the Hub allows it."""
    if not _NAME.fullmatch(name):
        raise RefusedError(f"not a repository's name: {name!r}")
    return name


def path_in_repository(path: str) -> str:
    """`path` when it is relative and stays inside; nothing of git's own."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..", ".git") for part in parts):
        raise RefusedError(f"not a path inside a repository: {path!r}")
    return path


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps this file as a large one (LFS)."""
    return size > 0 and (size > _LARGE or path.endswith(_LARGE_SUFFIXES))


def is_ignored(path: str, patterns: str) -> bool:
    """Whether a ``.gitignore`` of these lines leaves out a file: by its path or name, or those of a folder above it.
    Exceptions (``!``) are not known."""
    parts = path.split("/")
    for line in map(str.strip, patterns.splitlines()):
        pattern = line.strip("/")
        if not pattern or line.startswith("#"):
            continue
        for depth in range(1, len(parts) + (not line.endswith("/"))):
            found = "/".join(parts[:depth])
            if fnmatchcase(found, pattern) or (not line.startswith("/") and fnmatchcase(parts[depth - 1], pattern)):
                return True
    return False


def git_name(data: bytes) -> str:
    """The name git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The bytes of a file in a commit. `sha256` names them, `oid` is git's name (of the pointer of a large file)."""

    sha256: str
    size: int
    oid: str
    large: bool


class Blobs:
    """Bytes on disk below `root`, each under its SHA-256: no name that a request brings becomes a path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the bytes with this digest are, or would be."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise RefusedError(f"not a SHA-256: {sha256!r}")
        return self._root / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    def size(self, sha256: str) -> int:
        return self.path(sha256).stat().st_size

    def receive(self, chunks: Iterable[bytes], sha256: str | None = None) -> str:
        """Keep these bytes and return their digest; another one than the one announced is refused."""
        temporary = self._root / f"receiving-{secrets.token_hex(8)}"
        digest = hashlib.sha256()
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            found = digest.hexdigest()
            if sha256 is not None and found != sha256:
                raise RefusedError(f"the bytes of {sha256} have the digest {found}")
            os.replace(temporary, self.path(found))
        finally:
            temporary.unlink(missing_ok=True)
        return found

    def blob(self, sha256: str, path: str, *, large: bool | None = None) -> Blob:
        """The file `path` with the bytes of this digest, which must be here."""
        if not self.has(sha256):
            raise RefusedError(f"{path}: there are no bytes {sha256}")
        size = self.size(sha256)
        if large if large is not None else is_large(path, size):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
            return Blob(sha256, size, git_name(pointer.encode()), True)
        return Blob(sha256, size, git_name(self.path(sha256).read_bytes()), False)


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one moment."""

    id: str
    parent: str | None
    message: str
    description: str
    time: datetime
    files: Mapping[str, Blob]


@dataclass
class Repository:
    """One repository: every commit with all its files, and what branches and tags point at.

    `kind` is ``"model"`` or ``"dataset"``. `private`: only who has a token of the Hub sees it. `gated`: who sees it may
    not download.
    """

    name: str
    blobs: Blobs
    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def commit(self, files: Files | Path, branch: str = "main", *, message: str = "Set all files") -> str:
        """A new commit on `branch` with exactly these files (or those of a folder); returns its id."""
        if isinstance(files, Path):
            files = _of_folder(files)
        blobs = {path_in_repository(path): self.add(path, data) for path, data in files.items()}
        with self.lock:
            return self.append(blobs, branch, message)

    def add(self, path: str, data: bytes) -> Blob:
        """The bytes of a file to be, kept."""
        return self.blobs.blob(self.blobs.receive([data]), path)

    def append(self, files: Mapping[str, Blob], branch: str, message: str, description: str = "") -> str:
        """A new commit on `branch` with exactly these files. The caller holds the lock."""
        parent = self.refs.get(branch)
        history = [self.name, len(self.commits), parent, message, sorted((n, b.sha256) for n, b in files.items())]
        commit = hashlib.sha1(json.dumps(history).encode()).hexdigest()
        self.commits[commit] = Commit(commit, parent, message, description, datetime.now(UTC), dict(files))
        self.refs[branch] = commit
        return commit

    def tag(self, name: str, commit: str) -> None:
        """Name a commit."""
        self.refs[name] = commit
        self.tags.add(name)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit id means; None when there is none."""
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Mapping[str, Blob]:
        """Path -> its blob; empty before the first commit."""
        commit = self.resolve(revision)
        return self.commits[commit].files if commit is not None else {}

    def read(self, path: str, revision: str = "main") -> bytes:
        """The bytes of one file."""
        return self.blobs.path(self.files(revision)[path].sha256).read_bytes()

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that led to `revision`, newest first."""
        found, commit = [], self.resolve(revision)
        while commit is not None:
            found.append(self.commits[commit])
            commit = found[-1].parent
        return found


def _of_folder(folder: Path) -> dict[str, bytes]:
    inside = folder.resolve()
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(inside):
            raise RefusedError(f"{path} leads out of {folder}")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files
