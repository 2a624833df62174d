"""This host's index of a store on disk: one SQLite row per segment, and when its prompts were last read.

Disposable, never the truth.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from actcache.store.files import log
from actcache.store.records import SegmentInfo

_SCHEMA_VERSION = 2
_SCHEMA = (
    "DROP TABLE IF EXISTS segment",
    "DROP TABLE IF EXISTS last_read",
    """CREATE TABLE segment (
    space TEXT NOT NULL, name TEXT NOT NULL, layout TEXT NOT NULL, columns TEXT NOT NULL, prompts INTEGER NOT NULL,
    rows INTEGER NOT NULL, size INTEGER NOT NULL, created_ns INTEGER NOT NULL, text_context TEXT NOT NULL,
    replaces TEXT NOT NULL, prompt_key BLOB NOT NULL, text_key BLOB NOT NULL, PRIMARY KEY (space, name))""",
    """CREATE TABLE last_read (
    space TEXT NOT NULL, name TEXT NOT NULL, middle INTEGER NOT NULL, times BLOB NOT NULL,
    PRIMARY KEY (space, name))""",
    f"PRAGMA user_version={_SCHEMA_VERSION}",
)
_TABLES = ("segment", "last_read")
_COLUMNS = "name, space, layout, columns, prompts, rows, size, created_ns, text_context, replaces, prompt_key, text_key"

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PASSING = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM}

Keys = npt.NDArray[np.uint8]
Times = npt.NDArray[np.int64]
T = TypeVar("T")

_inherited: list[sqlite3.Connection] = []


class Catalog:
    """Remembers segment headers between processes. Every failure only costs time: headers are read again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index.sqlite"
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._tried = False

    def load(self, space: str, keep: Callable[[Keys], Keys] = np.asarray) -> list[SegmentInfo]:
        """What is remembered of `space`, the keys as `keep` gives them; whoever asks checks it against the folder."""

        def read(db: sqlite3.Connection) -> list[SegmentInfo]:
            rows = db.execute(f"SELECT {_COLUMNS} FROM segment WHERE space = ?", (space,))
            return [_info(row, keep) for row in rows]

        return self._ask(read, [], ValueError, TypeError, KeyError)

    def record(self, space: str, new: Sequence[SegmentInfo], gone: Iterable[str]) -> None:
        """Remember `new` segments of `space` and forget those that are `gone`."""
        gone = list(gone)
        if not new and not gone:
            return

        def write(db: sqlite3.Connection) -> None:
            try:
                with db:
                    for table in _TABLES:
                        _forget(db, table, space, gone)
                    db.executemany(
                        f"INSERT OR REPLACE INTO segment ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                        (_row(space, info) for info in new),
                    )
            except (UnicodeError, OverflowError) as error:
                log.debug("not remembered in the index at %s: %s", self.path, error)

        self._ask(write, None)

    def keep_only(self, space: str, names: set[str]) -> None:
        """Forget what is remembered of other segments of `space` than these, which others have removed."""

        def write(db: sqlite3.Connection) -> None:
            with db:
                for table in _TABLES:
                    known = db.execute(f"SELECT name FROM {table} WHERE space = ?", (space,)).fetchall()
                    _forget(db, table, space, [name for (name,) in known if name not in names])

        self._ask(write, None)

    def note_reads(self, space: str, read: Mapping[SegmentInfo, Times]) -> bool:
        """Remember when each prompt of the segments `read` was last read (nanoseconds, 0: unknown).

        Of what other processes have noted the later time stays. False when nothing can be remembered.
        """

        def write(db: sqlite3.Connection) -> bool:
            with db:
                db.execute("BEGIN IMMEDIATE")
                for info, times in read.items():
                    known = _times(db, space, info.name, len(times))
                    latest = times if known is None else np.maximum(times, known)
                    middle = median(np.where(latest > 0, latest, info.created_ns))
                    db.execute(
                        "INSERT OR REPLACE INTO last_read VALUES (?,?,?,?)",
                        (space, info.name, middle, latest.astype("<i8").tobytes()),
                    )
            return True

        return self._ask(write, False)

    def read_times(self, space: str, name: str, prompts: int) -> Times | None:
        """When each prompt of a segment was last read, 0 where that was not noted; None when nothing was."""
        return self._ask(lambda db: _times(db, space, name, prompts), None)

    def read_medians(self, space: str) -> dict[str, int]:
        """The median of what `read_times` gives, for every segment of which anything was noted."""

        def read(db: sqlite3.Connection) -> dict[str, int]:
            found = db.execute("SELECT name, middle FROM last_read WHERE space = ?", (space,)).fetchall()
            return {str(name): int(middle) for name, middle in found}

        return self._ask(read, {}, ValueError, TypeError)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db, self._tried = None, False

    def after_fork(self) -> None:
        """In a child process: leave the parent's connection alone and open another one when needed."""
        self._lock = threading.Lock()
        if self._db is not None:
            # Closing it here would release locks that the parent holds.
            _inherited.append(self._db)
        self._db, self._tried = None, False

    def __del__(self) -> None:
        if self._db is not None:
            self._db.close()

    def _ask(self, work: Callable[[sqlite3.Connection], T], otherwise: T, *errors: type[Exception]) -> T:
        """What `work` makes of the catalog; `otherwise` where there is none, or `errors` say it is damaged."""
        damaged: tuple[type[Exception], ...] = (sqlite3.Error, *errors)
        with self._lock:
            db = self._connect()
            if db is None:
                return otherwise
            try:
                return work(db)
            except damaged as error:
                self._failed(error)
                return otherwise

    def _connect(self) -> sqlite3.Connection | None:
        if self._db is None and not self._tried:
            self._tried = True
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._db = self._opened()
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    self._failed(error)
                    self._tried = True
                    self._db = self._opened()
            except (sqlite3.Error, OSError) as error:
                log.debug("no index on disk at %s, keeping it in memory: %s", self.path, error)
        return self._db

    def _opened(self) -> sqlite3.Connection:
        # isolation_level: `with db` opens and commits one transaction for the statements inside.
        db = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
        try:
            # First: the change of the journal is written, too.
            db.execute("PRAGMA synchronous=OFF")
            db.execute("PRAGMA journal_mode=WAL")
            if _version(db) != _SCHEMA_VERSION:
                with db:
                    db.execute("BEGIN IMMEDIATE")
                    # Another process may have done it in the meantime, and filled the tables.
                    if _version(db) != _SCHEMA_VERSION:
                        for statement in _SCHEMA:
                            db.execute(statement)
        except BaseException:
            db.close()
            raise
        return db

    def _failed(self, error: Exception) -> None:
        """After damage start over with an empty file; stay in memory when it is only busy.

        What a full disk or a forbidden folder refuses is not remembered, and what is remembered stays.
        """
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _PASSING:
            log.debug("the index at %s remembers nothing more for now: %s", self.path, error)
            return
        log.debug("the index at %s is unusable, rebuilding it from the segments: %s", self.path, error)
        if self._db is not None:
            self._db.close()
            self._db = None
        if code in _BUSY:
            return
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + suffix).unlink()
        self._tried = False


