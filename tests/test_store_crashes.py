"""A disk that loses power: every instant of a run, with what was not synced dropped, torn or reordered.

`Recorder` notes every write, sync, rename and removal below a folder; `replay` makes the folder that a crash after any
prefix of them may leave. Whatever it is, every read is right or a miss, what was acknowledged is there, verification
finds nothing wrong, and work goes on.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from actcache.store import appending
from actcache.store.appending import Appender
from actcache.store.growing import GrowingFile
from actcache.store.store import Store
from store_helpers import CONTEXT, SITES, check_pooled, growing_writer, make_store, make_table, pooled, text

GB = 2**30
IDENTITY = {"weights": "abc"}, {"model_name": "org/model", "revision": "r1", "dtype": "float32"}
Step = tuple[Any, ...]


class Recorder:
    """Notes what happens below `root`, in order. A file is a number, so that it stays itself when it is renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []
        self._real = {name: getattr(os, name) for name in ("open", "close", "pwritev", "fsync", "fdatasync", "rename",
                                                           "unlink", "mkdir", "rmdir", "ftruncate")}  # fmt: skip
        self._files: dict[int, int] = {}
        self._folders: dict[int, str] = {}
        self._made = 0

    def _inside(self, path: Any) -> str | None:
        path = os.fspath(path) if not isinstance(path, int) else ""
        return os.path.relpath(path, self.root) if path and Path(path).is_relative_to(self.root) else None

    def _open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        fd = int(self._real["open"](path, flags, *args, **options))
        inside = self._inside(path)
        if inside is not None:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                self._folders[fd] = inside
            elif flags & os.O_CREAT:
                assert flags & os.O_EXCL, "files are never opened for writing twice"
                self._made += 1
                self._files[fd] = self._made
                self.steps.append(("create", inside, self._made))
        return fd

    def _close(self, fd: int) -> None:
        self._files.pop(fd, None)
        self._folders.pop(fd, None)
        self._real["close"](fd)

    def _pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        if fd in self._files:
            self.steps.append(("write", self._files[fd], offset, b"".join(bytes(b) for b in buffers)))
        return int(self._real["pwritev"](fd, buffers, offset))

    def _ftruncate(self, fd: int, size: int) -> None:
        if fd in self._files:
            # A size without content: files have holes, and none of them is ever made shorter.
            assert size >= os.fstat(fd).st_size
            self.steps.append(("write", self._files[fd], size, b""))
        self._real["ftruncate"](fd, size)

    def _syncing(self, call: str) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            if fd in self._files:
                self.steps.append(("sync", self._files[fd]))
            elif fd in self._folders:
                self.steps.append(("sync folder", self._folders[fd]))
            self._real[call](fd)

        return sync

    def _rename(self, source: Any, target: Any) -> None:
        self._real["rename"](source, target)
        if self._inside(source) is not None:
            self.steps.append(("rename", self._inside(source), self._inside(target)))

    def _named(self, call: str) -> Callable[..., None]:
        def noting(path: Any, *args: Any, **options: Any) -> None:
            self._real[call](path, *args, **options)
            if self._inside(path) is not None and options.get("dir_fd") is None:
                self.steps.append((call, self._inside(path)))

        return noting

    @contextmanager
    def recording(self) -> Iterator[None]:
        fakes: dict[str, Callable[..., Any]] = {
            "open": self._open, "close": self._close, "pwritev": self._pwritev, "rename": self._rename,
            "ftruncate": self._ftruncate,
        }  # fmt: skip
        fakes |= {call: self._syncing(call) for call in ("fsync", "fdatasync")}
        fakes |= {call: self._named(call) for call in ("unlink", "mkdir", "rmdir")}
        try:
            for name, fake in fakes.items():
                setattr(os, name, fake)
            yield
        finally:
            for name, real in self._real.items():
                setattr(os, name, real)


