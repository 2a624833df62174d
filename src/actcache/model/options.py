"""How a model is to be loaded and run; checked before any work starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import OptionError, require_choice

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading that reach transformers, with the compute dtype and the device made explicit."""

    dtype: str | None = None
    device: str = "auto"
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    device_map: Any = None
    quantization_config: Any = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_hooks: tuple[str, ...] = ()


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """The canonical name of a compute dtype (``"bfloat16"`` for ``torch.bfloat16`` and ``"bf16"``), or None.

    Raises `OptionError` for anything that is not a floating dtype a model can run in.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    return require_choice(_DTYPE_ALIASES.get(name, name), DTYPES, "dtype")


def resolve_device(device: str | torch.device) -> str:
    """`device`, with ``"auto"`` resolved to the accelerator that is there, else the CPU.

    Raises `OptionError` for a device torch does not know or that is not there.
    """
    import torch

    if str(device) == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"unknown device {device!r}: expected 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.") from error
    missing = (resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()) or (
        resolved.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise OptionError(f"device {str(device)!r} is not available here; use device='cpu' or device='auto'.")
    return str(resolved)


def check_device_name(device: object) -> None:
    """Refuse a device that cannot be one, without importing torch."""
    kind = str(device).split(":")[0]
    if kind == "auto":
        return
    require_choice(kind, ("cpu", "cuda", "mps", "xpu", "auto"), "device")


# Arguments of `from_pretrained` that have a parameter here, or that choose what the identity could not follow.
_OWN = ("attn_implementation", "device_map", "dtype", "quantization_config", "revision", "token", "trust_remote_code")
_REFUSED = {
    **dict.fromkeys(_OWN, "use the parameter of that name"),
    "torch_dtype": "use dtype=",
    "config": "change the folder's config.json, or load the model and pass it",
    "state_dict": "load the model and pass it",
    "subfolder": "pass the subfolder itself as the model",
    "output_loading_info": "leave it out",
    "adapter_kwargs": "pass the adapter's folder as the model",
    "use_auth_token": "use token=",
    "cache_dir": "set the environment variable HF_HUB_CACHE",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "proxies": "set the environment variable HTTPS_PROXY",
    "ignore_mismatched_sizes": "weights of another shape would be random",
}
# Where weights are kept while the model runs; no number depends on it.
_PLACEMENT = ("low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder", "offload_state_dict")


def check_model_kwargs(model_kwargs: Mapping[str, Any]) -> Any:
    """`model_kwargs` as JSON values, without those that only place weights: they are part of the identity.

    `OptionError` for what cannot be.
    """
    for key in model_kwargs:
        if key in _REFUSED:
            raise OptionError(f"model_kwargs holds {key!r}: {_REFUSED[key]}.")
    return as_json({key: value for key, value in model_kwargs.items() if key not in _PLACEMENT})


def as_json(value: Any) -> Any:
    """An option as JSON values; `OptionError` for an object that could not be told from another one."""

    def default(item: Any) -> Any:
        if callable(getattr(item, "to_dict", None)):
            return item.to_dict()
        if isinstance(item, Path) or (type(item).__module__ == "torch" and type(item).__name__ in ("dtype", "device")):
            return str(item)
        raise OptionError(
            f"a {type(item).__name__} among the model options cannot be part of the model's identity: "
            "load the model that way and pass it."
        )

    if value is None:
        return None
    return json.loads(json.dumps(value, sort_keys=True, default=default))
