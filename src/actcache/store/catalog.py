"""This host's index of a store on disk: one SQLite row per segment. Disposable, never the truth."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from actcache.store.files import log
from actcache.store.records import SegmentInfo

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS segment (
    space TEXT NOT NULL, name TEXT NOT NULL, layout TEXT NOT NULL, columns TEXT NOT NULL, prompts INTEGER NOT NULL,
    rows INTEGER NOT NULL, size INTEGER NOT NULL, created_ns INTEGER NOT NULL, text_context TEXT NOT NULL,
    replaces TEXT NOT NULL, prompt_key BLOB NOT NULL, text_key BLOB NOT NULL, PRIMARY KEY (space, name)
);
"""
_COLUMNS = "name, space, layout, columns, prompts, rows, size, created_ns, text_context, replaces, prompt_key, text_key"

_inherited: list[sqlite3.Connection] = []


class Catalog:
    """Remembers segment headers between processes. Every failure only costs time: headers are read again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index.sqlite"
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._tried = False

    def load(self, space: str) -> list[SegmentInfo]:
        """What is remembered of `space`; whoever asks checks it against the folder."""
        with self._lock:
            db = self._connect()
            if db is None:
                return []
            try:
                rows = db.execute(f"SELECT {_COLUMNS} FROM segment WHERE space = ?", (space,)).fetchall()
                return [_info(row) for row in rows]
            except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
                self._discard(error)
                return []

    def record(self, space: str, new: Sequence[SegmentInfo], gone: Iterable[str]) -> None:
        """Remember `new` segments of `space` and forget those that are `gone`."""
        gone = list(gone)
        if not new and not gone:
            return
        with self._lock:
            db = self._connect()
            if db is None:
                return
            try:
                with db:
                    db.executemany("DELETE FROM segment WHERE space = ? AND name = ?", [(space, g) for g in gone])
                    db.executemany(
                        f"INSERT OR REPLACE INTO segment ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                        [_row(space, info) for info in new],
                    )
            except (UnicodeError, OverflowError) as error:
                log.debug("not remembered in the index at %s: %s", self.path, error)
            except sqlite3.Error as error:
                self._discard(error)

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
                    self._discard(error)
                    self._tried = True
                    self._db = self._opened()
            except (sqlite3.Error, OSError) as error:
                log.debug("no index on disk at %s, keeping it in memory: %s", self.path, error)
        return self._db

    def _opened(self) -> sqlite3.Connection:
        # isolation_level: `with db` opens and commits one transaction for the statements inside.
        db = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != _SCHEMA_VERSION:
                db.execute("DROP TABLE IF EXISTS segment")
                db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db

    def _discard(self, error: Exception) -> None:
        """Start over with an empty file after damage; stay in memory when it is only busy."""
        log.debug("the index at %s is unusable, rebuilding it from the segments: %s", self.path, error)
        if self._db is not None:
            self._db.close()
            self._db = None
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + suffix).unlink()
        self._tried = False


def _row(space: str, info: SegmentInfo) -> tuple[object, ...]:
    replaces = json.dumps({k: list(v) for k, v in info.replaces.items()})
    return (
        info.name, space, info.layout, json.dumps(info.columns), info.prompts, info.rows, info.size, info.created_ns,
        info.text_context, replaces, info.prompt_key.tobytes(), info.text_key.tobytes(),
    )  # fmt: skip


def _info(row: tuple[object, ...]) -> SegmentInfo:
    name, space, layout, columns, prompts, rows, size, created, context, replaces, prompt_key, text_key = row
    keys = [np.frombuffer(k, np.uint8).reshape(-1, 16) for k in (prompt_key, text_key)]  # type: ignore[call-overload]
    if len(keys[0]) != prompts or len(keys[1]) != prompts:
        raise ValueError(f"keys of {name} do not match its {prompts} prompts")
    return SegmentInfo(
        str(name), str(space), str(layout), tuple((str(s), str(d), int(n)) for s, d, n in json.loads(str(columns))),
        int(prompts), int(rows), int(size), int(created), str(context),  # type: ignore[call-overload]
        {k: tuple(v) for k, v in json.loads(str(replaces)).items()}, keys[0], keys[1],
    )  # fmt: skip
