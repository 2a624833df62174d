"""How a cache is shown: keys, shapes and bytes, with layers folded."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

from actcache.capture.entry import Entry, brief
from actcache.capture.memory import groups, held_bytes, readable, size_of
from actcache.capture.notes import ValueWithInfo

_LINES = 12


class Line(NamedTuple):
    """One line of the display: the values of `items` keys."""

    name: str
    items: int
    what: str
    size: str


def lines_of(data: Mapping[str, Any]) -> list[Line]:
    """A line for every group of keys that are the same but for layers and heads."""
    return [_line(keys, data) for keys in groups(data).values()]


def as_text(kind: str, data: Mapping[str, Any]) -> str:
    """The display for a terminal."""
    lines = lines_of(data)
    shown = lines if len(lines) <= _LINES else lines[: _LINES - 2]
    names = [f"{line.name} ({line.items} items)" if line.items > 1 else line.name for line in shown]
    widths = max(map(len, names), default=0), max((len(line.what) for line in shown), default=0)
    text = [f"{kind} with {_entries(data)}"]
    for name, line in zip(names, shown, strict=True):
        text.append(f"  {name:{widths[0]}}  {line.what:{widths[1]}}  {line.size}")
    if len(shown) < len(lines):
        text.append(f"  ... and {len(lines) - len(shown)} more")
    return "\n".join(text)


def as_html(kind: str, data: Mapping[str, Any]) -> str:
    """The display for a notebook."""
    rows = "".join(
        f"<tr><td><code>{html.escape(line.name)}</code></td><td>{line.items}</td>"
        f"<td><code>{html.escape(line.what)}</code></td><td>{html.escape(line.size)}</td></tr>"
        for line in lines_of(data)
    )
    return (
        f"<div><b>{html.escape(kind)}</b> with {_entries(data)}"
        f"<table><thead><tr><th>key</th><th>items</th><th>value</th><th>bytes</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _entries(data: Mapping[str, Any]) -> str:
    count = "1 entry" if len(data) == 1 else f"{len(data)} entries"
    return f"{count}, {readable(held_bytes(data.values()))}"


def _line(keys: list[str], data: Mapping[str, Any]) -> Line:
    kinds = list(dict.fromkeys(_what(data[key]) for key in keys))
    what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} and {len(kinds) - 1} other{'s' if len(kinds) > 2 else ''}"
    return Line(_name(keys), len(keys), what, size_of(data[key] for key in keys))


def _what(value: Any) -> str:
    if isinstance(value, ValueWithInfo):
        return f"{brief(value.value())} with info"
    return repr(value) if isinstance(value, Entry) else brief(value)


def _name(keys: list[str]) -> str:
    """What the keys share, with the range of the numbers in which they differ: ``transformer.h.0-11.attn``."""
    if len(keys) == 1:
        return keys[0] or "model"
    parts = [key.split(".") for key in keys]
    if len({len(names) for names in parts}) > 1:
        return f"{keys[0]} ... {keys[-1]}"
    shown = []
    for names in zip(*parts, strict=True):
        if len(set(names)) == 1:
            shown.append(names[0])
        elif all(name.isdigit() for name in names):
            numbers = sorted({int(name) for name in names})
            whole = len(numbers) == numbers[-1] - numbers[0] + 1
            shown.append(f"{numbers[0]}-{numbers[-1]}" if whole else f"{numbers[0]}..{numbers[-1]}")
        else:
            return f"{keys[0]} ... {keys[-1]}"
    return ".".join(shown)
