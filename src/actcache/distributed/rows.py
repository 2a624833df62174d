"""One row of a file becomes a prompt, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actcache.errors import PromptError, did_you_mean

_USUAL_COLUMNS = ("prompt", "text", "messages", "input_ids")


@dataclass(frozen=True)
class Row:
    """A prompt as `UnifiedCache.warmup` takes it, or the `reason` why there is none; `at` says where in its file."""

    at: str
    prompt: Any
    reason: str = ""


def choose(names: Sequence[str], column: str | None, where: str) -> str:
    """Which of the columns `names` holds the prompt: `column`, else the usual one, else the only one."""
    if column is not None:
        if column in names:
            return column
        raise PromptError(f"{where}: no {column!r} among {', '.join(names)}.{did_you_mean(column, names)}")
    for name in _USUAL_COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise PromptError(f"{where}: which of {', '.join(names)} is the prompt? Say so with --column (column=).")


def prompt_of_json(line: str, column: str | None, where: str) -> Any:
    """The prompt of a line of JSONL: a string, an object with it in `column`, a list of token ids or of messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error}).") from None
    if isinstance(value, dict):
        value = value[choose(list(value), column, where)]
    if not isinstance(value, str | list):
        raise PromptError(
            f"{where}: a prompt is a string, a list of token ids or a list of messages, not {json.dumps(value)[:40]}."
        )
    return value


def row_of_line(line: bytes, at: str, column: str | None, *, is_json: bool) -> Row | None:
    """The row of a line of a text or of JSONL; None for an empty one."""
    try:
        text = line.decode()
        if not text.strip():
            return None
        return Row(at, prompt_of_json(text, column, "the line") if is_json else text)
    except (PromptError, UnicodeDecodeError) as error:
        return Row(at, None, f"{type(error).__name__}: {error}")
