"""A store of prompts of every form: texts of two tokenizers, chats, token ids, labels and metadata."""

from __future__ import annotations

import numpy as np
import torch

from actcache.store import given as said
from actcache.store.prompts import PromptTable
from actcache.store.records import LABEL, METADATA, Records
from share_helpers import fill_perplexity, fill_pooled, fill_tokens, new_space, new_store, table, text

N = range(23)
CHATS = [[{"role": "user", "content": f"hé {i}"}] for i in range(5)]
IDS = [[100 + i, 5, 6] for i in range(6)]


def filled(tmp_path, whole):
    """Texts under two tokenizers, in several segments, one of them twice; chats; token ids; labels and metadata."""
    store = new_store(tmp_path)
    space = new_space(store)
    fill = fill_tokens if whole else fill_pooled
    for numbers in (N[:9], N[9:10], N[10:]):
        fill(store, space, numbers)
    fill(store, space, N[4:7])
    fill_perplexity(store, space, N[:12])
    layout = {} if whole else {"pooling": "last_token"}
    for prompts in (CHATS, IDS):
        values = [torch.full((3, 8) if whole else (8,), float(i) + len(prompts)) for i in range(len(prompts))]
        store.write(space, prompts, {"resid_post.0": values, "resid_post.1": values}, **layout)
    other = PromptTable.build([[200 + i] for i in range(4)], [text(i) for i in range(3)] + ["other"], text_context="b")
    rows = np.ones((4, 8), np.float32)
    data = {"resid_post.0": rows, "resid_post.1": rows}
    store.append(space, Records.tokens(other, data) if whole else Records.pooled(other, "last_token", data))
    for kind, values in ((LABEL, list(N)), (METADATA, [{"half": i / 2} for i in N])):
        for records in said.records(kind, table(N), [said.encoded(v) for v in values]):
            store.append(space, records)
    return store, space
