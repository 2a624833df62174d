"""What tests of stores in buckets share; imports no torch, for processes that start often."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.store.store import Store

if TYPE_CHECKING:
    import pytest

LABEL = {"model_name": "org/model", "revision": "r1", "dtype": "float32"}

Machine = Callable[[str], tuple[Store, str]]
"""Opens the same bucket as another machine does, by the name of the machine."""


def opened(location: Any, index: Path) -> tuple[Store, str]:
    """The store there, as a machine sees it that keeps what is its own in `index`, and its one space."""
    store = Store(location, index_dir=index)
    return store, store.open_space({"weights": "abc"}, LABEL)


def split(url: str) -> tuple[str, str]:
    """Bucket and prefix."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


def client() -> Any:
    """botocore's client, as the environment says."""
    from servers import S3Server

    return S3Server(
        os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    ).client()


def objects(url: str) -> dict[str, int]:
    """Names below the place of a store, and sizes."""
    bucket, prefix = split(url)
    found = client().list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {entry["Key"].removeprefix(prefix).lstrip("/"): entry["Size"] for entry in found}


class Pauses:
    """A clock that nothing but pauses moves, which nobody waits for: how busy the machine is changes nothing.

    Each thread has its own time, since those of one read pause beside each other. Where servers are to be waited for,
    `run` lets it go with the time of the machine, too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, and until the test ends, the clock of every `ObjectBackend`."""
        from actcache.store import object_backend

        self._paused: dict[int, float] = {}
        self._running_since: float | None = None
        monkeypatch.setattr(object_backend, "time", self)

    @property
    def paused(self) -> float:
        """How many seconds the thread has paused that has paused longest."""
        return max(self._paused.copy().values(), default=0.0)

    def run(self) -> None:
        self._running_since = time.monotonic()

    def monotonic(self) -> float:
        ran = 0.0 if self._running_since is None else time.monotonic() - self._running_since
        return 1000.0 + ran + self._paused.get(threading.get_ident(), 0.0)

    def sleep(self, seconds: float) -> None:
        me = threading.get_ident()
        self._paused[me] = self._paused.get(me, 0.0) + seconds
