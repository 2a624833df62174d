"""How a cache is shown: keys, shapes and bytes, with layers and heads folded."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from actcache.capture.entry import Entry, brief
from actcache.capture.memory import groups, held_bytes, readable, shown_key, size_of
from actcache.capture.notes import ValueWithInfo
from actcache.capture.tokens import Tokens

_LINES = 16
_WIDTH = 80


class Line(NamedTuple):
    """One line of the display: the values of `items` keys."""

    name: str
    items: int
    what: str
    size: str


def lines_of(data: Mapping[str, Any]) -> list[Line]:
    """A line for every group of keys that are the same but for layers and heads."""
    return [_line(keys, data) for keys in groups(data).values()]


def about(tables: Sequence[Tokens], columns: Sequence[str]) -> str:
    """What the values are of, in words: prompts, the sequences returned for them, their columns, named positions; empty
    when nothing is known."""
    table, *others = tables or [Tokens()]
    found = [_counted(table.mask, "prompt")] if table.mask is not None and table.mask.numel() else []
    found += [_counted(o.mask, "sequence") for o in others if o.mask is not None and o.prompts is not None]
    for what, names in (("columns", columns), ("positions", list(table.names))):
        if names:
            found.append(f"{what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
    return "; ".join(found)


def _counted(mask: Tensor, what: str) -> str:
    rows, longest = mask.shape[0], int(mask.sum(1).max())
    return f"{rows} {what}{'s' if rows > 1 else ''} of {'up to ' if rows > 1 else ''}{longest} positions"


def as_text(kind: str, data: Mapping[str, Any], of: str = "") -> str:
    """The display for a terminal, 80 columns wide: long names and values are cut."""
    lines = lines_of(data)
    shown = lines if len(lines) <= _LINES else lines[: _LINES - 2]
    counts = [f" ({line.items} items)" if line.items > 1 else "" for line in shown]
    sizes = max((len(line.size) for line in shown), default=0)
    room = _WIDTH - 2 - 2 - 2 - sizes
    names = max((len(line.name) + len(count) for line, count in zip(shown, counts, strict=True)), default=0)
    whats = max((len(line.what) for line in shown), default=0)
    # Names first: values are cut down to what shows a shape.
    names = min(names, max(room - whats, room - 26))
    whats = min(whats, room - names)
    text = [f"{kind} with {_entries(data)}"] + ([f"  {_cut(of, _WIDTH - 2)}"] if of else [])
    for line, count in zip(shown, counts, strict=True):
        name = _middle_cut(line.name, names - len(count)) + count
        text.append(f"  {name:{names}}  {_cut(line.what, whats):{whats}}  {line.size:>{sizes}}")
    if len(shown) < len(lines):
        text.append(f"  ... and {len(lines) - len(shown)} more")
    return "\n".join(text)


def as_html(kind: str, data: Mapping[str, Any], of: str = "") -> str:
    """The display for a notebook."""
    rows = "".join(
        f"<tr><td><code>{html.escape(line.name)}</code></td><td>{line.items}</td>"
        f"<td><code>{html.escape(line.what)}</code></td><td>{html.escape(line.size)}</td></tr>"
        for line in lines_of(data)
    )
    return (
        f"<div><b>{html.escape(kind)}</b> with {_entries(data)}{f'<br>{html.escape(of)}' if of else ''}"
        f"<table><thead><tr><th>key</th><th>items</th><th>value</th><th>bytes</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _entries(data: Mapping[str, Any]) -> str:
    count = "1 entry" if len(data) == 1 else f"{len(data)} entries"
    return f"{count}, {readable(held_bytes(data.values()))}"


def _line(keys: list[str], data: Mapping[str, Any]) -> Line:
    kinds = list(dict.fromkeys(_what(data[key]) for key in keys))
    what = kinds[0] if len(kinds) == 1 else f"{kinds[0]} and {len(kinds) - 1} other{'s' if len(kinds) > 2 else ''}"
    return Line(_name(keys, data), len(keys), what, size_of(data[key] for key in keys))


def _what(value: Any) -> str:
    if isinstance(value, ValueWithInfo):
        return f"{_what(value.value())} with info"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list):
        kinds = list(dict.fromkeys(map(_what, value[:100])))
        if len(value) > 1 and len(kinds) == 1 and len(value) <= 100:
            return f"list of {len(value)} {kinds[0]}"
    return repr(value) if isinstance(value, Entry) else brief(value)


def _name(keys: list[str], data: Mapping[str, Any]) -> str:
    """What the keys share, with the range of the numbers in which they differ: ``transformer.h.0-11.attn``."""
    if len(keys) == 1:
        return shown_key(keys[0], data)
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


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."


def _middle_cut(text: str, width: int) -> str:
    """A name without its middle: both ends of a path say more."""
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"
