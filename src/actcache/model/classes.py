"""Which class of transformers a configuration is loaded as, and the loading itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.errors import ModelLoadError

_HEADS = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM")


def auto_class(config: Any) -> Any:
    """The auto class that loads a model of `config` with its language-model head; `AutoModel` where there is none.

    An encoder-decoder is one also where transformers knows its decoder alone as a causal model; of an encoder that can
    be a decoder too, `architectures` tells which one was trained.
    """
    import transformers

    named = (getattr(config, "architectures", None) or [None])[0]
    remote = getattr(config, "auto_map", None) or {}
    for name in _HEADS:
        if name in remote and type(config).__module__.split(".")[0] != "transformers":
            return getattr(transformers, name)
    seq2seq, causal, masked = (getattr(transformers, name) for name in _HEADS)
    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        order = [seq2seq, causal, masked]
    else:
        known = causal._model_mapping.get(kind, None)
        is_causal = named == getattr(known, "__name__", "") or getattr(config, "is_decoder", False)
        order = [causal, masked] if is_causal else [masked, causal]
    for choice in order:
        if kind in choice._model_mapping:
            return choice
    return transformers.AutoModel


def is_causal(model: Any) -> bool:
    """Whether the logits of a transformers model are predictions of the token that follows."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def load_whole(kind: Any, place: str | Path, kwargs: Mapping[str, Any], name: str) -> Any:
    """A model of the auto class `kind` all of whose weights came from its files: transformers makes up what they lack.

    Where only the head is missing, the model without one. Raises `ModelLoadError` for other missing weights, and
    passes on what transformers raises.
    """
    from transformers import AutoModel

    model, report = kind.from_pretrained(place, output_loading_info=True, **kwargs)
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel and _only_the_head(model, missing):
        return load_whole(AutoModel, place, kwargs, name)
    if missing and all(key.split(".")[0] == "pooler" for key in missing):
        # Encoders sum up a prompt with it; nothing that is read here comes from there.
        return load_whole(kind, place, {**kwargs, "add_pooling_layer": False}, name)
    wrong = [str(entry[0]) for entry in report["mismatched_keys"]]
    if missing or wrong:
        keys = missing or sorted(wrong)
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ModelLoadError(
            f"the weights of {name!r} lack {', '.join(keys[:3])}{more}, which would be random: "
            "save the whole model again."
        )
    return model


def _only_the_head(model: Any, missing: list[str]) -> bool:
    from torch import nn

    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return not any(key.startswith(f"{prefix}.") for key in missing)
    # T5: its stacks lie in the model itself.
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    return bool(paths) and all(key.rpartition(".")[0] in paths for key in missing)