def _forget(db: sqlite3.Connection, table: str, space: str, names: Iterable[str]) -> None:
    db.executemany(f"DELETE FROM {table} WHERE space = ? AND name = ?", [(space, name) for name in names])


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def median(times: Times) -> int:
    """The middle one of `times`, the lower of two: at most half of them are later."""
    middle = (len(times) - 1) // 2
    return int(np.partition(times, middle)[middle])


def _times(db: sqlite3.Connection, space: str, name: str, prompts: int) -> Times | None:
    found = db.execute("SELECT times FROM last_read WHERE space = ? AND name = ?", (space, name)).fetchone()
    if found is None or not isinstance(found[0], bytes) or len(found[0]) != 8 * prompts:
        return None
    return np.frombuffer(found[0], "<i8").astype(np.int64)


def _row(space: str, info: SegmentInfo) -> tuple[object, ...]:
    replaces = json.dumps({k: list(v) for k, v in info.replaces.items()})
    return (
        info.name, space, info.layout, json.dumps(info.columns), info.prompts, info.rows, info.size, info.created_ns,
        info.text_context, replaces, info.prompt_key.tobytes(), info.text_key.tobytes(),
    )  # fmt: skip


def _info(row: tuple[object, ...], keep: Callable[[Keys], Keys]) -> SegmentInfo:
    name, space, layout, columns, prompts, rows, size, created, context, replaces, prompt_key, text_key = row
    keys = [np.frombuffer(k, np.uint8).reshape(-1, 16) for k in (prompt_key, text_key)]  # type: ignore[call-overload]
    if len(keys[0]) != prompts or len(keys[1]) != prompts:
        raise ValueError(f"keys of {name} do not match its {prompts} prompts")
    return SegmentInfo(
        str(name), str(space), str(layout), tuple((str(s), str(d), int(n)) for s, d, n in json.loads(str(columns))),
        int(prompts), int(rows), int(size), int(created), str(context),  # type: ignore[call-overload]
        {k: tuple(v) for k, v in json.loads(str(replaces)).items()}, keep(keys[0]), keep(keys[1]),
    )  # fmt: skip
