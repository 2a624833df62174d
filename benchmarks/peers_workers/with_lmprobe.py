"""The work of `benchmarks/peers.py` with lmprobe: its `UnifiedCache`, which keeps a file for each prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _worker import Peer, serve


class Lmprobe(Peer):
    distribution = "lmprobe"

    def __init__(self) -> None:
        import lmprobe
        import torch

        torch.set_num_threads(1)
        self._lmprobe = lmprobe

    def load(self, folder: str) -> None:
        self._folder = folder
        # Models stay in the process, by name.
        _ = self._cache(layers=[0]).model

    def _cache(self, **options: Any) -> Any:
        return self._lmprobe.UnifiedCache(
            self._folder, **{"compute_perplexity": False, "device": "cpu", "dtype": "float32", **options}
        )

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        self._lmprobe.set_cache_backend(job["store"])
        cache = self._cache(batch_size=job["batch"])

        def work() -> np.ndarray:
            values, _ = cache.get_activations(job["prompts"])
            return values.reshape(len(job["prompts"]), len(cache.layer_indices), -1).numpy()

        return work

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        self._lmprobe.set_cache_backend(job["store"])
        cache = self._cache(batch_size=job["batch"], layers=[job["layer"]], cache_pooled=False)

        def work() -> np.ndarray:
            values, mask = cache.get_activations(job["prompts"])
            return values[mask.bool()].numpy()

        return work

    read_back = every_token

    def perplexity(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        self._lmprobe.set_cache_backend(job["store"])
        cache = self._cache(batch_size=job["batch"], layers=[job["layer"]], compute_perplexity=True)
        return lambda: cache.get_perplexity(job["prompts"])[:, 0]


if __name__ == "__main__":
    serve(Lmprobe)
