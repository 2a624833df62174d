"""A model that the caller has loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ModelLoadError, OptionError
from actcache.model import identity, implementation, in_memory
from actcache.model.adapters import of_model, unwrapped
from actcache.model.anatomy import original
from actcache.model.classes import is_causal
from actcache.model.config_values import ids_of
from actcache.model.decoder_inputs import decoder_values
from actcache.model.folders import find_folder, no_tokenizer
from actcache.model.head import Head, find_head
from actcache.model.offload import stored_weights
from actcache.model.options import LoadOptions, dtype_name
from actcache.model.releases import release_values
from actcache.model.source import ModelIdentity, ModelSource, provenance
from actcache.model.tokenizer import TokenizerSource
from actcache.model.touched import refuse_foreign_hooks


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
        # What torch.compile and peft wrap is what runs.
        compiled = model._modules.get("_orig_mod")
        self._wrapper = model if compiled is None else compiled
        self._model = original(unwrapped(self._wrapper))
        elsewhere = stored_weights(self._model.named_modules())
        if any(p.is_meta and name not in elsewhere for name, p in self._model.named_parameters()):
            raise OptionError(
                "the model has weights that are not in memory (on the meta device), nor where accelerate would find "
                "them, so they cannot be identified: load it whole, or pass its path."
            )
        self.options = options
        self.given = str(getattr(self._model.config, "_name_or_path", "") or "")
        self.name = self.given or type(self._model).__name__
        folder = Path(self.name)
        if folder.is_dir():
            self.name = str(folder.resolve())
        by_name = isinstance(tokenizer, str | Path)
        self._tokenizer = TokenizerSource(
            None if by_name else tokenizer,
            lambda: self._tokenizer_folder(str(tokenizer) if by_name else self.name),
            options,
        )

    @staticmethod
    def _dtype_of(model: torch.nn.Module) -> str:
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        return "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")

    @property
    def dtype(self) -> str:
        return self._dtype_of(self._model)

    @property
    def config(self) -> Mapping[str, Any]:
        model: Any = self._model
        config: dict[str, Any] = model.config.to_dict()
        return config

    def identity(self) -> ModelIdentity:
        refuse_foreign_hooks(self._wrapper, self.options.allow_hooks)
        dtype = self.dtype
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            "weights": f"tensors:{in_memory.live_weights_digest(self._model)}",
            "class": type(self._model).__qualname__,
            "config": identity.config_digest(self.config),
            "dtype": dtype,
            "attn_implementation": implementation.run_as(
                in_memory.attention_of(self._model), probabilities=self.needs_probabilities
            ),
            "settings": in_memory.settings_of(self._model),
            "hooks": sorted(self.options.allow_hooks),
            "edits": list(self.edits),
        }
        if self.engine:
            values["engine"] = dict(self.engine)
        if self.generate is not None:
            values["generate"] = dict(self.generate)
        adapters = of_model(self._model)
        if adapters is not None:
            values["adapters"] = adapters
        values |= decoder_values(self.config) | release_values(self.config)
        return ModelIdentity(values, {"model_name": self.name, "revision": None, "dtype": dtype, **provenance()})

    def tokenizer_source(self) -> TokenizerSource:
        return self._tokenizer

    def _tokenizer_folder(self, place: str) -> Path:
        try:
            return find_folder(place, self.options, what="tokenizer")[0]
        except ModelLoadError as error:
            raise no_tokenizer(place) from error

    def model(self) -> torch.nn.Module:
        return self._model

    def model_to_run(self) -> torch.nn.Module:
        refuse_foreign_hooks(self._wrapper, self.options.allow_hooks)
        return self._model

    def end_tokens(self) -> list[int]:
        told = getattr(self._model, "generation_config", None)
        return ids_of(getattr(told, "eos_token_id", None)) or ids_of(self.config.get("eos_token_id"))

    def predicts_next(self, *, certain: bool = False) -> bool:
        return is_causal(self._model)

    def head(self, device: str | None = None) -> Head:
        return find_head(self.model_to_run())

    @property
    def loaded(self) -> bool:
        return True

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())
