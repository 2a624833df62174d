"""The work of `benchmarks/peers.py` with TransformerLens: `run_with_cache` of its bridge, for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _worker import Peer, batches, serve


class TransformerLens(Peer):
    distribution = "transformer-lens"

    def __init__(self) -> None:
        import torch
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        self._torch, self._class, self._tokenizers = torch, TransformerBridge, AutoTokenizer

    def load(self, folder: str) -> None:
        self._model = self._class.boot_transformers(folder, device="cpu").eval()
        # The bridge's own copy of it puts a token of its own in front.
        self._tokenizer = self._tokenizers.from_pretrained(folder)

    def _batches(self, job: dict[str, Any]) -> Iterator[tuple[Any, list[int]]]:
        """Token ids padded on the right, which causal attention needs no mask for, and the lengths of the prompts."""
        for batch in batches(job["prompts"], job["batch"]):
            lengths = [len(ids) for ids in self._tokenizer(batch)["input_ids"]]
            yield self._model.to_tokens(batch, prepend_bos=False, padding_side="right"), lengths

    def _streams(self, job: dict[str, Any], layers: list[int]) -> Iterator[tuple[list[Any], list[int]]]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
        with self._torch.no_grad():
            for tokens, lengths in self._batches(job):
                _, cache = self._model.run_with_cache(tokens, names_filter=names)
                yield [cache[name] for name in names], lengths

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            kept = []
            for outputs, lengths in self._streams(job, list(range(self._model.cfg.n_layers))):
                rows, last = range(len(lengths)), [length - 1 for length in lengths]
                kept.append(self._torch.stack([output[rows, last] for output in outputs], dim=1))
            return self._torch.cat(kept).numpy()

        return work

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            kept = []
            for (output,), lengths in self._streams(job, [job["layer"]]):
                kept += [row[:length] for row, length in zip(output, lengths, strict=True)]
            return self._torch.cat(kept).numpy()

        return work

    def perplexity(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            means = []
            with self._torch.no_grad():
                for tokens, lengths in self._batches(job):
                    losses = self._model(tokens, return_type="loss", loss_per_token=True)
                    means += [row[: length - 1].mean() for row, length in zip(losses, lengths, strict=True)]
            return self._torch.stack(means).exp().numpy()

        return work


if __name__ == "__main__":
    serve(TransformerLens)
