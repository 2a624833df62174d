"""Which rows of a cache's values belong to which prompt.

A prompt is a row of the tokens that stand for the cache. An encoder-decoder that returns several sequences for a prompt
decodes more rows than it encodes: `Tokens.prompts` says whose each of them is. A prompt is then what was encoded, and
has all of its sequences, whether or not anything of the encoder was captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actcache.capture.entry import Entry
from actcache.capture.notes import ValueWithInfo
from actcache.capture.tokens import Mask, Tables, Tokens
from actcache.capture.values import map_tensors
from actcache.errors import LayerRangeError, OptionError
from actcache.model.sites import Site


def require_prompt(prompt: int, count: int) -> int:
    """The number of a prompt, counted from the front. Raises `LayerRangeError`."""
    if not -count <= prompt < count:
        has = "1 prompt" if count == 1 else f"{count} prompts"
        raise LayerRangeError(f"prompt {prompt} is out of range: the cache holds {has}")
    return prompt % count


class PromptRows:
    """The rows that each prompt has in the values of each stack. `count` is how many rows the first stack has; how many
    prompts there are may be fewer."""

    def __init__(self, tables: Tables, count: int) -> None:
        self.tables = tables
        self.lead = next(iter(tables), None)
        owners = tables[self.lead].prompts if tables else None
        encoded = tables.get("encoder", Tokens()).mask
        self.count = count if owners is None or encoded is None else encoded.shape[0]
        #: By stack: for each prompt its rows; None where that cannot be told.
        self.of_stack = {stack: self._rows(stack) for stack in tables or (None,)}

    def _rows(self, stack: str | None) -> list[list[int]] | None:
        same = [[row] for row in range(self.count)]
        table = self.tables.get(stack, Tokens())
        if table.prompts is not None:
            rows: list[list[int]] = [[] for _ in range(self.count)]
            for row, prompt in enumerate(table.prompts.tolist()):
                rows[prompt].append(row)
            return rows
        if stack == self.lead:
            return same
        return same if table.mask is not None and table.mask.shape[0] == self.count else None

    def height(self, stack: str | None) -> int | None:
        """How many rows the values of a stack have; None where whose they are cannot be told."""
        if self.of_stack[stack] is None:
            return None
        mask = self.tables.get(stack, Tokens()).mask
        return self.count if mask is None else mask.shape[0]

    def of(self, key: str, height: int) -> list[list[int]]:
        """For each prompt its rows in the value of `key`, which has `height` of them. Raises `OptionError` naming both
        counts where they cannot be told."""
        # Logits have no stack, and are the decoder's.
        stack = (Site.parse(key).stack or "decoder") if len(self.tables) > 1 else self.lead
        rows = self.of_stack.get(stack)
        if rows is None or height != self.height(stack):
            raise OptionError(
                f"{key!r} has {height} rows and the cache {self.count} prompts, and which row is of which prompt "
                f"cannot be told: choose rows of the value itself, cache[{key!r}][rows]. (Where passes of one block "
                "did not all reach a site, capture each in a block of its own.)"
            )
        return rows

    def row(self, key: str, height: int, prompt: int, sequence: int | None) -> int:
        """The row of a prompt in the value of `key`, which has `height` of them; of a prompt with several sequences
        that of one of them."""
        if len(self.tables) < 2:
            described = bool(self.tables) and self.tables[self.lead].mask is not None
            if described and height != self.count and Site.looks_like(key):
                # A block whose passes did not all reach the site: its rows are others than the prompts.
                self.of(key, height)
            rows = [require_prompt(prompt, height)]
        else:
            rows = self.of(key, height)[require_prompt(prompt, self.count)]
        if sequence is None and len(rows) > 1:
            raise OptionError(
                f"{key!r} has {len(rows)} rows for prompt {prompt}, one for each sequence that was returned: choose "
                f"one with sequence=0 to sequence={len(rows) - 1}"
            )
        if not -len(rows) <= (sequence or 0) < len(rows):
            raise LayerRangeError(
                f"sequence {sequence} is out of range: {key!r} has {len(rows)} for prompt {prompt}, counted from 0"
            )
        return rows[sequence or 0]


class Chosen:
    """What some prompts have of every value.

    `prompts` is an int, a slice, or numbers; with the first two memory is shared where rows lie together. Raises
    `LayerRangeError` for a number that no prompt has, `OptionError` for truth values.
    """

    def __init__(self, rows: PromptRows, prompts: int | slice | Sequence[int]) -> None:
        self._rows = rows
        self._shares = isinstance(prompts, (int, slice))
        if isinstance(prompts, slice):
            self.prompts = list(range(rows.count)[prompts])
            return
        asked = [prompts] if isinstance(prompts, int) else list(prompts)
        if any(isinstance(one, bool) or getattr(one, "dtype", None) in (torch.bool, bool) for one in asked):
            raise OptionError(
                "prompts are numbers, and these are truth values: [i for i, true in enumerate(...) if true]"
            )
        self.prompts = [require_prompt(int(one), rows.count) for one in asked]

    def of(self, key: str, value: Any) -> Any:
        """Their rows of the value of a site; of anything else those of every tensor that has a row for each prompt, or
        for each sequence of an encoder-decoder. Raises `OptionError` where those of a site cannot be told."""
        if Site.looks_like(key):
            if isinstance(value, ValueWithInfo):
                return ValueWithInfo(self.of(key, value.value()), value.info())
            if isinstance(value, Tensor) and value.ndim:
                return self._take(value, self._rows.of(key, value.shape[0]))
            if isinstance(value, list) and value and all(isinstance(part, Tensor) and part.ndim for part in value):
                # Batches that were joined without padding.
                single = [row for part in value for row in part.split(1)]
                return [single[row] for row in self._numbers(self._rows.of(key, len(single)))]
        known = {self._rows.height(stack): rows for stack, rows in reversed(self._rows.of_stack.items())}

        def take(tensor: Tensor) -> Tensor:
            rows = known.get(tensor.shape[0]) if tensor.ndim else None
            return tensor if rows is None else self._take(tensor, rows)

        if isinstance(value, Entry):
            return value.map(lambda part: map_tensors(part, take))
        return map_tensors(value, take)

    def mask(self, key: str, mask: Mask) -> Mask:
        """Their rows of a value's own mask."""
        rows = self._rows.of(key, mask.positions.shape[0])
        return Mask(self._take(mask.positions, rows), None if mask.keys is None else self._take(mask.keys, rows))

    def tables(self) -> Tables:
        """Their rows of every table; nothing of one whose rows cannot be told."""
        result = {}
        for stack, table in self._rows.tables.items():
            rows = self._rows.of_stack[stack]
            if rows is None:
                result[stack] = Tokens()
                continue
            cut: Tokens = map_tensors(table._replace(prompts=None), partial(self._take, rows=rows))
            owners = [number for number, prompt in enumerate(self.prompts) for _ in rows[prompt]]
            several = owners != list(range(len(self.prompts)))
            result[stack] = cut._replace(prompts=torch.tensor(owners) if several else None)
        return result

    @property
    def leading(self) -> list[int]:
        """Their rows of the tokens that stand for the cache, which columns have an item for."""
        rows = self._rows.of_stack[self._rows.lead]
        return self.prompts if rows is None else self._numbers(rows)

    def _numbers(self, rows: list[list[int]]) -> list[int]:
        return [row for prompt in self.prompts for row in rows[prompt]]

    def _take(self, tensor: Tensor, rows: list[list[int]]) -> Tensor:
        numbers = self._numbers(rows)
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        if self._shares and (not numbers or (step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)))):
            return tensor[numbers[0] : numbers[-1] + 1 : step] if numbers else tensor[:0]
        return tensor[torch.tensor(numbers, dtype=torch.long, device=tensor.device)]
