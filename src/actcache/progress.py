"""One way to show progress: a bar on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a running job is told about."""

    def update(self, n: int = 1) -> object: ...


class _Silent:
    def update(self, n: int = 1) -> None:
        return None


@contextmanager
def progress(
    total: int | None, description: str, *, unit: str = "prompt", show: bool | None = None
) -> Iterator[Progress]:
    """A bar that counts to `total` (None: not known); `show=None` means only when standard error is a terminal."""
    if show is None:
        show = sys.stderr.isatty()
    if not show or total == 0:
        yield _Silent()
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=description, unit=f" {unit}", leave=False, dynamic_ncols=True) as bar:
        yield bar


@contextmanager
def aside() -> Iterator[None]:
    """While something is written to the terminal beside bars: they go, and come back behind it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        yield
        return
    with tqdm.tqdm.external_write_mode(sys.stderr):
        yield
