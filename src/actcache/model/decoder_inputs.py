"""What the decoder of an encoder-decoder model is given for a prompt.

A prompt is the encoder's input. The decoder gets the same tokens shifted right behind the start token, as in training
with the prompt as its own target: row ``i`` of a decoder site is the state that predicts token ``i`` of the prompt,
and a prompt has as many rows there as in the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actcache.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration has an encoder and a decoder."""
    return bool(config.get("is_encoder_decoder"))


def decoder_start(config: Mapping[str, Any]) -> int | None:
    """The token in front of the decoder's input: the start token, else the BOS; None when neither is named."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        for part in (config, config.get("decoder")):
            value = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def require_decoder_start(config: Mapping[str, Any]) -> int:
    """`decoder_start`; an `OptionError` when the configuration names none."""
    start = decoder_start(config)
    if start is None:
        raise OptionError(
            "the model's config names neither decoder_start_token_id nor bos_token_id, so that a prompt gives its "
            "decoder no input: set config.decoder_start_token_id, or ask for sites of the encoder only."
        )
    return start


def decoder_values(config: Mapping[str, Any]) -> dict[str, str]:
    """What this definition adds to a model's identity; nothing for a model with one stack of blocks."""
    return {"decoder_input": f"shifted-right:{decoder_start(config)}"} if is_encoder_decoder(config) else {}


def shift_right(ids: Tensor, start: int) -> Tensor:
    """Decoder input ``[B, S]`` for right-padded prompts ``[B, S]``: `start`, then every token but the last."""
    shifted = ids.new_full(ids.shape, start)
    shifted[:, 1:] = ids[:, :-1]
    return shifted
