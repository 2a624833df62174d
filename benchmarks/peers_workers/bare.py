"""What is right: one prompt at a time through the bare model, read by hooks of torch. Imports none of the libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _worker import Peer, serve


class Bare(Peer):
    distribution = "transformers"

    def __init__(self) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self._torch, self._transformers = torch, transformers

    def load(self, folder: str) -> None:
        self._model = self._transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(folder)
        base = self._model.base_model
        self._blocks = list(base.h if hasattr(base, "h") else base.layers)

    def _passes(self, prompts: list[str]) -> list[tuple[Any, Any, Any]]:
        """Of each prompt its token ids, its logits, and ``[layers, tokens, width]``."""
        found = []
        for prompt in prompts:
            outputs: list[Any] = []

            def keep(module: Any, given: Any, output: Any, outputs: list[Any] = outputs) -> None:
                outputs.append((output[0] if isinstance(output, tuple) else output)[0])

            hooks = [block.register_forward_hook(keep) for block in self._blocks]
            try:
                ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
                with self._torch.no_grad():
                    logits = self._model(ids).logits[0]
            finally:
                for hook in hooks:
                    hook.remove()
            found.append((ids[0], logits, self._torch.stack(outputs)))
        return found

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        return lambda: np.stack([states[:, -1].numpy() for _, _, states in self._passes(job["prompts"])])

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        return lambda: np.concatenate([states[job["layer"]].numpy() for _, _, states in self._passes(job["prompts"])])

    read_back = every_token

    def perplexity(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        def work() -> np.ndarray:
            means = []
            for ids, logits, _ in self._passes(job["prompts"]):
                chances = logits[:-1].double().log_softmax(-1)
                means.append(-chances[range(len(ids) - 1), ids[1:]].mean())
            return self._torch.stack(means).exp().numpy()

        return work


if __name__ == "__main__":
    serve(Bare)
