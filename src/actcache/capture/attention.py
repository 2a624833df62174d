"""Attention between groups of tokens: patterns brought down to one number for each pair of groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actcache.capture.cache import ActivationCache
from actcache.capture.media import told_in_cache
from actcache.capture.notes import ValueWithInfo
from actcache.capture.positions import check_named, each_prompt, resolve_positions
from actcache.capture.tokens import BLOCKS, tensor_of
from actcache.errors import LayerRangeError, OptionError, SiteUnavailableError, UnknownKeyError, require_choice
from actcache.model.attention_reach import attention_window
from actcache.model.sites import Site
from actcache.model.structure import unwrapped

_REDUCE = ("mean", "sum", "uniform_ratio")


@dataclass(frozen=True, eq=False)
class AttentionBlocks:
    """Attention from groups of query tokens to groups of key tokens.

        blocks = ac.AttentionBlocks(keys={"subject": (3, 6), "rest": [0, (6, -1)]}, queries={"last": -1})
        blocks.of(cache)["attention_blocks.5"]                  # of a cache with "pattern.5": [B, H, 1, 2]
        ac.extract_batches(model, loader, sites="pattern", attention=blocks)    # batch by batch, keeping no patterns

    `keys`, `queries`: positions by name, as in `capture` (real tokens, negative from the end, a list for each prompt);
    a token that a group names twice counts once. Without `queries` the groups of keys are those of queries too. Of a
    pattern `A` and groups `Q` and `K`:

    - ``reduce="mean"``: the mean of ``A[q, k]`` over all pairs, those that the mask of the model leaves at 0 included;
    - ``"sum"``: their sum; divided by the number of queries it is the share of attention that goes to the group;
    - ``"uniform_ratio"``: the sum of ``A`` divided by the same sum of attention that is spread evenly over the keys
      that each query sees. In a causal model query `i` sees the `i + 1` keys up to its own, so that a row is
      ``1 / (i + 1)``; in one that is not, all; in layers with a sliding window those inside. 1 is what evenly spread
      attention gives, nan what has no answer: no query of the group sees any key of the other.

    Padding never counts: `i` is the number of the real token. The values are float32 ``[B, H, queries, keys]`` (of one
    head ``[B, queries, keys]``) in the order in which groups were named, which ``cache.info(key)`` tells.

    Raises `OptionError` for groups that are none.
    """

    keys: Mapping[str, Any]
    queries: Mapping[str, Any] | None = None
    reduce: str = "mean"

    def __post_init__(self) -> None:
        require_choice(self.reduce, _REDUCE, "reduce")
        for what, groups in (("keys", self.keys), ("queries", self.queries)):
            if groups is None and what == "queries":
                continue
            if not isinstance(groups, Mapping):
                raise OptionError(f"{what} is {groups!r}: expected groups by name, such as {{'subject': (3, 6)}}")
            check_named(dict(groups), chats=True, ids=True)
        object.__setattr__(self, "keys", dict(self.keys))
        object.__setattr__(self, "queries", dict(self.keys if self.queries is None else self.queries))

    @property
    def info(self) -> dict[str, Any]:
        """What a number of the result is of: the names of its rows and columns, and how they were reduced."""
        return {"queries": list(self.queries or ()), "keys": list(self.keys), "reduce": self.reduce}

    def of(self, cache: ActivationCache) -> ActivationCache:
        """The blocks of every pattern in `cache`, in a cache with its tokens and columns.

        Raises `UnknownKeyError` when it holds no pattern, `LayerRangeError` for a group outside a prompt, and
        `SiteUnavailableError` where patterns do not have all their queries, or how far a query sees is not known.
        """
        for groups in (self.keys, self.queries):
            check_named(groups, ids=True)
        found = self.with_groups(lambda groups: told_in_cache(groups, cache)).values(cache)
        if not found:
            raise UnknownKeyError("the cache holds no attention pattern: capture sites='pattern'")
        blocks = cache.select()
        blocks.clear()
        blocks.update(found)
        return blocks

    def values(self, cache: ActivationCache) -> dict[str, ValueWithInfo]:
        """The same by key, and nothing where there is no pattern."""
        return {
            _key(site): ValueWithInfo(self._block(cache, key, site), self.info)
            for key, value in cache.items()
            if Site.looks_like(key) and (site := Site.parse(key)).name == "pattern" and tensor_of(value) is not None
        }

    def with_groups(self, change: Callable[[Any], Any]) -> AttentionBlocks:
        """The same blocks of ``change(groups)``."""
        return replace(self, keys=change(self.keys), queries=change(self.queries))

    def _block(self, cache: ActivationCache, key: str, site: Site) -> Tensor:
        rows = cache.rows(key)
        spread = _Spread(cache, site) if self.reduce == "uniform_ratio" else None
        found = []
        for number, pattern in enumerate(rows):
            length = pattern.shape[-1]
            if pattern.shape[-2] != length:
                raise SiteUnavailableError(
                    f"{key!r} of prompt {number} has {pattern.shape[-2]} queries and {length} keys: groups are found "
                    "in patterns with all their queries, captured with positions='all'"
                )
            queries = _members(self.queries, number, len(rows), length).to(pattern.device)
            keys = _members(self.keys, number, len(rows), length).to(pattern.device)
            wide = pattern.to(torch.float64)
            block = queries @ wide @ keys.T
            if self.reduce == "mean":
                block = block / (queries.sum(1)[:, None] * keys.sum(1))
            elif spread is not None:
                # 0 / 0 is nan, and attention to what is not seen does not exist.
                block = block / (queries @ spread.rows(pattern).to(pattern.device) @ keys.T)
            found.append(block.to(torch.float32))
        return torch.stack(found)


class _Spread:
    """Attention spread evenly over what each query sees."""

    def __init__(self, cache: ActivationCache, site: Site) -> None:
        model = cache._model() if cache._model is not None else None
        config: Any = getattr(unwrapped(model) if model is not None else None, "config", None)
        self._site = site
        self._window = None
        if config is not None and site.layer is not None and hasattr(config, "to_dict"):
            self._window = attention_window(config.to_dict(), site.layer)

    def rows(self, pattern: Tensor) -> Tensor:
        """For the pattern of one prompt, ``[..., T, T]``: each query's even share over the keys it sees, ``[T, T]``."""
        length = pattern.shape[-1]
        attended = (pattern != 0).reshape(-1, length, length).any(0).cpu()
        seen = torch.ones(length, length, dtype=torch.bool)
        causal = not bool(attended.triu(1).any())
        if causal:
            seen = seen.tril()
        if self._window is not None:
            seen = seen.triu(1 - self._window)
            if not causal and self._window < length:
                raise self._unknown("its window reaches to both sides")
        # The far ends are looked at wherever they can be, unless something is in between.
        ends = [(length - 1, 0)] if causal else [(length - 1, 0), (0, length - 1)]
        if self._window is None and not all(bool(attended[end]) for end in ends):
            raise self._unknown("its last query does not look at its first key, as where a window slides along")
        if bool((attended & ~seen).any()):
            raise self._unknown(f"it looks further back than the window of {self._window} that its config names")
        return seen.to(torch.float64) / seen.sum(1, keepdim=True)

    def _unknown(self, why: str) -> SiteUnavailableError:
        return SiteUnavailableError(
            f"site {str(self._site)!r}: how many keys a query sees is not known, since {why}. Use reduce='mean' or "
            "'sum', or leave this layer out."
        )


def _key(site: Site) -> str:
    return str(site).replace("pattern", BLOCKS, 1)


def _members(groups: Mapping[str, Any] | None, number: int, n_prompts: int, length: int) -> Tensor:
    """Which tokens of one prompt each group has, ``[G, T]`` of 0 and 1."""
    assert groups is not None
    members = torch.zeros(len(groups), length, dtype=torch.float64)
    for row, (name, choice) in enumerate(groups.items()):
        try:
            members[row, resolve_positions(each_prompt(choice, n_prompts)[number], length)] = 1
        except LayerRangeError as error:
            raise LayerRangeError(f"the group {name!r} is not in prompt {number}: {error}") from None
    return members