def durable(steps: list[Step]) -> list[bool]:
    """Which changes of folders are on the disk for certain: those followed by a sync of their folder."""
    synced: dict[str, int] = {}
    for k, step in enumerate(steps):
        if step[0] == "sync folder":
            synced[step[1]] = k
    return [k < synced.get(os.path.dirname(step[1]) or ".", -1) if isinstance(step[1], str) else False
            for k, step in enumerate(steps)]  # fmt: skip


def contents(steps: list[Step], how: str) -> dict[int, bytes]:
    """What is in each file: what was synced, and of the rest nothing, all, half, any writes of it, or as many zeros."""
    files: dict[int, bytearray] = {}
    pending: dict[int, list[Step]] = {}
    for step in steps:
        if step[0] == "create":
            files[step[2]], pending[step[2]] = bytearray(), []
        elif step[0] == "write":
            pending[step[1]].append(step)
        elif step[0] == "sync":
            for write in pending[step[1]]:
                _put(files[step[1]], write[2], write[3])
            pending[step[1]] = []
    rng = np.random.default_rng(len(steps))
    for number, writes in pending.items():
        for k, (_, _, offset, data) in enumerate(writes):
            # A disk writes what it was given since the last sync in any order.
            if how == "all" or (how == "torn" and k < len(writes) - 1) or (how == "any" and rng.random() < 0.5):
                _put(files[number], offset, data)
            elif how == "torn":
                _put(files[number], offset, data[: len(data) // 2])
            elif how == "zeros":
                _put(files[number], offset, bytes(len(data)))
    return {number: bytes(data) for number, data in files.items()}


def _put(file: bytearray, offset: int, data: bytes) -> None:
    if len(file) < offset + len(data):
        file.extend(bytes(offset + len(data) - len(file)))
    file[offset : offset + len(data)] = data


def replay(steps: list[Step], target: Path, how: str, changes: Callable[[int], bool]) -> None:
    """The folder after a crash; a change of a folder that was not synced counts if `changes(its number)`."""
    data, certain = contents(steps, how), durable(steps)
    names: dict[str, int | None] = {}
    for k, step in enumerate(steps):
        kind = step[0]
        if kind not in ("create", "rename", "unlink", "mkdir", "rmdir") or not (certain[k] or changes(k)):
            continue
        if kind == "create":
            names[step[1]] = step[2]
        elif kind == "mkdir":
            names[step[1]] = None
        elif kind == "rename" and step[1] in names:
            names[step[2]] = names.pop(step[1])
        elif kind == "rename":
            # The new name can be on the disk where the temporary one never was.
            names[step[2]] = next(s[2] for s in steps if s[0] == "create" and s[1] == step[1])
        else:
            names.pop(step[1], None)
    target.mkdir()
    for name in sorted(names):
        number, path = names[name], target / name
        if not path.parent.is_dir():
            continue
        if number is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data[number])


class Run:
    """What a store was told to do, and what must hold after each step."""

    def __init__(self, folder: Path) -> None:
        self.store, self.space = make_store(folder)
        self.store.location.mkdir()
        self.recorder = Recorder(self.store.location)
        self.present: set[int] = set()
        self.absent: set[int] = set()
        self.sure: list[tuple[int, set[int], set[int]]] = [(0, set(), set())]

    def _now(self) -> None:
        self.sure.append((len(self.recorder.steps), set(self.present), set(self.absent)))

    def append(self, numbers: range) -> None:
        # From its first step on nobody knows whether what was gone is back.
        self.absent -= set(numbers)
        self._now()
        self.store.append(self.space, pooled(numbers))
        self.present |= set(numbers)
        self._now()

    def grow(self, writer: Appender, numbers: range) -> None:
        self._now()
        writer.append([pooled(numbers)])
        self.present |= set(numbers)
        self._now()

    def finish(self, writer: Appender, in_place: bool) -> None:
        with mock.patch.object(GrowingFile, "is_well_filled", in_place):
            writer.finish(False)
        self._now()

    def invalidate(self, numbers: range) -> None:
        self.present -= set(numbers)
        self._now()
        self.store.invalidate(self.space, make_table(numbers))
        self.absent |= set(numbers)
        self._now()

    def evict(self, limit: int) -> None:
        before = set(self.present)
        mark = len(self.sure)
        start = len(self.recorder.steps)
        self.store.evict(limit / GB)
        place = self.store.locate(
            self.space, table=make_table(range(200)), sites=SITES, layout="last_token", check=False
        )
        self.present &= set(np.flatnonzero(place.found).tolist())
        assert self.present < before
        self.sure.insert(mark, (start, set(self.present), set(self.absent)))
        self._now()

    def at(self, length: int) -> tuple[set[int], set[int]]:
        """What must be there and what must not after the first `length` steps."""
        return next((present, absent) for start, present, absent in reversed(self.sure) if start <= length)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Appends, merges, invalidations, an eviction, and files that grow, recorded."""
    run = Run(tmp_path_factory.mktemp("recorded"))
    with run.recorder.recording():
        run.append(range(3))
        run.append(range(2, 6))
        run.store.merge(run.space)
        run.append(range(6, 9))
        run.invalidate(range(1, 3))
        run.append(range(2, 3))
        run.store.compact()
        run.append(range(20, 40))
        run.append(range(40, 60))
        check_pooled(run.store, run.space, [22, 23, 51])
        run.evict(15_000)
        run.append(range(60, 62))
        writer = growing_writer(run.store, run.space)
        with mock.patch.object(appending, "_SIZES", (1 << 14,)):
            for numbers, in_place in ((range(62, 64), True), (range(64, 66), False)):
                run.grow(writer, numbers)
                run.grow(writer, range(66, 67))
                run.finish(writer, in_place)
            run.grow(writer, range(67, 69))
    run.store.close()
    kinds = {step[0] for step in run.recorder.steps}
    assert kinds == {"create", "write", "sync", "sync folder", "rename", "unlink", "mkdir"}
    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torn", "any", "dropped", "zeros", "all"])
def test_power_lost_at_every_instant(run: Run, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    rng = np.random.default_rng(len(how))
    folder = run.store.location.parent
    for length in range(len(run.recorder.steps) + 1):
        steps = run.recorder.steps[:length]
        present, absent = run.at(length)
        chosen = rng.random(len(steps)) < 0.5
        ways: dict[str, Callable[[int], bool]] = {
            "none": lambda k: False,
            "all": lambda k: True,
            "some": lambda k, chosen=chosen: bool(chosen[k]),  # type: ignore[misc]
        }
        for turn, (name, changes) in enumerate(ways.items()):
            place = tmp_path / f"{length} {name}"
            place.mkdir()
            replay(steps, place / "store", how, changes)
            if (length + turn) % 2:
                # The index of this host knows more than the disk has kept; another one knows nothing.
                shutil.copytree(folder / "index", place / "index")
            store = Store(place / "store", index_dir=place / "index")
            found = set(np.flatnonzero(check_pooled(store, run.space, range(70))).tolist())
            message = f"{how}, {name}, step {length} {steps[-1:]}"
            assert present <= found, message
            assert not absent & found, message
            report = store.verify()
            assert report.ok, (message, report.damaged)
            if length % 5 == 0:
                store.open_space(*IDENTITY)
                store.append(run.space, pooled(range(100, 103)))
                assert check_pooled(store, run.space, [*sorted(present), 100, 101, 102]).all()
            store.close()
            shutil.rmtree(place)


def test_the_model_of_a_crash_is_sharp(run: Run, tmp_path: Path) -> None:
    """Without the syncs of files, or of folders, the same promises break: the test above can fail."""
    for left_out in ("sync", "sync folder"):
        steps = [step for step in run.recorder.steps if step[0] != left_out]
        place = tmp_path / left_out
        place.mkdir()
        replay(steps, place / "store", "torn", (lambda k: True) if left_out == "sync" else lambda k: False)
        store = Store(place / "store", index_dir=place / "index")
        place_of = store.locate(
            run.space, texts=[text(i) for i in range(70)], text_context=CONTEXT, sites=SITES, layout="last_token"
        )
        assert not run.at(len(run.recorder.steps))[0] <= set(np.flatnonzero(place_of.found).tolist())
