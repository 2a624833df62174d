"""Positions that are told by token ids: those of images, video, sound and text in the prompts of a multimodal model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from actcache.capture.positions import TokensOf, each_prompt
from actcache.errors import OptionError, PromptError
from actcache.model.media import tokens_of_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from actcache.capture.cache import ActivationCache


@dataclass(frozen=True)
class OfIds:
    """`tokens_of` a kind on one model: the tokens that are (`among`), or are not, one of `ids`."""

    asked: TokensOf
    ids: frozenset[int]
    among: bool

    def find(self, prompt: Sequence[int]) -> list[int]:
        """Positions in one prompt; none where it has no such tokens."""
        places = ((token in self.ids) == self.among for token in prompt)
        runs = [[at for at, _ in run] for here, run in groupby(enumerate(places), lambda pair: pair[1]) if here]
        if self.asked.which != "all":
            number = {"first": 0, "last": -1}.get(str(self.asked.which))
            number = int(self.asked.which) if number is None else number
            runs = [runs[number]] if -len(runs) <= number < len(runs) else []
        return [at for run in runs for at in run]

    def missing(self, i: int) -> PromptError:
        which = "" if self.asked.which == "all" else f" number {self.asked.which!r} of those"
        what = f"id {', '.join(map(str, sorted(self.ids)))}" if self.among else "any other id than those of media"
        return PromptError(
            f"prompt {i} has no tokens{which} that tokens_of({self.asked.role!r}) are ({what}): run it without these "
            "positions, in a batch of its own"
        )


def needs_ids(positions: Any) -> bool:
    """Whether `positions` cannot be told without token ids."""
    if isinstance(positions, Mapping):
        return any(map(needs_ids, positions.values()))
    if isinstance(positions, list):
        return any(map(needs_ids, positions))
    return isinstance(positions, OfIds) or (isinstance(positions, TokensOf) and positions.by_ids)


def on_model(positions: Any, model: nn.Module) -> Any:
    """`positions` with the ids of this model in them; raises `OptionError` for tokens that it does not have."""
    if isinstance(positions, Mapping):
        return {name: on_model(choice, model) for name, choice in positions.items()}
    if isinstance(positions, list):
        return [on_model(item, model) for item in positions]
    if isinstance(positions, TokensOf) and positions.by_ids:
        return OfIds(positions, *tokens_of_kind(model, positions.role))
    return positions


def told_by_ids(positions: Any, prompts: Sequence[Tensor | Sequence[int]], *, none_there: bool = False) -> Any:
    """`positions` with numbers in place of every `OfIds`: one list for each prompt, where there was one.

    `prompts`: the ids of each prompt's real tokens. Raises `PromptError` for a prompt that has no such tokens; with
    `none_there` it has an empty list.
    """
    if not needs_ids(positions):
        return positions
    if isinstance(positions, Mapping):
        return {name: told_by_ids(choice, prompts, none_there=none_there) for name, choice in positions.items()}
    rows = [row if isinstance(row, (list, tuple)) else row.tolist() for row in prompts]  # type: ignore[union-attr]

    def numbers(choice: Any, i: int) -> list[Any]:
        if isinstance(choice, OfIds):
            found = choice.find(rows[i])
            if not found and not none_there:
                raise choice.missing(i)
            return found
        if isinstance(choice, list):
            return [position for item in choice for position in numbers(item, i)]
        return [choice]

    return [numbers(choice, i) for i, choice in enumerate(each_prompt(positions, len(rows)))]


def told_in_cache(positions: Any, cache: ActivationCache) -> Any:
    """The same for the prompts of a cache, as long as the model that it was captured from is there."""
    if not needs_ids(positions):
        return positions
    model = cache._model() if cache._model is not None else None
    ids, mask = cache.input_ids, cache.attention_mask
    if model is None or ids is None or mask is None:
        what = "its token ids are not known" if model is not None else "its model is gone"
        raise OptionError(f"which tokens of this cache tokens_of names cannot be told, since {what}: give numbers")
    return told_by_ids(on_model(positions, model), [row[real] for row, real in zip(ids, mask, strict=True)])
