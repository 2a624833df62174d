"""Finding what the user named in a store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from actcache.errors import NotCachedError, did_you_mean

if TYPE_CHECKING:
    from actcache.store.prompts import PromptTable
    from actcache.store.store import Store


def stored_name(store: Store, model: str) -> str:
    """The name under which `store` knows `model`; `NotCachedError` when it does not."""
    from actcache.store.default import model_label

    names = {s.model_name for s in store.spaces()}
    # As loading does: a folder of that name comes first, then the id. A folder may be gone by now.
    for name in (model_label(model), model):
        if name in names:
            return name
    known = f" Stored: {', '.join(sorted(names))}." if names else " The store is empty."
    raise NotCachedError(f"nothing is stored for {model!r}.{did_you_mean(model, names) or known}")


def readable(table: PromptTable) -> list[dict[str, Any]]:
    """Prompts as people gave them: ``{"prompt": text, messages or token ids, "num_tokens": int}``."""
    from actcache.store.prompts import CHAT

    prompts: list[dict[str, Any]] = []
    for i in range(len(table)):
        text = table.text_of(i)
        tokens = table.tokens(i)
        prompt: Any = tokens.tolist() if text is None else json.loads(text) if table.kind[i] == CHAT else text
        prompts.append({"prompt": prompt, "num_tokens": len(tokens)})
    return prompts
