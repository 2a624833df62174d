"""Positions that are told by the prompts at hand: by what a chat's messages say, or by token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actcache.capture.media import needs_ids, told_by_ids
from actcache.capture.positions import TokensOf, each_prompt
from actcache.errors import PromptError, did_you_mean
from actcache.model.chat import Messages, content_tokens
from actcache.model.media import KINDS

if TYPE_CHECKING:
    from actcache.capture.inputs import Prompts


def needs_prompts(positions: Any) -> bool:
    """Whether `positions` cannot be told without the prompts."""
    return needs_chats(positions) or needs_ids(positions)


def told_by_prompts(positions: Any, prompts: Prompts | None) -> Any:
    """`positions` in numbers; raises `PromptError` where they need what these prompts do not have."""
    if not needs_prompts(positions):
        return positions
    if prompts is None:
        raise PromptError(
            "tokens_of is told by token ids, and these inputs have none: pass input_ids, or choose positions by number"
        )
    return told_by_ids(positions_in_chats(positions, prompts.chats, prompts.ids, prompts.tokenizer), prompts.ids)


def needs_chats(positions: Any) -> bool:
    """Whether `positions` cannot be told without the chats."""
    if isinstance(positions, Mapping):
        return any(map(needs_chats, positions.values()))
    if isinstance(positions, TokensOf):
        return not positions.by_ids
    return isinstance(positions, list) and any(map(needs_chats, positions))


def positions_in_chats(
    positions: Any, chats: Sequence[Messages | None], ids: Sequence[Sequence[int]], tokenizer: Any
) -> Any:
    """`positions` with numbers in place of every `TokensOf` a role: one list for each prompt, where there was one.

    `chats`: the messages of each prompt, None where it is no chat; `ids`: its token ids. Raises `PromptError` or
    `TokenizerError`, naming the prompt.
    """
    if not needs_chats(positions):
        return positions
    if isinstance(positions, Mapping):
        return {name: positions_in_chats(choice, chats, ids, tokenizer) for name, choice in positions.items()}

    def numbers(choice: Any, i: int) -> list[Any]:
        if isinstance(choice, TokensOf):
            return _find(choice, chats[i], ids[i], tokenizer, i)
        if isinstance(choice, list):
            return [position for item in choice for position in numbers(item, i)]
        return [choice]

    return [numbers(choice, i) for i, choice in enumerate(each_prompt(positions, len(chats)))]


def _find(asked: TokensOf, messages: Messages | None, ids: Sequence[int], tokenizer: Any, i: int) -> list[int]:
    if messages is None:
        raise PromptError(
            f"prompt {i} is not a chat, so that tokens_of({asked.role!r}) has no tokens in it: expected a list of "
            f"messages like {{'role': 'user', 'content': '...'}}.{did_you_mean(asked.role, KINDS)}"
        )
    of_role = [number for number, message in enumerate(messages) if message["role"] == asked.role]
    wanted = of_role
    if asked.which != "all":
        number = {"first": 0, "last": -1}.get(str(asked.which))
        number = int(asked.which) if number is None else number
        wanted = of_role[number:][:1] if -len(of_role) <= number < len(of_role) else []
    if not wanted:
        roles = ", ".join(repr(role) for role in dict.fromkeys(message["role"] for message in messages))
        which = "" if asked.which == "all" else f" number {asked.which!r} ({len(of_role)} there)"
        raise PromptError(f"prompt {i} has no message{which} of the role {asked.role!r}: its roles are {roles}")
    found = content_tokens(tokenizer, messages, wanted, ids, i)
    if not found:
        raise PromptError(f"prompt {i}: the messages of the role {asked.role!r} are empty, they have no tokens")
    return found
