"""What verbs print: JSON, tables, and numbers a person can read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actcache.wording import count, duration, one_line, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["JSON_VERSION", "console", "count", "duration", "one_line", "plain", "print_json", "size", "table"]

JSON_VERSION = 1
"""Of what `--json` prints: within one version fields are added, but none goes and none means something else."""

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
    """A console on standard output that keeps a fixed width in a pipe, where it has no colours, whatever FORCE_COLOR
    says: a script reads there."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    # rich takes 80 columns when there is no terminal, which breaks names that a script looks for.
    width = None if terminal or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(width=width, highlight=False, force_terminal=terminal)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A table with those `columns`, the ones named in `right` aligned right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made
