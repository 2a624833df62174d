"""Finding what the user named in a store."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actcache.errors import AmbiguousVariantError, NotCachedError, did_you_mean

if TYPE_CHECKING:
    from actcache.store.prompts import PromptTable
    from actcache.store.spaces import SpaceInfo
    from actcache.store.store import Store


def store_to_read(place: str | None) -> Store:
    """The store that --store names, for a verb that makes none.

    `click.UsageError` where there is no such folder: a misspelled name must not be told to be empty, or intact.
    """
    from actcache.store.default import store_at
    from actcache.store.locations import named_place

    if place is not None:
        folder = named_place(place, "--store")
        if isinstance(folder, Path) and not folder.is_dir():
            raise click.UsageError(f"--store {place}: there is no such folder, and so no store to look at.")
    return store_at(place)


def stored_name(store: Store, model: str) -> str:
    """The name under which `store` knows `model`; `NotCachedError` when it does not."""
    from actcache.store.default import model_label
    from actcache.store.discovered import none_of_that_name

    spaces = store.spaces()
    names = {s.model_name for s in spaces}
    # As loading does: a folder of that name comes first, then the id. A folder may be gone by now.
    for name in (model_label(model), model):
        if name in names:
            return name
    raise none_of_that_name(model, spaces, store)


def variants_of(store: Store, model: str | None, space: str | None) -> list[tuple[SpaceInfo, str]]:
    """The variants of `model` (None: of every model) whose space id begins with `space`, each with its name.

    Oldest first, models in alphabetical order. `NotCachedError` when nothing is stored under that name, or no variant
    begins so.
    """
    from actcache.store.variants import variant_names

    spaces = store.spaces()
    if model is not None:
        name = stored_name(store, model)
        spaces = [s for s in spaces if s.model_name == name]
    names = variant_names(spaces)
    chosen = [s for s in spaces if space is None or s.space.startswith(space)]
    if space is not None and not chosen:
        listed = "; ".join(f"{s.space} ({names[s.space]})" for s in spaces)
        hint = did_you_mean(space, [s.space[: len(space)] for s in spaces])
        raise NotCachedError(f"no variant has a space that begins with {space!r}.{hint} Stored: {listed or 'nothing'}.")
    return [(s, names[s.space]) for s in sorted(chosen, key=lambda s: s.model_name)]


def one_space(store: Store, model: str, space: str) -> str:
    """The space of the one variant of `model` whose id begins so; `AmbiguousVariantError` where several do."""
    variants = variants_of(store, model, space)
    if len(variants) > 1:
        raise AmbiguousVariantError(f"--space {space}: {len(variants)} variants of {model!r} begin so. Write more.")
    return variants[0][0].space


def readable(table: PromptTable) -> list[dict[str, Any]]:
    """Prompts as people gave them: ``{"prompt": text, messages or token ids, "num_tokens": int}``.

    The number is None for a text that was stored without its tokens.
    """
    from actcache.store.prompts import CHAT

    prompts: list[dict[str, Any]] = []
    for i in range(len(table)):
        text = table.text_of(i)
        tokens = table.tokens(i)
        prompt: Any = tokens.tolist() if text is None else json.loads(text) if table.kind[i] == CHAT else text
        prompts.append({"prompt": prompt, "num_tokens": len(tokens) if (tokens >= 0).all() else None})
    return prompts


def in_words(prompt: Any, model_name: str) -> str:
    """A prompt as one text: token ids behind what they say, where the model's tokenizer is on this machine."""
    if isinstance(prompt, str):
        return prompt
    ids = isinstance(prompt, list) and all(type(item) is int and item >= 0 for item in prompt)
    tokenizer = _tokenizer(model_name) if ids else None
    return str(prompt) if tokenizer is None else f"{tokenizer.decode(prompt, skip_special_tokens=False)!r} {prompt}"


def token_pieces(model_name: str, ids: list[int]) -> list[str] | None:
    r"""The text of each token, by the model's own tokenizer file, bytes that are no UTF-8 as ``\xab``; None when it is
    not on this machine."""
    from actcache.model.pieces import escaped, piece_of

    tokenizer = _tokenizer(model_name)
    return None if tokenizer is None else [escaped(piece_of(tokenizer, i)) for i in ids]


@lru_cache(maxsize=4)
def _tokenizer(model_name: str) -> Any:
    path = Path(model_name, "tokenizer.json")
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(model_name, "tokenizer.json")
        except HFValidationError:
            return None
        if not isinstance(found, str):
            return None
        path = Path(found)
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
