"""From an id, a path or a live object to a model, its tokenizer and its identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import ModelLoadError
from actcache.model import identity
from actcache.model.folders import find_folder, load_tokenizer, no_tokenizer
from actcache.model.host_memo import host_memo
from actcache.model.options import LoadOptions, check_device_name, dtype_name, resolve_device
from actcache.model.source import ModelIdentity, ModelSource, package_version, provenance

if TYPE_CHECKING:
    import torch


def open_source(model: Any, options: LoadOptions, tokenizer: Any = None) -> ModelSource:
    """A source for `model`: a Hub id, a local folder, or a loaded model.

    Raises:
        ModelLoadError: a folder that is not there, or that holds no ``config.json`` or no weights.
        OptionError: a loading option given with a model that is already loaded, or a bad value.
    """
    check_device_name(options.device)
    dtype_name(options.dtype)
    if isinstance(model, str | Path):
        return PathSource(model, options, tokenizer)
    from actcache.model.live import LiveSource

    return LiveSource(model, options, tokenizer)


class PathSource(ModelSource):
    """A model named by a local folder or a Hub id."""

    def __init__(self, model: str | Path, options: LoadOptions, tokenizer: Any = None) -> None:
        self.options = options
        self._tokenizer = tokenizer
        self._model: torch.nn.Module | None = None
        self._state: tuple[object, ModelIdentity] | None = None
        self._loaded_as: Mapping[str, Any] | None = None
        self._folder, self.name, self._commit = find_folder(str(model), options)
        if not (self._folder / "config.json").is_file():
            raise ModelLoadError(
                f"no config.json in {str(self._folder)!r}: expected a folder made by save_pretrained, or a Hub id."
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        path = self._folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {str(path)!r}: {error}. Save the model again.") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise ModelLoadError(f"{str(path)!r} names no model_type: it is not the config of a transformers model.")
        return config

    def _identity_files(self) -> list[Path]:
        files = [self._folder / "config.json"]
        if self._commit is None:
            weights = identity.weight_files(self._folder)
            if not weights:
                raise ModelLoadError(
                    f"no weights in {str(self._folder)!r}: expected model.safetensors, its shards or pytorch_model.bin."
                )
            files += weights
        if self.options.trust_remote_code:
            files += sorted(self._folder.glob("*.py"))
        return files

    def identity(self) -> ModelIdentity:
        files = self._identity_files()
        signature = identity.stat_signature(files)
        if self._state is not None and self._state[0] == signature:
            return self._state[1]
        if self._state is not None:
            self.__dict__.pop("config", None)
        weights = f"commit:{self._commit}" if self._commit else f"files:{identity.files_digest(files[1:])}"
        options = self.options
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            "weights": weights,
            "config": identity.config_digest(self.config),
            "dtype": dtype_name(options.dtype) or "float32",
            "attn_implementation": self._attn_implementation(),
            "quantization": _jsonable(options.quantization_config),
            "model_kwargs": _jsonable(dict(options.model_kwargs)) or None,
            "edits": [],
        }
        if options.trust_remote_code:
            values["code"] = identity.files_digest(p for p in files if p.suffix == ".py")
        label = {
            "model_name": self.name,
            "revision": self._commit or options.revision,
            "dtype": values["dtype"],
            **provenance(),
        }
        self._state = (signature, ModelIdentity(values, label))
        if self._model is not None and self._loaded_as != values:
            self._model = None
        return self._state[1]

    def _attn_implementation(self) -> str:
        if self.options.attn_implementation is not None:
            return self.options.attn_implementation
        # What transformers picks depends on its version and on the class; asking it builds the model on
        # the meta device, which a warm run should not pay for.
        key = identity.digest_json([dict(self.config), package_version("transformers"), package_version("torch")])
        known = host_memo().get("attention", key)
        if known is None:
            import torch

            with torch.device("meta"):
                model = _auto_class(self._auto_config()).from_config(
                    self._auto_config(), trust_remote_code=self.options.trust_remote_code
                )
            known = str(model.config._attn_implementation or "eager")
            host_memo().put("attention", key, known)
        return known

    def _auto_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self._folder, trust_remote_code=self.options.trust_remote_code)
        except (ValueError, KeyError, OSError) as error:
            raise ModelLoadError(f"transformers cannot read the config of {self.name!r}: {error}") from error

    def tokenizer(self) -> Any:
        if self._tokenizer is None or isinstance(self._tokenizer, str | Path):
            self._tokenizer = load_tokenizer(self._tokenizer_folder(), self.options)
        return self._tokenizer

    def _tokenizer_folder(self) -> Path:
        if isinstance(self._tokenizer, str | Path):
            return find_folder(str(self._tokenizer), self.options, what="tokenizer")[0]
        return self._folder

    @cached_property
    def _tokenizer_digest(self) -> str:
        if self._tokenizer is not None and not isinstance(self._tokenizer, str | Path):
            return identity.tokenizer_digest(self._tokenizer)
        folder = self._tokenizer_folder()
        files = identity.tokenizer_files(folder)
        if not files:
            raise no_tokenizer(str(folder))
        return identity.files_digest(files)

    def tokenizer_digest(self) -> str:
        return self._tokenizer_digest

    def model(self) -> torch.nn.Module:
        values = self.identity().values
        if self._model is None:
            self._model = self._load(values)
            self._loaded_as = values
            if self.identity().values != values:
                self._model = None
                raise ModelLoadError(f"the files of {self.name!r} changed while they were loaded; try again.")
        return self._model

    def _load(self, values: Mapping[str, Any]) -> torch.nn.Module:
        import torch

        options = self.options
        kwargs: dict[str, Any] = {
            **options.model_kwargs,
            "dtype": getattr(torch, values["dtype"]),
            "attn_implementation": values["attn_implementation"],
            "trust_remote_code": options.trust_remote_code,
        }
        if options.device_map is not None:
            kwargs["device_map"] = options.device_map
        if options.quantization_config is not None:
            kwargs["quantization_config"] = options.quantization_config
        place: str | Path = self._folder
        if self._commit is not None:
            place = self.name
            kwargs |= {"revision": self._commit, "token": options.token}
        try:
            model = _auto_class(self._auto_config()).from_pretrained(place, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ModelLoadError(f"cannot load {self.name!r}: {error}") from error
        if options.device_map is None and options.quantization_config is None:
            model = model.to(resolve_device(options.device))
        model.eval()
        loaded: torch.nn.Module = model
        return loaded

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def weight_bytes(self) -> int:
        return sum(p.stat().st_size for p in identity.weight_files(self._folder))


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return AutoModelForCausalLM if known or remote else AutoModel


def _jsonable(value: Any) -> Any:
    if value is None:
        return None
    to_dict = getattr(value, "to_dict", None)
    return json.loads(json.dumps(to_dict() if callable(to_dict) else value, sort_keys=True, default=str))
