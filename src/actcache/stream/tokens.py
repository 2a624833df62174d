"""Which token a vector belongs to, and which tokens are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from actcache.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    import torch

    from actcache.store.prompts import PromptTable

Ints = npt.NDArray[np.int64]

_NAMES = ("bos", "first")


class TokenBatch(NamedTuple):
    """What the vectors of a batch belong to: tensors int64 ``[B]`` on the CPU.

    `prompt`: numbers in `ActivationStream.prompts`. `position`: of the token in its prompt, from 0 on; -1 for pooled
    vectors, which belong to no single token. `token_id`: -1 for pooled vectors, and where no tokenizer was at hand.
    """

    prompt: torch.Tensor
    position: torch.Tensor
    token_id: torch.Tensor


@dataclass(frozen=True)
class Exclusion:
    """Tokens that are left out: those with one of `ids` and, with `first`, the first one of each prompt."""

    ids: tuple[int, ...] = ()
    first: bool = False

    def __bool__(self) -> bool:
        return bool(self.ids) or self.first

    def kept(self, table: PromptTable) -> Ints:
        """The numbers of the tokens of `table` that are not left out, ascending."""
        keep = np.ones(len(table.token_ids), bool)
        if self.ids:
            keep &= ~np.isin(table.token_ids, np.array(self.ids, np.int64))
        if self.first:
            keep[table.token_offset[:-1][table.lengths > 0]] = False
        return np.flatnonzero(keep)


def exclusion(exclude: Any, bos: int | None, known: bool) -> Exclusion:
    """What ``exclude=`` asks for: None, ``"bos"``, ``"first"``, a token id, or several of these.

    `bos`: the id of the token that begins prompts, where it is known; `known`: whether a tokenizer was asked for it.

    Raises:
        OptionError: anything else; "bos" where nothing says which token that is.
    """
    given: Sequence[Any] = [exclude] if isinstance(exclude, str | int) else _listed(exclude)
    ids = []
    for one in given:
        if isinstance(one, str):
            if one not in _NAMES:
                raise OptionError(
                    f"exclude={exclude!r}: expected token ids, 'bos' or 'first'.{did_you_mean(one, _NAMES)}"
                )
            if one == "bos":
                if bos is None:
                    why = "the tokenizer has none" if known else "a store does not know which token that is"
                    raise OptionError(f"exclude='bos': {why}. Give its id, or 'first' for the first token of prompts.")
                ids.append(bos)
        elif isinstance(one, bool) or not isinstance(one, int | np.integer) or one < 0:
            raise OptionError(f"exclude={exclude!r}: {one!r} is no token id, nor 'bos' or 'first'.")
        else:
            ids.append(int(one))
    return Exclusion(tuple(sorted(set(ids))), "first" in [one for one in given if isinstance(one, str)])


def asks_for_bos(exclude: Any) -> bool:
    """Whether `exclusion` needs to know which token begins prompts."""
    named = [exclude] if isinstance(exclude, str) else _several(exclude)
    return "bos" in [one for one in named if isinstance(one, str)]


def _several(exclude: Any) -> list[Any]:
    return [] if isinstance(exclude, str | int) or exclude is None else list(exclude)


def _listed(exclude: Any) -> list[Any]:
    if exclude is None:
        return []
    if isinstance(exclude, Iterable):
        return list(exclude)
    raise OptionError(f"exclude={exclude!r}: expected token ids, 'bos' or 'first'.")
