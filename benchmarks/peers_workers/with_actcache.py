"""The work of `benchmarks/peers.py` with this library.

Beside a library that keeps things on disk, or where a store is asked for, `UnifiedCache`, with all its writing; beside
one that keeps them in memory, `extract_batches` of the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _worker import Peer, batches, serve


class Ours(Peer):
    distribution = "actcache"

    def __init__(self) -> None:
        import torch
        import transformers

        import actcache

        torch.set_num_threads(1)
        self._actcache, self._transformers = actcache, transformers
        self._store: Any = None

    @property
    def version(self) -> str:
        return str(self._actcache.__version__)

    def load(self, folder: str) -> None:
        self._model = self._transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(folder)

    def _cache(self, job: dict[str, Any], **options: Any) -> Any:
        if self._store is not None:
            self._store.close()
        self._store = self._actcache.Store(job["store"])
        return self._actcache.UnifiedCache(
            self._model,
            tokenizer=self._tokenizer,
            store=self._store,
            **{"compute_perplexity": False, "batch_size": None, **options},
        )

    def _in_memory(self, job: dict[str, Any], **options: Any) -> Any:
        return self._actcache.extract_batches(
            self._model,
            batches(job["prompts"], job["batch"]),
            sites="resid_post",
            tokenizer=self._tokenizer,
            **options,
        )

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        prompts, layers = job["prompts"], self._model.config.num_hidden_layers
        if not job["keep"]:

            def in_memory() -> np.ndarray:
                cache = self._in_memory(job, positions="last")
                return np.stack([cache[f"resid_post.{layer}"][:, 0].numpy() for layer in range(layers)], axis=1)

            return in_memory
        stored = self._cache(job)
        return lambda: np.asarray(stored.get_activations(prompts)[0]).reshape(len(prompts), layers, -1)

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        if not job["keep"]:

            def in_memory() -> np.ndarray:
                cache = self._in_memory(job, layers=[job["layer"]])
                return cache[f"resid_post.{job['layer']}"][cache.attention_mask.bool()].numpy()

            return in_memory
        return self.read_back(job)

    def read_back(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        cache = self._cache(job, layers=[job["layer"]], cache_pooled=False)

        def work() -> np.ndarray:
            values, mask = cache.get_activations(job["prompts"])
            return np.asarray(values)[np.asarray(mask).astype(bool)]

        return work

    def perplexity(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        cache = self._cache(job, layers=[job["layer"]], compute_perplexity=True)
        return lambda: np.asarray(cache.get_perplexity(job["prompts"]))[:, 0]


if __name__ == "__main__":
    serve(Ours)
