"""The files that grow in one folder, and the batches they hold so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from actcache.errors import FormatError
from actcache.store.batches import Batch, OpenFile
from actcache.store.files import TRANSIENT, log, named


class OpenFiles:
    """Kept in step with the folder by `keep`, with what grows by `poll`. Whoever uses it holds the index's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, OpenFile | None] = {}
        """None for what cannot be read."""
        self._batches: dict[str, Batch] = {}
        self._warned: set[str] = set()
        self._left = ""

    def __iter__(self) -> Iterator[OpenFile]:
        return iter([file for file in self._files.values() if file is not None])

    def __contains__(self, batch: str) -> bool:
        return batch in self._batches

    def batch(self, name: str) -> Batch | None:
        """The batch of that name; None where it is none of a file that grows."""
        return self._batches.get(name)

    @property
    def names(self) -> set[str]:
        """The names of all batches."""
        return set(self._batches)

    @property
    def batches(self) -> list[Batch]:
        """All batches, file by file in the order in which they were committed."""
        return list(self._batches.values())

    def keep(self, names: Iterable[str]) -> None:
        """Take notice that these files are there and no others."""
        self._files = {name: self._files.get(name) for name in sorted(names)}
        self._batches = {batch.info.name: batch for file in self for batch in file.batches}

    def poll(self) -> bool:
        """Whether batches were committed since the last call, which it takes in."""
        before = len(self._batches)
        for name, known in self._files.items():
            if name == self._left:
                continue
            file = self._opened(name) if known is None else known
            if file is not None:
                self._files[name] = file
                self._batches.update((batch.info.name, batch) for batch in file.poll())
                for reason in file.damage.values():
                    self._warn(f"{file.path}: {reason}")
        return len(self._batches) > before

    @contextlib.contextmanager
    def leaving(self, path: Path) -> Iterator[None]:
        """Take in nothing more of the file at `path` while the block runs."""
        self._left = path.name[:32]
        try:
            yield
        finally:
            self._left = ""

    def _opened(self, name: str) -> OpenFile | None:
        path = self.folder / f"{name}.open"
        try:
            file = OpenFile(path)
        except FileNotFoundError:
            return None
        except (FormatError, OSError) as error:
            if isinstance(error, OSError) and error.errno in TRANSIENT:
                raise
            self._warn(named(path, error))
            return None
        if file.metadata.get("space") != self.folder.name:
            self._warn(f"{path} belongs to space {file.metadata.get('space')!r}")
            return None
        return file

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("ignoring a file that grows, or a part of it, what it held counts as absent: %s", reason)
