"""The work of `benchmarks/peers.py` with nnsight: `tracer.cache` of the blocks, a trace for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from _worker import Peer, batches, serve


class Nnsight(Peer):
    distribution = "nnsight"

    def __init__(self) -> None:
        import torch
        from nnsight import LanguageModel

        torch.set_num_threads(1)
        self._torch, self._class = torch, LanguageModel

    def load(self, folder: str) -> None:
        self._model = self._class(folder, device_map="cpu", dtype=self._torch.float32, dispatch=True)

    def _rows(self, job: dict[str, Any], blocks: list[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Of each batch the blocks' outputs, and which of its positions are tokens."""
        with self._torch.no_grad():
            for batch in batches(job["prompts"], job["batch"]):
                # It pads on the left and marks nothing: the tokenizer says how many tokens a prompt has.
                lengths = [len(ids) for ids in self._model.tokenizer(batch)["input_ids"]]
                with self._model.trace(batch) as tracer:
                    cache = tracer.cache(modules=blocks)
                yield [cache[block.path].output for block in blocks], lengths

    def _blocks(self) -> list[Any]:
        inner = self._model.transformer.h if hasattr(self._model, "transformer") else self._model.model.layers
        return list(inner)

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            kept = []
            for outputs, _ in self._rows(job, self._blocks()):
                kept.append(self._torch.stack([output[:, -1] for output in outputs], dim=1))
            return self._torch.cat(kept).numpy()

        return work

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            kept = []
            for (output,), lengths in self._rows(job, [self._blocks()[job["layer"]]]):
                kept += [row[-length:] for row, length in zip(output, lengths, strict=True)]
            return self._torch.cat(kept).numpy()

        return work


if __name__ == "__main__":
    serve(Nnsight)
