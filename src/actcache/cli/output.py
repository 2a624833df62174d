"""What verbs print: JSON, tables, and numbers a person can read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 110


def print_json(value: object) -> None:
    """Print `value` as JSON: dataclasses as objects, paths and other leaves as text."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def plain(value: Any) -> Any:
    """`value` made of dicts, lists, strings, numbers, booleans and None; numbers JSON lacks become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return os.fspath(value) if isinstance(value, Path) else str(value)


def console() -> Console:
    """A console on standard output that keeps a fixed width in a pipe."""
    from rich.console import Console

    # rich takes 80 columns when there is no terminal, which breaks names that a script looks for.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(width=width, highlight=False)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table with those `columns`, the ones named in `right` aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def size(nbytes: int | None) -> str:
    """``12.3 MB``; one MB is 2**20 bytes."""
    if nbytes is None:
        return "unknown"
    value = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1024 or unit == "GB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """``0.8 s``, ``4 min 10 s``, ``3 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """``1 prompt``, ``1,200 prompts``."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def one_line(text: str, width: int | None = None) -> str:
    """`text` with line ends and other control characters made visible, cut to `width` characters."""
    # What a stranger wrote may hold what moves the cursor or sets the title.
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text.replace("\\", "\\\\"))
    return line if width is None or len(line) <= width else line[: width - 1] + "…"
