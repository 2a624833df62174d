"""The block of a trace that is sent to another process, and the session around it.

nnsight sends the source of a ``with`` block and the values it names. What it names here is data, torch and nnsight:
things of this package would have to be installed there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from actcache.capture.positions import resolve_positions
from actcache.derive.results import TOKEN_NLL, Asked
from actcache.errors import EngineError, MissedModuleError
from actcache.extract.backends import RESULT, Reduction
from actcache.extract.backends.reducing import ArrivedRows, pooled_rows
from actcache.model.plain import Plain

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from actcache.model.forward_inputs import ForwardInputs
    from actcache.model.invariance import BatchPolicy

Order = Sequence[tuple[str, str, Sequence[str]]]

# Logits that the block looks at at a time.
_PART_BYTES = 256 << 20


class ShippedSession:
    """Runs batches as blocks that travel.

    Args:
        envoy: the model as nnsight wraps it.
        sender: makes what carries one block (nnsight's "backend"), and turns its errors into ours.
        order: what is read, in the order of a pass; `places` where. The model's own output comes last.
    """

    def __init__(
        self,
        envoy: Any,
        sender: Callable[[Callable[[Any], dict[str, torch.Tensor]]], dict[str, torch.Tensor]],
        inputs: ForwardInputs,
        policy: BatchPolicy,
        reduction: Reduction,
        asked: Asked,
        order: Order,
        places: Mapping[str, Plain],
    ) -> None:
        self.policy = policy
        self._envoy = envoy
        self._sender = sender
        self._inputs = inputs
        self._reduction = reduction
        self._asked = asked
        self._sites = list(places)
        # Parts of BERT are called as nnsight calls what it serves.
        self._reads = [
            (
                [_mounted(part) for part in path.split(".") if part],
                side,
                [(name, places[name].item, places[name].scale) for name in names],
            )
            for path, side, names in order
        ]

    def run(self, sequences: Sequence[npt.NDArray[np.int32]], positions: Sequence[Any] | None = None) -> ArrivedRows:
        lengths = [len(s) for s in sequences]
        kept, pooling = self._kept(lengths, positions)
        counts = [len(where) for where in kept]
        prompt = torch.tensor([i for i, where in enumerate(kept) for _ in where])
        position = torch.tensor([p for where in kept for p in where])
        shape = len(sequences), max(lengths)
        inputs = self._inputs.make(sequences, torch.device("cpu"))
        predictions = self._predictions(sequences)

        def block(backend: Any) -> dict[str, torch.Tensor]:
            rows = prompt, position, counts
            return _trace(self._envoy, inputs, backend, self._reads, shape, rows, pooling, predictions)

        answer = self._sender(block)
        expected = len(sequences) if pooling is not None else len(prompt)
        rows = {site: _checked(site, answer.get(site), expected) for site in self._sites}
        if callable(self._reduction.pooling):
            function = self._reduction.pooling
            rows = {site: pooled_rows(torch.split(r, counts), function) for site, r in rows.items()}
        return ArrivedRows(rows | self._results(answer, sum(lengths), len(sequences)))

    def _kept(self, lengths: Sequence[int], positions: Sequence[Any] | None) -> tuple[list[list[int]], str | None]:
        """The positions of each prompt that are wanted, and how they are pooled there; "" takes them as they are."""
        pooling = self._reduction.pooling
        where = positions if positions is not None else [self._reduction.positions] * len(lengths)
        kept = [resolve_positions(p, n) for p, n in zip(where, lengths, strict=True)]
        if pooling == "last_token":
            return [k[-1:] for k in kept], ""
        if pooling == "first_token":
            return [k[:1] for k in kept], ""
        return kept, pooling if isinstance(pooling, str) else None

    def _predictions(self, sequences: Sequence[npt.NDArray[np.int32]]) -> dict[str, Any] | None:
        """What the block computes of logits, as data: of which rows, the token that follows each, which are kept."""
        if not self._asked:
            return None
        logits = self._asked.logits
        every = self._asked.perplexity or (logits is not None and logits.positions == "all")
        rows = [(i, p) for i, s in enumerate(sequences) for p in (range(len(s)) if every else [len(s) - 1])]
        follows = [
            int(sequences[i][p + 1]) if self._asked.perplexity and p + 1 < len(sequences[i]) else -1 for i, p in rows
        ]
        keep = [logits is not None and (logits.positions == "all" or p + 1 == len(sequences[i])) for i, p in rows]
        return {
            "prompt": torch.tensor([i for i, _ in rows]),
            "position": torch.tensor([p for _, p in rows]),
            "follows": torch.tensor(follows),
            "keep": torch.tensor(keep),
            "top_k": None if logits is None else logits.top_k,
            "bytes": _PART_BYTES,
        }

    def _results(self, answer: Mapping[str, Any], n_tokens: int, n_prompts: int) -> dict[str, torch.Tensor]:
        found = {}
        if self._asked.perplexity:
            found[f"{RESULT}{TOKEN_NLL}"] = _checked(TOKEN_NLL, answer.get("losses"), n_tokens, dimensions=1)
        logits = self._asked.logits
        if logits is not None:
            expected = n_tokens if logits.positions == "all" else n_prompts
            for name, key in zip(logits.names, ("values", "indices"), strict=False):
                found[f"{RESULT}{name}"] = _checked(name, answer.get(key), expected)
        return found


def _mounted(part: str) -> str:
    from nnsight import Envoy

    descriptor = getattr(Envoy, part, None)
    return f"E_{part}" if hasattr(descriptor, "__set__") else part


def _checked(name: str, value: Any, rows: int, dimensions: int = 2) -> torch.Tensor:
    if value is None:
        raise MissedModuleError(f"{name} is not in the answer: it did not run there. Ask for other sites.")
    if not isinstance(value, torch.Tensor) or value.ndim != dimensions or len(value) != rows:
        shape = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise EngineError(f"the answer holds {shape} for {name}, where {rows} rows were asked for.")
    return value


def _trace(
    envoy: Any,
    inputs: dict[str, Any],
    backend: Any,
    reads: Sequence[tuple[list[str], str, list[tuple[str, int, float]]]],
    shape: tuple[int, int],
    rows: tuple[torch.Tensor, torch.Tensor, list[int]],
    pooling: str | None,
    predictions: dict[str, Any] | None,
) -> dict[str, torch.Tensor]:
    """One pass over `inputs`, and of it what is asked for.

    The block is read again from this file, and runs with nothing but the values it names: no function of ours, no
    class, no module.
    """
    import nnsight

    prompt, position, counts = rows
    last = predictions is None and not any(not path for path, _, _ in reads)
    kept: dict[str, torch.Tensor] = {}
    # fmt: off
    with envoy.trace(backend=backend, **inputs) as tracer:
        kept = nnsight.save({})
        for path, side, wanted in reads:
            module = envoy
            for part in path:
                module = getattr(module, part)
            if side == "input":
                args, kwargs = module.inputs
                found = [value for value in args[:1] if isinstance(value, torch.Tensor)]
                if not found and "hidden_states" in kwargs:
                    found = [kwargs["hidden_states"]]
                if not found:
                    found = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            else:
                returned = module.output
                found = []
                waiting = [returned["logits"]] if isinstance(returned, dict) and "logits" in returned else [returned]
                while waiting:
                    value = waiting.pop(0)
                    if isinstance(value, torch.Tensor):
                        found.append(value)
                    elif isinstance(value, dict):
                        waiting = [*value.values(), *waiting]
                    elif isinstance(value, (tuple, list)):
                        waiting = [*value, *waiting]
            for name, item, scale in wanted:
                hidden = found[item]
                if scale != 1.0:
                    hidden = hidden * scale
                if hidden.ndim == 2 and hidden.shape[0] == shape[0] * shape[1]:
                    # Experts are given rows without their batch.
                    hidden = hidden.reshape(shape[0], shape[1], -1)
                if tuple(hidden.shape[:2]) != tuple(shape):
                    raise ValueError(f"site {name} has the shape {list(hidden.shape)} for {list(shape)} tokens")
                at = hidden.device
                chosen = hidden.flatten(2)[prompt.to(at), position.to(at)]
                if pooling:
                    parts = torch.split(chosen, counts)
                    if pooling == "mean":
                        wide = torch.promote_types(chosen.dtype, torch.float32)
                        each = [(part.sum(0, dtype=wide) / part.shape[0]).to(part.dtype) for part in parts]
                    elif pooling == "max":
                        each = [part.amax(0) for part in parts]
                    else:
                        each = [part.amin(0) for part in parts]
                    chosen = torch.stack(each)
                kept[name] = chosen.detach().to("cpu")
        if predictions is not None:
            returned = envoy.output
            logits = returned["logits"] if isinstance(returned, dict) else next(v for v in returned if v.ndim > 1)
            at = logits.device
            some = logits[predictions["prompt"].to(at), predictions["position"].to(at)]
            follows, keep = predictions["follows"].to(at), predictions["keep"].to(at)
            step = max(1, predictions["bytes"] // (4 * some.shape[-1]))
            losses, values, indices = [], [], []
            for start in range(0, some.shape[0], step):
                wide = some[start:start + step].float()
                target, chosen = follows[start:start + step], keep[start:start + step]
                loss = torch.nn.functional.cross_entropy(wide, target, ignore_index=-1, reduction="none")
                losses.append(torch.where(target >= 0, loss, torch.nan))
                wide = wide[chosen]
                if predictions["top_k"] is not None:
                    largest = wide.topk(min(predictions["top_k"], wide.shape[-1]), dim=-1)
                    wide = largest.values
                    indices.append(largest.indices.to(torch.int32))
                values.append(wide)
            kept["losses"] = torch.cat(losses).detach().to("cpu")
            kept["values"] = torch.cat(values).detach().to("cpu")
            if indices:
                kept["indices"] = torch.cat(indices).detach().to("cpu")
        if last:
            tracer.stop()
    # fmt: on
    return kept
