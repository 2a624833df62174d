"""Adapters of peft: folders that hold one beside no model, and models in memory that carry some."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import MissingExtraError, ModelLoadError, OptionError
from actcache.model import identity

if TYPE_CHECKING:
    from torch import nn

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# They put vectors of their own before the prompt, or choose by prompt or task which adapter acts.
_REFUSED = frozenset(
    {"CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "XLORA"}
)
# What names things in an adapter's configuration, or steers its training.
_LABELS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "revision",
        "task_type",
    }
)


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """The configuration of the adapter in `folder`; None when there is none.

    Raises `ModelLoadError` for one that cannot be read, that names no base model, or whose kind is refused.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {str(path)!r}: {error}. Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("base_model_name_or_path"), str):
        raise ModelLoadError(
            f"{str(path)!r} names no base model: set its base_model_name_or_path to a local folder or a Hub id."
        )
    why = _why_refused(config)
    if why is not None:
        raise ModelLoadError(f"the adapter in {str(folder)!r} {why}")
    return config


def files(folder: Path) -> list[Path]:
    """Configuration and weights of the adapter in a local folder; `ModelLoadError` when it has no weights."""
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise ModelLoadError(f"no adapter weights in {str(folder)!r}: expected {' or '.join(WEIGHTS)}.")
    # peft takes the first.
    return [folder / CONFIG, weights[0]]


def weight_names(folder: Path) -> list[str]:
    """The names of the weights of the adapter in a local folder."""
    path = files(folder)[1]
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            return list(file.keys())
    import torch

    return list(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of the values of an adapter's configuration that can change numbers."""

    def plain(value: Any) -> Any:
        # Target modules are a set in memory, and a list in no fixed order in files.
        return sorted(value, key=str) if isinstance(value, (set, frozenset, list, tuple)) else value

    return identity.digest_json({k: plain(v) for k, v in config.items() if k not in _LABELS and v is not None})


def attach(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter in `folder` active; the model itself, changed in place.

    Raises `MissingExtraError` without peft, `ModelLoadError` for an adapter that does not fit or lacks weights.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(f"{str(folder)!r} holds an adapter, which needs peft: pip install peft") from error
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        _refuse(config, f"the adapter in {str(folder)!r}", ModelLoadError)
        wrapped = peft.PeftModel.from_pretrained(model, folder, config=config, is_trainable=False)
        there = peft.utils.load_peft_weights(str(folder), device="cpu")
        # By itself it would ask the Hub whether the base model's vocabulary has changed.
        wanted = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelLoadError(f"cannot load the adapter in {str(folder)!r}: {error}") from error
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise ModelLoadError(
            f"the adapter in {str(folder)!r} lacks {', '.join(missing[:3])}, which would be random: save it again."
        )
    inner: nn.Module = wrapped.get_base_model()
    return inner


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, whose layers carry the adapters; any other model as it is.

    Raises `OptionError` for adapters that change what the model is given.
    """
    wrapper: Any = model
    configs = getattr(wrapper, "peft_config", None)
    if not isinstance(configs, dict) or not callable(getattr(wrapper, "get_base_model", None)):
        return model
    for name, config in configs.items():
        _refuse(config, f"adapter {name!r} of the model", OptionError)
    inner: nn.Module = wrapper.get_base_model()
    return inner


def of_model(model: nn.Module) -> dict[str, str] | None:
    """The adapters a model in memory carries: their names, and digests of their configurations."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    return {str(name): config_digest(config.to_dict()) for name, config in configs.items()}


def _refuse(config: Any, whose: str, error: type[Exception]) -> None:
    why = _why_refused(config.to_dict(), bool(getattr(config, "is_prompt_learning", False)))
    if why is not None:
        raise error(f"{whose} {why}")


def _why_refused(config: Mapping[str, Any], prompt_learning: bool = False) -> str | None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type"))).upper()
    if kind in _REFUSED or prompt_learning:
        return (
            f"is of the kind {kind}, which changes what the model is given beside the prompt, so no value would be the "
            "prompt's alone: extract from the base model, or from one with an adapter in its layers (LoRA)."
        )
    if config.get("alora_invocation_tokens"):
        return (
            "is an activated LoRA, which acts from certain tokens of a prompt on: extract from the base model, or from "
            "one with an adapter that acts on every token (LoRA)."
        )
    return None
