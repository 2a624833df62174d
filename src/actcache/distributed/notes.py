"""What workers log and warn about: it reaches the user once each, through the log of the driver."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actcache.progress import aside

# These hand nothing on to the root logger.
_APART = ("", "transformers", "huggingface_hub")
_REMEMBERED = 1000
log = logging.getLogger("actcache.workers")


@dataclass(frozen=True)
class Note:
    """Something that a worker has said; `level`: of `logging`."""

    level: int
    text: str


class _Listener(logging.Handler):
    def __init__(self, tell: Callable[[Note], object]) -> None:
        super().__init__()
        self._tell = tell
        self._once = Once()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note = Note(record.levelno, record.getMessage())
        except Exception:
            self.handleError(record)
            return
        if self._once.is_new(note):
            self._tell(note)


def listen(tell: Callable[[Note], object], level: int) -> None:
    """Hand everything that is logged or warned about in this process from now on to `tell`, once each; of actcache what
    has `level`."""
    listener = _Listener(tell)
    logging.getLogger("actcache").setLevel(level)
    for name in _APART:
        logging.getLogger(name).addHandler(listener)

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message)

    warnings.showwarning = show


class Once:
    """What has been said before, in memory that does not grow without end."""

    def __init__(self) -> None:
        self._before: set[Note] = set()

    def is_new(self, note: Note) -> bool:
        if note in self._before:
            return False
        if len(self._before) >= _REMEMBERED:
            self._before.clear()
        self._before.add(note)
        return True


class Notes:
    """Tells what workers say, each thing once, whichever of them says it, beside a bar that is shown."""

    def __init__(self) -> None:
        self._once = Once()

    def tell(self, worker: int, note: Note) -> None:
        if self._once.is_new(note):
            with aside():
                log.log(note.level, "worker %d: %s", worker, note.text)
