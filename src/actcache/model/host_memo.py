"""Small facts this host may forget at any time, so that a warm run need not work them out again.

A SQLite table of ``(kind, key) -> value`` strings beside the store indexes. Every value can be
recomputed; when the file cannot be written or is damaged, the memo lives in memory only.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

from actcache import config


class HostMemo:
    """Remembered strings of this host; safe to use from several threads and processes."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._memory: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def get(self, kind: str, key: str) -> str | None:
        """The value kept for `key`, or None."""
        with self._lock:
            value = self._memory.get((kind, key))
            if value is not None:
                return value
            try:
                with closing(self._connect()) as connection, connection:
                    row = connection.execute(
                        "SELECT value FROM memo WHERE kind = ? AND key = ?", (kind, key)
                    ).fetchone()
            except (sqlite3.Error, OSError):
                return None
            if row is None:
                return None
            self._memory[kind, key] = str(row[0])
            return str(row[0])

    def put(self, kind: str, key: str, value: str) -> None:
        """Keep `value` for `key`, on disk where possible."""
        with self._lock:
            self._memory[kind, key] = value
            try:
                with closing(self._connect()) as connection, connection:
                    connection.execute("INSERT OR REPLACE INTO memo VALUES (?, ?, ?)", (kind, key, value))
            except (sqlite3.Error, OSError):
                return

    def _connect(self) -> sqlite3.Connection:
        path = self._path or config.host_state_path() / "memo.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=5.0)
        connection.execute("CREATE TABLE IF NOT EXISTS memo (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))")
        return connection


_default = HostMemo()


def host_memo() -> HostMemo:
    """The memo of this host."""
    return _default
