"""How much memory a process takes for itself: what it has allocated, not the files that it has mapped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """By how many bytes anonymous memory grew at most."""

    most: int = 0


def anonymous() -> int:
    """Bytes of anonymous memory of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


@contextmanager
def growth(every_s: float = 0.002) -> Iterator[Growth]:
    """Look every so many seconds while the block runs; what was found is complete behind it."""
    before, found, over = anonymous(), Growth(), threading.Event()

    def look() -> None:
        found.most = max(found.most, anonymous() - before)

    def watch() -> None:
        while not over.wait(every_s):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
        look()
    finally:
        over.set()
        watcher.join()
