"""What a data loader yields, as passes in which every prompt gives what it gives alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actcache.capture.inputs import Preparer, Prompts
from actcache.errors import PromptError, PromptTypeError, did_you_mean
from actcache.model.chat import is_chat
from actcache.model.forward_inputs import accepts

# What a model computes a loss from, and what in a data set are often other numbers.
_LOSS = ("start_positions", "end_positions")
_TOKENS = ("input_ids", "inputs_embeds")


@dataclass
class OnePass:
    """Some prompts of a batch, by their numbers, and what the model is called with for them."""

    rows: list[int]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ReadBatch:
    """The passes that make up a batch of `size` prompts, and the prompts where they are known."""

    size: int
    passes: list[OnePass]
    prompts: Prompts | None = None


class BatchReader:
    """Reads batches for one model."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self._model = model
        self.preparer = Preparer(model, tokenizer)
        self._of_tokens = accepts(model, "input_ids")

    def read(self, batch: Any) -> ReadBatch:
        """The passes of `batch`; raises `PromptError`, `PromptTypeError` or `TokenizerError`."""
        inputs = _inputs_of(batch)
        if isinstance(inputs, Mapping):
            return self._fields(inputs)
        if isinstance(inputs, np.ndarray):
            inputs = torch.from_numpy(inputs)
        if isinstance(inputs, Tensor) and not self._of_tokens:
            if inputs.ndim == 0 or not len(inputs):
                raise PromptError(f"a tensor of shape {list(inputs.shape)} has no rows: expected at least one")
            inputs = inputs.to(self.preparer.device)
            return ReadBatch(len(inputs), [OnePass(list(range(len(inputs))), (inputs,))])
        return self._apart(self.preparer.read(inputs))

    def _apart(self, prompts: Prompts) -> ReadBatch:
        """A pass for all prompts, or passes of those that may share one."""
        lengths = list(map(len, prompts.ids))
        together = self.preparer.policy.lengths
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault({"any": 0, "equal": length, "alone": row}[together], []).append(row)
        passes = [
            OnePass(rows, kwargs=self.preparer.one_pass([prompts.ids[row] for row in rows])) for rows in groups.values()
        ]
        return ReadBatch(len(lengths), passes, prompts)

    def _fields(self, batch: Mapping[str, Any]) -> ReadBatch:
        """A mapping: the fields that the model takes, as they are where each prompt then gives what it gives alone."""
        taken = {
            name: value
            for name, value in batch.items()
            if value is not None and isinstance(name, str) and self._takes(name)
        }
        if not any(name in taken for name in (_TOKENS if self._of_tokens else batch)):
            raise PromptTypeError(self._nothing_taken(batch))
        taken = {name: _as_tensor(name, value) for name, value in _padded(taken).items()}
        main = next((taken[name] for name in _TOKENS if name in taken), None)
        if main is None:
            tensor = next((value for value in taken.values() if isinstance(value, Tensor) and value.ndim), None)
            if tensor is None:
                raise PromptTypeError(self._nothing_taken(batch))
            rows = list(range(len(tensor)))
            return ReadBatch(len(rows), [OnePass(rows, kwargs=self.preparer.of_mapping(taken).kwargs)])
        _check_fields(taken, main)
        prepared = self.preparer.of_mapping(taken)
        prompts = prepared.prompts
        mask = taken.get("attention_mask")
        real = mask.bool() if mask is not None else torch.ones(main.shape[:2], dtype=torch.bool)
        if prompts is not None:
            self.preparer.check(prompts.ids)
        why = self._unlike_alone(taken, real)
        if why is None:
            if accepts(self._model, "use_cache"):
                prepared.kwargs.setdefault("use_cache", False)
            return ReadBatch(len(main), [OnePass(list(range(len(main))), kwargs=prepared.kwargs)], prompts)
        more = [name for name in taken if name not in ("input_ids", "attention_mask") and not _is_default(name, taken)]
        if more or prompts is None:
            named = more[0] if more else "inputs_embeds"
            raise PromptError(
                f"the prompts of this batch cannot run together on this model: {why} With the field {named!r} they "
                "cannot be taken apart either: pass prompts of one length, without padding, or leave the field out."
            )
        return self._apart(prompts)

    def _takes(self, name: str) -> bool:
        return "label" not in name and name not in _LOSS and accepts(self._model, name)

    def _unlike_alone(self, taken: Mapping[str, Any], real: Tensor) -> str | None:
        """Why prompts would not give in this batch what they give alone, as a sentence; None when they do."""
        policy = self.preparer.policy
        several, padded = len(real) > 1, not bool(real.all())
        if several and policy.lengths == "alone":
            return policy.why
        if padded and policy.lengths != "any":
            return policy.why
        on_the_right = bool((real.long().diff(dim=1) <= 0).all())
        if not on_the_right and not self.preparer.counts_positions and "position_ids" not in taken:
            return "It is not told where tokens stand, and there is padding in front of them."
        decoder = "decoder_input_ids" in taken or "decoder_inputs_embeds" in taken or "encoder_outputs" in taken
        if self.preparer.needs_decoder and not decoder:
            return "Its decoder is given nothing."
        if self.preparer.policy.mask_always and "attention_mask" not in taken:
            return "It takes tokens that have the padding id for padding where it is given no mask."
        return None

    def _nothing_taken(self, batch: Mapping[str, Any]) -> str:
        parameters = inspect.signature(self._model.forward).parameters
        named = [name for name, one in parameters.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        wanted = [name for name in _TOKENS if self._of_tokens and accepts(self._model, name)] or named[:4]
        near = next(
            (f" Rename {name!r}." for name in batch if isinstance(name, str) and did_you_mean(name, wanted)), ""
        )
        return (
            f"the batch has the fields {', '.join(map(repr, batch))}, and {type(self._model).__name__} needs "
            f"{' or '.join(map(repr, wanted))}.{near} A batch of texts goes in as the first of a pair: "
            "((batch['text'], batch) for batch in loader)."
        )


def _inputs_of(batch: Any) -> Any:
    """What the model is to run: of a pair ``(inputs, anything)`` the first.

    A data loader that joins pairs makes lists of them, and a list is also what prompts come in: it is one of prompts
    unless its first item holds several of them.
    """
    if isinstance(batch, tuple):
        if not batch:
            raise PromptError("the batch is an empty tuple: expected (inputs, anything)")
        if not _several(batch[0]):
            raise PromptTypeError(
                f"the batch is a tuple whose first item is {batch[0]!r:.80}: a tuple is read as (inputs, anything), "
                "where inputs is a list of prompts, a dict or a tensor [B, S]. Prompts themselves go in a list."
            )
        return batch[0]
    if not isinstance(batch, list) or not batch or (is_chat(batch) and "role" in batch[0]) or not _several(batch[0]):
        return batch
    shapes = {tuple(item.shape) for item in batch if isinstance(item, (Tensor, np.ndarray)) and item.ndim == 2}
    if len(shapes) > 1 and all(rows == 1 for rows, _ in shapes):
        raise PromptTypeError(
            f"the batch is a list of arrays {sorted(map(list, shapes))}, which may be several prompts, or one and what "
            "belongs to it: make prompts one-dimensional ([S]), or the pair a tuple"
        )
    return batch[0]


def _several(inputs: Any) -> bool:
    """Whether these are inputs of a batch rather than one prompt."""
    if isinstance(inputs, Mapping):
        return True
    if isinstance(inputs, (Tensor, np.ndarray)):
        return inputs.ndim > 1
    if not isinstance(inputs, (list, tuple)) or not inputs:
        return False
    return all(isinstance(item, (str, list, tuple, Tensor, np.ndarray)) for item in inputs) and not all(
        isinstance(item, (Tensor, np.ndarray)) and item.ndim == 0 for item in inputs
    )


def _padded(taken: dict[str, Any]) -> dict[str, Any]:
    """Lists of different lengths, as a tokenizer returns them that was not told to pad, as lists of one length behind a
    mask."""
    ids = taken.get("input_ids")
    if not isinstance(ids, (list, tuple)) or not all(hasattr(row, "__len__") for row in ids):
        return taken
    lengths = list(map(len, ids))
    if len(set(lengths)) < 2:
        return taken
    longest = max(lengths)
    result = dict(taken)
    for name, rows in taken.items():
        if isinstance(rows, (list, tuple)) and [len(row) for row in rows if hasattr(row, "__len__")] == lengths:
            result[name] = [[*row, *[0] * (longest - len(row))] for row in rows]
    result.setdefault("attention_mask", [[1] * n + [0] * (longest - n) for n in lengths])
    return result


def _as_tensor(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if not isinstance(value, (list, tuple)):
        return value
    try:
        if value and all(isinstance(row, Tensor) for row in value):
            return torch.stack(list(value))
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise PromptTypeError(f"the field {name!r} of the batch is no rectangle of numbers: {error}") from None


def _check_fields(taken: Mapping[str, Any], main: Any) -> None:
    name = next(name for name in _TOKENS if name in taken)
    dimensions = 2 if name == "input_ids" else 3
    if not isinstance(main, Tensor) or main.ndim != dimensions or not len(main):
        shape = list(main.shape) if isinstance(main, Tensor) else type(main).__name__
        expected = "[B, S]" if dimensions == 2 else "[B, S, D]"
        raise PromptTypeError(
            f"the field {name!r} of the batch is {shape}: expected a tensor {expected} with a row for each prompt "
            "(DataLoader(dataset, batch_size=8) makes batches of rows)"
        )
    mask = taken.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != main.shape[:2]):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PromptTypeError(
            f"the field 'attention_mask' of the batch is {shape}, and {name!r} is {list(main.shape)}: expected a mask "
            f"{list(main.shape[:2])}"
        )
    for other, value in taken.items():
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] in (1, len(main)):
            continue
        # Images have as many rows as there are images, or patches of them.
        if value.ndim == 1 or value.shape[1] == main.shape[1]:
            raise PromptTypeError(
                f"the field {other!r} of the batch has {value.shape[0]} rows, and {name!r} has {len(main)}"
            )


def _is_default(name: str, taken: Mapping[str, Any]) -> bool:
    """Whether the model does the same when this field is left out."""
    value = taken[name]
    return name == "token_type_ids" and isinstance(value, Tensor) and not bool(value.any())
