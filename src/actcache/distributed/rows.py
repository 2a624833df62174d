"""One row of a file becomes a prompt, or says why it cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actcache.distributed.inputs import Input
from actcache.errors import PromptError, did_you_mean

# No others: as a number 007 would be another label than it was.
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_USUAL_COLUMNS = ("prompt", "text", "messages", "input_ids")


@dataclass(frozen=True)
class Row:
    """A prompt as `UnifiedCache.warmup` takes it, or the `reason` why there is none; `at` says where in its file.

    `label`, `metadata`: what stands beside it, where that is asked for.
    """

    at: str
    prompt: Any
    reason: str = ""
    label: Any = None
    metadata: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, one: Input, at: str, prompt: Any, values: Mapping[str, Any]) -> Row:
        """A row of `one` whose other columns are `values`."""
        label = None if one.label is None else values[one.label]
        return cls(at, prompt, "", label, {name: values[name] for name in one.metadata} if one.metadata else None)


def choose(names: Sequence[str], column: str | None, where: str) -> str:
    """Which of the columns `names` holds the prompt: `column`, else the usual one, else the only one.

    Raises `PromptError` for none, and for one that there is twice: who reads on would take the first, or the last.
    """
    found = _chosen(names, column, where)
    if names.count(found) > 1:
        raise PromptError(f"{where}: {names.count(found)} columns are called {found!r}: rename all but one.")
    return found


def _chosen(names: Sequence[str], column: str | None, where: str) -> str:
    if column is not None:
        if column in names:
            return column
        raise PromptError(
            f"{where}: {column!r} is expected, and there is {', '.join(names) or 'nothing'}."
            f"{did_you_mean(column, names)}"
        )
    for name in _USUAL_COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    if not names:
        raise PromptError(f"{where}: nothing is there that could be a prompt.")
    raise PromptError(f"{where}: which of {', '.join(names)} is the prompt? Say so with column=.")


def field_of(values: Iterable[Any], beside: Sequence[str], where: str) -> str | None:
    """Which field of a JSONL holds the prompts, as the lines say that it begins with: the first of the usual ones that
    an object has, else the only one, the fields `beside` left aside. None where lines are prompts themselves.

    One for all lines: a line without it has no prompt, whatever else it has.

    Raises `PromptError` where several may be meant.
    """
    given = list(values)
    held = [names for one in given if isinstance(one, dict) and (names := [n for n in one if n not in beside])]
    for name in _USUAL_COLUMNS:
        if any(name in names for names in held):
            return name
    alone: set[str] = {names[0] for names in held if len(names) == 1}
    if len(alone) == 1:
        return alone.pop()
    if not held or any(isinstance(one, str | list) for one in given):
        return None
    return choose(list(dict.fromkeys(name for names in held for name in names)), None, where)


def json_of(line: str, where: str) -> Any:
    """What a line of JSONL says. Raises `PromptError`, as all below, which begins with `where` it is."""
    line = line.strip()
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON: {error.msg} at column {error.colno} of {line!r:.60}.") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON that can be read: {error}.") from None


def prompt_in(value: Any, column: str | None, beside: Sequence[str], where: str) -> tuple[Any, dict[str, Any]]:
    """The prompt of a line of JSONL (a string, a list of token ids or of messages, or an object with it in the field
    `column`), and what stands there in the fields `beside`."""
    said: dict[str, Any] = {}
    if beside:
        if not isinstance(value, dict):
            raise PromptError(f"{where}: no object, so that it has no {beside[0]!r}.")
        said = {name: value[choose(list(value), name, where)] for name in beside}
    if isinstance(value, dict):
        field = choose([name for name in value if name not in said], column, where)
        value, where = value[field], f"{where}, field {field!r}"
    if not isinstance(value, str | list):
        raise PromptError(
            f"{where}: a prompt is a string, a list of token ids or a list of messages, not {json.dumps(value)[:40]}."
        )
    if not value:
        raise PromptError(f"{where}: the prompt is empty ({value!r}): it needs at least one character or token.")
    return value, said


def row_of_json(text: str, one: Input, at: str) -> Row:
    """The row of a line of JSONL. Raises `PromptError` where it has no prompt."""
    return Row.of(one, at, *prompt_in(json_of(text, "the line"), one.column, one.beside, "the line"))


def row_of_line(line: bytes, at: str, one: Input) -> Row | None:
    """The row of a line of a text or of JSONL; None for an empty one."""
    try:
        text = line.decode()
        if not text.strip():
            return None
        return row_of_json(text, one, at) if one.kind == "jsonl" else Row(at, text)
    except PromptError as error:
        return Row(at, None, f"PromptError: {error}")
    except UnicodeDecodeError as error:
        return Row(at, None, f"PromptError: the line is not UTF-8 ({error.reason} at its byte {error.start}).")
