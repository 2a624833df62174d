"""From an id, a path or a live object to a model, its tokenizer and its identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import ModelChangedError, ModelLoadError
from actcache.model import identity
from actcache.model.folders import find_folder
from actcache.model.host_memo import host_memo
from actcache.model.options import (
    LoadOptions,
    as_json,
    check_device_name,
    check_model_kwargs,
    dtype_name,
    resolve_device,
)
from actcache.model.source import ModelIdentity, ModelSource, package_version, provenance
from actcache.model.tokenizer import TokenizerSource
from actcache.model.touched import refuse_foreign_hooks

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
        self._model: torch.nn.Module | None = None
        self._state: tuple[object, ModelIdentity] | None = None
        self._config: tuple[object, Mapping[str, Any]] | None = None
        self._loaded_as: Mapping[str, Any] | None = None
        self._as_loaded: object = None
        self._extra = check_model_kwargs(options.model_kwargs)
        self._folder, self.name, self._commit = find_folder(str(model), options)
        if not (self._folder / "config.json").is_file():
            raise ModelLoadError(
                f"no config.json in {str(self._folder)!r}: expected a folder made by save_pretrained, or a Hub id."
            )
        by_name = isinstance(tokenizer, str | Path)
        self._tokenizer = TokenizerSource(
            None if by_name else tokenizer,
            lambda: find_folder(str(tokenizer), options, what="tokenizer")[0] if by_name else self._folder,
            options,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        path = self._folder / "config.json"
        try:
            signature = identity.stat_signature([path])
            if self._config is not None and self._config[0] == signature:
                return self._config[1]
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {str(path)!r}: {error}. Save the model again.") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise ModelLoadError(f"{str(path)!r} names no model_type: it is not the config of a transformers model.")
        self._config = signature, config
        return config

    def _identity_files(self) -> list[Path]:
        files = [self._folder / "config.json"]
        if self._commit is None:
            files += self._weight_files()
        if self.options.trust_remote_code:
            files += sorted(self._folder.glob("*.py"))
        return files

    def _weight_files(self) -> list[Path]:
        # Other arguments may choose other files (variant, use_safetensors): then every one counts.
        try:
            weights = identity.weight_files(self._folder, every=bool(self.options.model_kwargs))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(
                f"the index of the weights in {str(self._folder)!r} cannot be read ({error}). Save the model again."
            ) from error
        if not weights:
            raise ModelLoadError(
                f"no weights in {str(self._folder)!r}: expected model.safetensors, its shards or pytorch_model.bin."
            )
        absent = [p.name for p in weights if not p.is_file()]
        if absent:
            raise ModelLoadError(
                f"{', '.join(absent)} of the weights in {str(self._folder)!r} is missing: copy or save the model again."
            )
        return weights

    def identity(self) -> ModelIdentity:
        files = self._identity_files()
        signature = identity.stat_signature(files)
        if self._state is not None and self._state[0] == signature:
            return self._state[1]
        weights = f"commit:{self._commit}" if self._commit else f"files:{identity.files_digest(files[1:])}"
        options = self.options
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            "weights": weights,
            "config": identity.config_digest(self.config),
            "dtype": dtype_name(options.dtype) or "float32",
            "attn_implementation": self._attn_implementation(),
            "quantization": as_json(options.quantization_config),
            "model_kwargs": self._extra or None,
            "edits": [],
        }
        if options.allow_hooks:
            values["hooks"] = sorted(options.allow_hooks)
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

            config = self._auto_config()
            try:
                with torch.device("meta"):
                    model = _auto_class(config).from_config(config, trust_remote_code=self.options.trust_remote_code)
            except (ValueError, KeyError, ImportError) as error:
                raise ModelLoadError(
                    f"transformers cannot make a model of the config of {self.name!r}: {error}"
                ) from error
            known = str(model.config._attn_implementation or "eager")
            host_memo().put("attention", key, known)
        return known

    def _auto_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self._folder, trust_remote_code=self.options.trust_remote_code)
        except (ValueError, KeyError, OSError) as error:
            raise ModelLoadError(f"transformers cannot read the config of {self.name!r}: {error}") from error

    def tokenizer_source(self) -> TokenizerSource:
        return self._tokenizer

    def model(self) -> torch.nn.Module:
        values = self.identity().values
        if self._model is None:
            self._model = self._load(values)
            self._loaded_as = values
            self._as_loaded = _state_of(self._model)
            if self.identity().values != values:
                self._model = None
                raise ModelLoadError(f"the files of {self.name!r} changed while they were loaded; try again.")
        return self._model

    def model_to_run(self) -> torch.nn.Module:
        model = self.model()
        refuse_foreign_hooks(model, self.options.allow_hooks)
        if _state_of(model) != self._as_loaded:
            raise ModelChangedError(
                f"the model loaded from {self.name!r} was changed in memory, so its values are no longer those of its "
                "files: make a UnifiedCache of the changed model itself (model=, tokenizer=)."
            )
        return model

    def _load(self, values: Mapping[str, Any]) -> torch.nn.Module:
        import torch

        options = self.options
        device = resolve_device(options.device)
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
            model = _load_all(_auto_class(self._auto_config()), place, kwargs, self.name)
        except ModelLoadError:
            raise
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ModelLoadError(f"cannot load {self.name!r}: {error}") from error
        if options.device_map is None and options.quantization_config is None:
            model = model.to(device)
        model.eval()
        loaded: torch.nn.Module = model
        return loaded

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def weight_bytes(self) -> int:
        # Those of a Hub model come with the first run.
        return sum(p.stat().st_size for p in identity.weight_files(self._folder) if p.is_file())


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return AutoModelForCausalLM if known or remote else AutoModel


def _load_all(kind: Any, place: str | Path, kwargs: Mapping[str, Any], name: str) -> Any:
    """A model all of whose weights came from its files: transformers makes up what they lack."""
    from transformers import AutoModel

    model, report = kind.from_pretrained(place, output_loading_info=True, **kwargs)
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel and _only_the_head(model, missing):
        return _load_all(AutoModel, place, kwargs, name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelLoadError(
            f"the weights of {name!r} lack {', '.join(missing[:3])}{more}, which would be random: "
            "save the whole model again."
        )
    return model


def _only_the_head(model: Any, missing: list[str]) -> bool:
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    return bool(paths) and all(key.rpartition(".")[0] in paths for key in missing)


def _state_of(model: torch.nn.Module) -> object:
    """What changes when somebody changes weights or attention of a loaded model; moving it to a device does not."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    # Quantised weights are rearranged by their own modules.
    weights = [] if getattr(model, "is_quantized", False) else list(model.parameters())
    return attention, identity.settings_of(model), [(id(p), p.dtype, identity.version_of(p)) for p in weights]
