"""A model that the caller has loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ForeignHooksError, ModelLoadError, OptionError
from actcache.model import identity
from actcache.model.folders import find_folder, load_tokenizer, no_tokenizer
from actcache.model.options import LoadOptions, dtype_name
from actcache.model.source import ModelIdentity, ModelSource, provenance


class LiveSource(ModelSource):
    """A model that the caller has loaded."""

    def __init__(self, model: Any, options: LoadOptions, tokenizer: Any = None) -> None:
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
            raise OptionError(
                f"model is a {type(model).__name__}: expected a Hub id, a local folder or a loaded transformers model."
            )
        given = [
            name
            for name in ("revision", "trust_remote_code", "attn_implementation", "device_map", "quantization_config")
            if getattr(options, name)
        ]
        dtype = dtype_name(options.dtype)
        if dtype is not None and dtype != self._dtype_of(model):
            given.append("dtype")
        if options.model_kwargs:
            given.append("model_kwargs")
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be changed on a model that is already loaded: "
                "load it that way, or pass its path."
            )
        self.options = options
        self._model = model
        self._tokenizer = tokenizer
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        folder = Path(self.name)
        if folder.is_dir():
            self.name = str(folder.resolve())

    @staticmethod
    def _dtype_of(model: torch.nn.Module) -> str:
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        return "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")

    @property
    def config(self) -> Mapping[str, Any]:
        model: Any = self._model
        config: dict[str, Any] = model.config.to_dict()
        return config

    def identity(self) -> ModelIdentity:
        self._refuse_foreign_hooks()
        dtype = self._dtype_of(self._model)
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            "weights": f"tensors:{identity.live_weights_digest(self._model)}",
            "class": type(self._model).__qualname__,
            "config": identity.config_digest(self.config),
            "dtype": dtype,
            "attn_implementation": str(getattr(self._model.config, "_attn_implementation", None) or "eager"),
            "hooks": sorted(self.options.allow_hooks),
            "edits": [],
        }
        return ModelIdentity(values, {"model_name": self.name, "revision": None, "dtype": dtype, **provenance()})

    def _refuse_foreign_hooks(self) -> None:
        from torch.nn.modules import module as torch_module

        found = [
            ("every module", hook)
            for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
            for hook in hooks.values()
        ]
        for path, part in self._model.named_modules():
            if part._forward_hooks or part._forward_pre_hooks:
                found += [(path, h) for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
        for path, hook in found:
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            if str(getattr(hook, "__module__", "")).split(".")[0] in ("transformers", "accelerate"):
                continue
            if name not in self.options.allow_hooks:
                raise ForeignHooksError(
                    f"the model has a hook of its own, {name!r} on {path or 'its root'!r}, which may change what is "
                    f"stored: remove it, or pass allow_hooks=[{name!r}] if it does not."
                )

    def tokenizer(self) -> Any:
        if self._tokenizer is None or isinstance(self._tokenizer, str | Path):
            place = str(self._tokenizer or self.name)
            try:
                folder = find_folder(place, self.options, what="tokenizer")[0]
            except ModelLoadError as error:
                raise no_tokenizer(place) from error
            self._tokenizer = load_tokenizer(folder, self.options)
        return self._tokenizer

    def tokenizer_digest(self) -> str:
        return identity.tokenizer_digest(self.tokenizer())

    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def loaded(self) -> bool:
        return True

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())
