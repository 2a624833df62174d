"""Attention knockout: some queries no longer see some keys, and what is left of their attention renormalises."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from actcache.capture.edit_values import read_heads, resolve_heads
from actcache.capture.positions import TokensOf, check_positions, is_per_prompt, resolve_positions, told_positions
from actcache.capture.ready_made import ReadyMade
from actcache.errors import EditError, LayerRangeError, OptionError, require_choice
from actcache.model.sites import STACKS, resolve_layers

if TYPE_CHECKING:
    from actcache.capture.prompt_positions import PromptPositions

# Masks add -1e4 (OpenAI's GPT) or less, most of them the lowest number of some dtype: what lies this far below zero and
# below what the query saw best is masked.
_UNSEEN = -5e3


def knockout(
    layer: Any, heads: Any = None, *, from_positions: Any, to_positions: Any, stack: str | None = None
) -> ReadyMade:
    """Cut attention from the queries at `from_positions` to the keys at `to_positions`, before the softmax: these
    scores become -inf, and the others share the attention.

        ac.knockout(5, heads=[0, 3], from_positions="last", to_positions=(2, 5))
        ac.knockout("all", from_positions=(6, 9), to_positions=[0, 1])

    `layer`: an int, a list of ints, "all", "last" or "middle", negative ones counted from the end. `heads`: an int, a
    list, or None for all. Positions are those of `capture` and count real tokens of the prompt, which keep their
    numbers in every step of `generate`; with ``from_positions="all"`` new tokens are cut off too. `stack`: "encoder" or
    "decoder" where the model has both (self-attention in either).

    Where a model attends in a way that never holds scores (flash attention), it runs its eager one in the block, as for
    `pattern`; beside PyTorch's own fused attention the softmax is computed, which then takes its place. A query that
    would see nothing at all is an `EditError` that names it: leave it out of `from_positions`, or ablate what it would
    write (``ac.ablate("z.5", heads=...)``). So are keys that lie ahead of all queries, which do not see them anyway.
    """
    layers = read_edges("knockout", layer, from_positions, to_positions, stack)
    return Knockout(f"knockout of layer {layer!r}", from_positions, read_heads(heads), layers, to_positions, stack)


def read_edges(name: str, layer: Any, from_positions: Any, to_positions: Any, stack: str | None) -> Any:
    """The layers of an edit of attention between positions, checked as far as can be told before there is a model."""
    for positions in (from_positions, to_positions):
        if positions is None:
            raise OptionError(f"{name} needs from_positions (queries) and to_positions (keys); 'all' is every one")
    if stack is not None:
        require_choice(stack, STACKS, "stack")
    layers = layer if isinstance(layer, str) else tuple(layer) if isinstance(layer, (list, tuple, range)) else layer
    with suppress(LayerRangeError):
        resolve_layers(list(layers) if isinstance(layers, tuple) else layers, 1)
    return layers


@dataclass(frozen=True, eq=False)
class Knockout(ReadyMade):
    """Made by `knockout`; `positions` are those of the queries."""

    layers: Any
    to_positions: Any
    stack: str | None

    _kind: ClassVar[str] = "knockout"

    def __post_init__(self) -> None:
        super().__post_init__()
        for choice in self.to_positions if is_per_prompt(self.to_positions) else [self.to_positions]:
            check_positions(choice, ids=True)

    def at_layers(self, n_layers: int) -> list[int]:
        """The layers it acts at. Raises `LayerRangeError` or `OptionError`."""
        return resolve_layers(list(self.layers) if isinstance(self.layers, tuple) else self.layers, n_layers)

    def with_layers(self, n_layers: int) -> Knockout:
        """The same knockout with its layers counted from the front."""
        return replace(self, layers=tuple(sorted(self.at_layers(n_layers))))

    def identity(self) -> dict[str, Any]:
        heads = None if self.heads is None else tuple(sorted(self.heads))
        found = {"kind": self._kind, "stack": self.stack, "layers": self.layers, "heads": heads}
        return {**found, "from": _as_spans(self.positions), "to": _as_spans(self.to_positions)}

    def snapshot(self) -> ReadyMade:
        return self

    def check_length(self, length: int) -> None:
        super().check_length(length)
        for choice in self.to_positions if is_per_prompt(self.to_positions) else [self.to_positions]:
            resolve_positions(choice, length)

    @property
    def needs_probabilities(self) -> bool:
        return True

    @property
    def of_prompts(self) -> str | None:
        listed = is_per_prompt(self.to_positions)
        return "its to_positions are listed for each prompt" if listed else super().of_prompts

    @property
    def everywhere(self) -> bool:
        # Padding is no key of anybody, and is told by the positions.
        return False

    def cut(self, scores: Tensor, places: PromptPositions, layer: int) -> Tensor:
        """Attention scores ``[B, H, S, keys]`` as they go into the softmax, changed where they are to be.

        Raises `EditError` for a query that would see nothing, and for keys ahead of all queries, which see none of them
        anyway; `LayerRangeError` for a head or position there is not.
        """
        name = f"{self._kind} at layer {layer}"
        by_token = scores.transpose(1, 2)
        real = places.real(self.stack, by_token, name)
        queries, keys = torch.zeros_like(real), torch.zeros(len(real), scores.shape[-1], dtype=torch.bool)
        first_key = [0] * len(real)
        if _everything(self.positions):
            queries = real
        else:
            chosen = places.find(self.positions, self.stack, by_token, name)
            queries[chosen.rows, chosen.at] = True
        if _everything(self.to_positions):
            keys[:] = True
        else:
            chosen = places.find(self.to_positions, self.stack, by_token, name)
            for row, asked in enumerate(chosen.asked):
                columns = chosen.key_columns(asked, keys.shape[1])
                if len(asked):
                    # Counted like the queries of this pass.
                    first_key[row] = int(asked.min()) - (chosen.end - scores.shape[2])
                keys[row, columns[columns >= 0]] = True
        heads = torch.ones(scores.shape[1], dtype=torch.bool)
        if self.heads is not None:
            heads[:] = False
            heads[resolve_heads(self.heads, len(heads), name)] = True
        queries = queries & keys.any(1, keepdim=True)
        if not bool(queries.any()):
            return scores
        at = queries.to(scores.device)[:, None, :] & heads.to(scores.device)[None, :, None]
        cut = at[..., None] & keys.to(scores.device)[:, None, None, :]
        best = scores.amax(-1)
        for row, first in enumerate(first_key):
            there = queries[row].nonzero()
            # A cut that is all ahead still counts where attention looks ahead.
            if (
                len(there)
                and first > int(there.max())
                and bool(_masked(scores[row], best[row, ..., None])[cut[row]].all())
            ):
                raise EditError(
                    f"{name} changes nothing in prompt {row}: to_positions ({self.to_positions!r}) lie ahead of "
                    f"from_positions ({self.positions!r}), and no token sees those behind it. from_positions are the "
                    "queries, which look back at to_positions, the keys"
                )
        changed = self._changed(scores, cut)
        blind = at & _masked(changed.amax(-1), best)
        if bool(blind.any()):
            row, head, query = (int(i) for i in blind.nonzero()[0])
            number = places.number_of(self.stack, row, query)
            raise EditError(
                f"{name} leaves token {number} of prompt {row} nothing to attend to in head {head}: leave it out of "
                f"from_positions, or ablate what it writes, ac.ablate('z.{layer}', heads={head}, positions={number})"
            )
        return changed

    def _changed(self, scores: Tensor, edges: Tensor) -> Tensor:
        """`scores` with those at `edges` (bool, of their shape) changed."""
        return scores.masked_fill(edges, -torch.inf)


def _masked(scores: Tensor, best: Tensor) -> Tensor:
    return (scores < _UNSEEN) & ((scores == -torch.inf) | (scores < best + _UNSEEN))


def _as_spans(positions: Any) -> Any:
    """Positions as JSON values, the same for all ways of writing the same tokens: "all", or spans ``[from, to]`` in
    ascending order (0 is the end of those that are counted from the end), behind them kinds of tokens; a list of that
    for each prompt."""
    if is_per_prompt(positions):
        return [_as_spans(choice) for choice in positions]
    tokens: set[int] = set()
    spans: set[tuple[int, int]] = set()
    kinds: dict[str, Any] = {}
    left = [positions]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, tuple):
            start, stop = int(one[0]), int(one[1])
            if (start < 0) == (stop < 0):
                tokens.update(range(start, stop))
            else:
                # Of which tokens depends on the prompt's length.
                spans.add((start, stop))
        elif isinstance(one, TokensOf):
            kinds[repr(one)] = told_positions(one)
        elif one is None or _everything(one):
            return "all"
        else:
            tokens.add({"first": 0, "last": -1}[one] if isinstance(one, str) else int(one))
    joined: list[list[int]] = []
    for token in sorted(tokens):
        # The last token is no neighbour of the first.
        if joined and token and joined[-1][1] == token:
            joined[-1][1] += 1
        else:
            joined.append([token, token + 1])
    return [*sorted([*joined, *map(list, spans)]), *(kinds[name] for name in sorted(kinds))]


def _everything(positions: Any) -> bool:
    return isinstance(positions, str) and positions == "all"
