"""Quantised models: whether a prompt's values depend on its batch companions, and weights that are no parameters.

Quantised weights are numbers like any others. Quantised activations need a scale, and where that scale is taken over
the whole batch, every prompt of the batch changes every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from actcache.errors import OptionError
from actcache.model.options import as_json

if TYPE_CHECKING:
    import torch

ActivationScale = Literal["none", "per_token", "per_batch"]

_ORDER: tuple[ActivationScale, ...] = ("none", "per_token", "per_batch")
# Methods of transformers that keep activations as they are (or give them a scale that was fixed beforehand).
_WEIGHTS_ONLY = frozenset(
    {"aqlm", "awq", "eetq", "gguf", "gptq", "higgs", "hqq", "metal", "mxfp4", "quanto", "sinq", "spqr", "vptq"}
)
# One scale per token, or per group of a token's dimensions.
_PER_TOKEN = frozenset({"bitnet", "fbgemm_fp8"})
_FP8 = frozenset({"fp8", "mxfp8"})
_DYNAMIC_MODULES = ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")


def activation_scale(
    of: torch.nn.Module | Mapping[str, Any] | None, quantization_config: object = None
) -> ActivationScale:
    """How the activations of a model are quantised: whether a prompt's values depend on what else is in its batch.

    Args:
        of: a model in memory, or a model's configuration as a mapping (``config.json``).
        quantization_config: what the model is to be quantised with when it is loaded: a mapping, or an object of
            transformers with ``to_dict``.

    Returns:
        ``"none"``: activations are not quantised, or by a scale that was fixed beforehand; ``"per_token"``: by a scale
        of each token's own; ``"per_batch"``: by a scale or a threshold over the whole batch, so that every prompt
        changes the others. A method that is not known counts as ``"per_batch"``.
    """
    found: list[ActivationScale] = ["none"]
    configs: list[object] = [quantization_config]
    if isinstance(of, Mapping):
        configs += _configs_in(of)
    elif of is not None:
        config: Any = getattr(of, "config", None)
        if hasattr(config, "to_dict"):
            configs += _configs_in(config.to_dict())
        found += [_of_module(module) for module in of.modules()]
    found += [_of_config(config) for config in map(as_mapping, configs) if config]
    return max(found, key=_ORDER.index)


def as_mapping(quantization_config: object) -> Mapping[str, Any]:
    """A quantisation config as a mapping: its own, or what its ``to_dict`` gives; empty for None."""
    if isinstance(quantization_config, Mapping):
        return quantization_config
    to_dict = getattr(quantization_config, "to_dict", None)
    given = to_dict() if callable(to_dict) else {}
    return given if isinstance(given, Mapping) else {}


def canonical(quantization_config: object) -> Any:
    """A quantisation config as JSON values for the identity: the same for a mapping and for an object that says it.

    Raises `OptionError` for an object that could not be told from another one.
    """
    if quantization_config is None:
        return None
    if not isinstance(quantization_config, Mapping) and not hasattr(quantization_config, "to_dict"):
        raise OptionError(
            f"quantization_config is {quantization_config!r}: expected a config object of transformers, such as "
            "QuantoConfig(weights='int8'), or its values as a dict."
        )
    given = as_json(quantization_config)
    # An object spells out what it was not given.
    return {key: value for key, value in given.items() if value is not None}


def _configs_in(config: Mapping[str, Any]) -> Iterator[object]:
    for key, value in config.items():
        if key == "quantization_config":
            yield value
        elif isinstance(value, Mapping):
            yield from _configs_in(value)


def _of_config(config: Mapping[str, Any]) -> ActivationScale:
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method", "")))
    if config.get("dequantize"):
        return "none"
    if config.get("load_in_4bit"):
        return "none"
    if config.get("load_in_8bit"):
        # Columns with an outlier in any row of the batch are computed in full precision.
        return "per_batch" if float(config.get("llm_int8_threshold", 6.0)) > 0 else "per_token"
    if method in _WEIGHTS_ONLY:
        return "none"
    if method in _PER_TOKEN:
        return "per_token"
    if method in _FP8:
        return "none" if config.get("activation_scheme") == "static" else "per_token"
    if method == "auto-round":
        return "none" if int(config.get("act_bits") or 16) >= 16 else "per_batch"
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "torchao":
        return _torchao(str(config.get("quant_type")))
    return "per_batch"


def _compressed_tensors(config: Mapping[str, Any]) -> ActivationScale:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        return "per_batch"
    found: list[ActivationScale] = ["none"]
    for group in groups.values():
        given = group.get("input_activations") if isinstance(group, Mapping) else {"dynamic": True}
        if given is None or not given.get("dynamic"):
            continue
        found.append("per_token" if given.get("strategy") in ("token", "group", "tensor_group") else "per_batch")
    return max(found, key=_ORDER.index)


def _torchao(quant_type: str) -> ActivationScale:
    """By the name of the configuration and of the granularity in it: both are in what torchao writes."""
    name = quant_type.replace("_", "").lower()
    if "dynamicactivation" in name:
        # For int8 the default is a scale per token; for float8 it is one per tensor.
        per_row = "perrow" in name or "pertoken" in name or "int8dynamicactivation" in name
        return "per_token" if per_row and "pertensor" not in name else "per_batch"
    return "none" if "weightonly" in name or "staticactivation" in name else "per_batch"


def _of_module(module: torch.nn.Module) -> ActivationScale:
    kind = type(module)
    if kind.__module__.startswith(_DYNAMIC_MODULES):
        # Half-precision weights of the same classes leave activations as they are.
        packed = getattr(module, "_packed_params", None)
        return "none" if "float16" in str(getattr(packed, "dtype", "")) else "per_batch"
    if kind.__name__ == "Linear8bitLt":
        threshold = getattr(getattr(module, "state", None), "threshold", 6.0)
        return "per_batch" if threshold > 0 else "per_token"
    for weight in module._parameters.values():
        # Tensors of torchao that quantise what they are multiplied with.
        how = getattr(weight, "act_quant_kwargs", None)
        if how is not None:
            text = repr(how)
            return "per_token" if ("PerRow" in text or "PerToken" in text) and "PerTensor" not in text else "per_batch"
        if type(weight).__name__ == "LinearActivationQuantizedTensor":
            return "per_batch"
    return "none"
