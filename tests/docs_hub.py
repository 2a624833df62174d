"""What pages of the documentation take for granted: a model `gpt2` (a folder, here), and a Hub with datasets.

Imported first of all: the Hub's client reads its environment once.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path

from actcache.testing.hub import LoopbackHub

PROMPTS = ["The sky is blue.", "Snow is white.", "The Eiffel Tower is in", "Cats are", "Grass is"]
TOKEN = "hf_documentation"


def serve() -> LoopbackHub:
    """Start the Hub for this process and the commands it runs; it ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="actcache-docs-"))
    hub = LoopbackHub(folder / "hub").__enter__()
    atexit.register(hub.__exit__, None, None, None)
    hub.tokens.add(TOKEN)
    os.environ.update(hub.environment(folder / "home"), HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    from actcache.testing.tiny import tiny_model, tiny_tokenizer

    tiny_model("gpt2", num_hidden_layers=13).save_pretrained("gpt2")
    tiny_tokenizer().save_pretrained("gpt2")
    return hub


def publish() -> None:
    """Push what `gpt2` has on `PROMPTS`, as format 2.0 and as a folder."""
    import actcache as ac

    cache = ac.UnifiedCache("gpt2", cache_pooled=False, cache_logits=True, logit_top_k=5, store=tempfile.mkdtemp())
    cache.warmup(PROMPTS)
    for place in ("org/name", "./folder"):
        ac.push_dataset(place, "gpt2", PROMPTS, labels=[1, 1, 0, 0, 0], store=cache.store)
