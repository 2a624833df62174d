"""Perplexity and logits as a store keeps them: names, layouts, and the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.errors import OptionError, require_choice
from actcache.store.prompts import PromptTable
from actcache.store.records import DERIVED, TOKENS, Records

PERPLEXITY, TOKEN_NLL, LOGITS = "perplexity", "token_nll", "logits"
POSITIONS = ("last", "all")
# The exponential of a larger cross-entropy is no float32.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LogitsAsked:
    """Which logits: of the `"last"` token of a prompt or of `"all"`, the `top_k` largest or (None) every one."""

    positions: str = "last"
    top_k: int | None = None

    @classmethod
    def checked(cls, positions: Any, top_k: Any, vocabulary: int | None) -> LogitsAsked:
        """Raises `OptionError` for positions that are neither, and a `top_k` that is no positive integer or more than
        there are tokens in the `vocabulary`."""
        require_choice(positions, POSITIONS, "logit position")
        if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
            raise OptionError(f"top_k is {top_k!r}: expected a positive integer, or None for all logits.")
        if top_k is not None and vocabulary is not None and top_k > vocabulary:
            raise OptionError(f"top_k is {top_k}: the model has {vocabulary} tokens, None keeps the logits of all.")
        return cls(positions, top_k)

    @property
    def layout(self) -> str:
        return TOKENS if self.positions == "all" else "last_token"

    @property
    def names(self) -> tuple[str, ...]:
        """The columns they are stored in: values, and of the largest their tokens."""
        if self.top_k is None:
            return (LOGITS,)
        return f"{LOGITS}.top{self.top_k}.values", f"{LOGITS}.top{self.top_k}.indices"

    def __str__(self) -> str:
        which = "all logits" if self.top_k is None else f"the top {self.top_k} logits"
        return f"{which} of {'every token' if self.positions == 'all' else 'the last token'}"


@dataclass(frozen=True)
class Asked:
    """What is computed beside activations; false when it is nothing."""

    perplexity: bool = False
    logits: LogitsAsked | None = None

    def __bool__(self) -> bool:
        return self.perplexity or self.logits is not None

    def nbytes(self, prompts: int, tokens: int, vocabulary: int) -> int:
        """Bytes that they take for so many prompts with so many tokens altogether."""
        total = 12 * prompts + 4 * tokens if self.perplexity else 0
        if self.logits is not None:
            rows = tokens if self.logits.positions == "all" else prompts
            total += rows * (4 * vocabulary if self.logits.top_k is None else 8 * self.logits.top_k)
        return total


NOTHING = Asked()


def features(losses: npt.NDArray[Any], offset: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """``[exp(mean c), exp(min c), exp(max c)]`` of each prompt, float32 ``[n, 3]``; ones where it has no second token.

    `losses`: the cross-entropy ``c`` of the token after each row; prompt ``i`` has the rows from ``offset[i]`` to
    ``offset[i + 1]``, of which the last has none. What is no float32 is the largest there is.
    """
    found = np.ones((len(offset) - 1, 3))
    for i, (start, stop) in enumerate(zip(offset[:-1].tolist(), offset[1:].tolist(), strict=True)):
        c = losses[start : stop - 1].astype(np.float64)
        if len(c):
            found[i] = c.mean(), c.min(), c.max()
            found[i] = exponentials(found[i])
    return found.astype(np.float32)


def exponentials(losses: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """``exp`` of cross-entropies, at most the largest float32."""
    with np.errstate(over="ignore"):
        return np.minimum(np.exp(losses.astype(np.float64)), _LARGEST)


def result_records(prompts: PromptTable, asked: Asked, rows: Mapping[str, npt.NDArray[Any]]) -> list[Records]:
    """What a store keeps of `prompts`, one for each layout.

    `rows`: `TOKEN_NLL` float32 ``[tokens]`` where perplexity is asked for, and the columns of the logits.
    """
    by_layout: dict[str, dict[str, npt.NDArray[Any]]] = {}
    if asked.perplexity:
        losses = rows[TOKEN_NLL]
        by_layout[DERIVED] = {PERPLEXITY: features(losses, prompts.token_offset)}
        by_layout[TOKENS] = {TOKEN_NLL: np.ascontiguousarray(losses[:, None])}
    if asked.logits is not None:
        held = by_layout.setdefault(asked.logits.layout, {})
        held.update({name: rows[name] for name in asked.logits.names})
    made = [
        Records.tokens(prompts, data) if layout == TOKENS else Records.pooled(prompts, layout, data)
        for layout, data in by_layout.items()
    ]
    for records in made:
        # They are kept as they are, whatever the dtype of what they were computed from.
        records.screened = True
    return made
