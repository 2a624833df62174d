"""From prompts as token ids to the arguments of one forward pass: each prompt as it is alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import nn

    from actcache.model.invariance import BatchPolicy


def accepts(module: nn.Module, name: str) -> bool:
    """Whether `module` hands an argument of this name on to something that uses it."""
    parameters = inspect.signature(module.forward).parameters
    if name in parameters:
        return True
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False
    wrapped: Callable[[], nn.Module] | None = getattr(module, "get_base_model", None)
    inner = wrapped() if callable(wrapped) else getattr(module, "base_model", module)
    return inner is not module and accepts(inner, name)


class ForwardInputs:
    """Makes the arguments of `module`'s forward passes.

    Args:
        module: what is called: a model, its backbone, or its encoder.
        policy: how its model's prompts may be batched.
        decoder_start: makes the decoder's token ids of prompts ``[B, S]``; needed where `module` takes them.
        always_mask: give a mask also where there is no padding.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: BatchPolicy,
        *,
        decoder_start: Callable[[], int] | None = None,
        always_mask: bool = False,
    ) -> None:
        self._masked = accepts(module, "attention_mask")
        self._always = always_mask or policy.mask_always
        self._positions = policy.position_ids and accepts(module, "position_ids")
        self._cache = accepts(module, "use_cache")
        self._start: int | None = None
        self._decoder_masked = False
        if decoder_start is not None and accepts(module, "decoder_input_ids"):
            self._start = decoder_start()
            self._decoder_masked = accepts(module, "decoder_attention_mask")

    @property
    def tells_lengths(self) -> bool:
        """Whether a mask tells the model which tokens of a padded batch are real, in each of its stacks."""
        return self._masked and (self._start is None or self._decoder_masked)

    def make(self, sequences: Sequence[Sequence[int] | npt.NDArray[np.int32]], device: torch.device) -> dict[str, Any]:
        """Arguments for `sequences` (token ids of each prompt): padded on the right, masked by their lengths."""
        import numpy as np
        import torch

        from actcache.model.decoder_inputs import shift_right

        lengths = np.asarray([len(s) for s in sequences])
        longest = int(lengths.max())
        # Any id will do after a prompt's end: those positions are masked and never kept.
        padded = np.zeros((len(sequences), longest), np.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = sequence
        ids = torch.from_numpy(padded).to(device)
        inputs: dict[str, Any] = {"input_ids": ids}
        mask = None
        if self._masked and (self._always or int(lengths.min()) != longest):
            real = np.arange(longest)[None, :] < lengths[:, None]
            mask = torch.from_numpy(real.astype(np.int64)).to(device)
            inputs["attention_mask"] = mask
        if self._positions:
            inputs["position_ids"] = torch.arange(longest, device=device).unsqueeze(0).expand(len(sequences), -1)
        if self._start is not None:
            inputs["decoder_input_ids"] = shift_right(ids, self._start)
            if mask is not None and self._decoder_masked:
                inputs["decoder_attention_mask"] = mask
        if self._cache:
            inputs["use_cache"] = False
        return inputs
