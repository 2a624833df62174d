"""What the tests of edits share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import actcache as ac


def plain(tensor: Any) -> Tensor:
    return tensor if isinstance(tensor, Tensor) else tensor[0]


def moved(x: Tensor) -> Tensor:
    return x.flip(-1) * 1.5 + 0.25


def state(model: nn.Module) -> list[Any]:
    return [
        {name: dict(value) if isinstance(value, dict) else id(value) for name, value in module.__dict__.items()}
        for module in model.modules()
    ]


def in_place(function: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """`function` with nothing returned."""

    def change(x: Tensor) -> None:
        function(x)

    return change


def run(model: Any, edits: Any, sites: Any, ids: Tensor, **kwargs: Any) -> Any:
    """What one pass gives at `sites`, under `edits` (None: as it is)."""
    if model.config.is_encoder_decoder:
        kwargs.setdefault("decoder_input_ids", ids)
    with torch.no_grad(), ac.capture(model, sites=sites) as cache:
        if edits is None:
            model(ids, **kwargs)
        else:
            with ac.edit(model, edits):
                model(ids, **kwargs)
    return cache


def hold_generation(model: Any, edit: Any, n_new: int, **given: Tensor) -> None:
    """`n_new` tokens under an edit are the same with and without a KV cache, to within rounding, and others than
    without the edit."""
    options: dict[str, Any] = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, **given}
    found = []
    for cached in (True, False):
        with ac.edit(model, edit):
            found.append(model.generate(**options, use_cache=cached))
    (logits, again) = (torch.stack(one.logits) for one in found)
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(logits, again, rtol=1e-3, atol=1e-3)
    plain = model.generate(**options)
    assert not torch.allclose(torch.stack(plain.logits), logits, atol=1e-3)
