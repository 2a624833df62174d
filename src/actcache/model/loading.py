"""From an id, a path or a live object to a model, its tokenizer and its identity."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import ForeignHooksError, ModelLoadError, OptionError, TokenizerError
from actcache.model import identity
from actcache.model.host_memo import host_memo
from actcache.model.options import LoadOptions, check_device_name, dtype_name, resolve_device

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


@dataclass(frozen=True)
class ModelIdentity:
    """What a space of the store is keyed by, and what is noted beside it.

    Attributes:
        values: everything that changes numbers (DESIGN rule 1), as a JSON-able mapping.
        label: how people call the model: ``model_name``, ``revision``, ``dtype``, and provenance.
    """

    values: Mapping[str, Any]
    label: Mapping[str, Any]


class ModelSource(ABC):
    """A model that can be identified and described at once, and loaded only when it is needed."""

    name: str
    options: LoadOptions

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's configuration as a mapping."""

    @abstractmethod
    def identity(self) -> ModelIdentity:
        """The identity as of now: files or weights that changed since the last call give another one."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer; `TokenizerError` when there is none."""

    @abstractmethod
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer, without loading it where it lies on disk."""

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The model in eval mode on its device, loaded on the first call."""

    @property
    @abstractmethod
    def loaded(self) -> bool:
        """Whether the weights are in memory."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights, as stored or in memory."""

    def _text_config(self) -> Mapping[str, Any]:
        config = self.config
        nested = config.get("text_config")
        return {**config, **nested} if isinstance(nested, Mapping) else config

    def _config_int(self, *names: str) -> int | None:
        config = self._text_config()
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)

    @property
    def n_layers(self) -> int:
        """Number of blocks, from the configuration alone."""
        n = self._config_int("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        return n if n is not None else len(self._anatomy().blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        n = self._config_int("hidden_size", "n_embd", "d_model", "n_embed")
        return n if n is not None else int(self._anatomy().d_model)

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids the model knows."""
        return self._config_int("vocab_size")

    @property
    def context_length(self) -> int | None:
        """The longest prompt the model takes, in tokens; None when it is unbounded or not told."""
        return self._config_int("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")

    def _anatomy(self) -> Any:
        from actcache.model.anatomy import describe

        return describe(self.model())


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
    return LiveSource(model, options, tokenizer)


class PathSource(ModelSource):
    """A model named by a local folder or a Hub id."""

    def __init__(self, model: str | Path, options: LoadOptions, tokenizer: Any = None) -> None:
        self.options = options
        self._tokenizer = tokenizer
        self._model: torch.nn.Module | None = None
        self._state: tuple[object, ModelIdentity] | None = None
        self._loaded_as: Mapping[str, Any] | None = None
        self._folder, self.name, self._commit = _find_folder(str(model), options)
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
            **_provenance(),
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
        key = identity.digest_json([dict(self.config), _version("transformers"), _version("torch")])
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
            self._tokenizer = _load_tokenizer(self._tokenizer_folder(), self.options)
        return self._tokenizer

    def _tokenizer_folder(self) -> Path:
        if isinstance(self._tokenizer, str | Path):
            return _find_folder(str(self._tokenizer), self.options, what="tokenizer")[0]
        return self._folder

    @cached_property
    def _tokenizer_digest(self) -> str:
        if self._tokenizer is not None and not isinstance(self._tokenizer, str | Path):
            return identity.tokenizer_digest(self._tokenizer)
        folder = self._tokenizer_folder()
        files = identity.tokenizer_files(folder)
        if not files:
            raise _no_tokenizer(str(folder))
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


class LiveSource(ModelSource):
    """A model that the caller has loaded."""

    def __init__(self, model: Any, options: LoadOptions, tokenizer: Any = None) -> None:
        import torch

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
                f"{', '.join(given)} cannot be changed on a model that is already loaded: load it that way, or pass its path."
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
        config: dict[str, Any] = self._model.config.to_dict()
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
        return ModelIdentity(values, {"model_name": self.name, "revision": None, "dtype": dtype, **_provenance()})

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
                folder = _find_folder(place, self.options, what="tokenizer")[0]
            except ModelLoadError as error:
                raise _no_tokenizer(place) from error
            self._tokenizer = _load_tokenizer(folder, self.options)
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


def _find_folder(name: str, options: LoadOptions, what: str = "model") -> tuple[Path, str, str | None]:
    """The folder that holds `name`'s files, its canonical name, and its commit when it came from the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if options.revision is not None and what == "model":
            raise OptionError(
                f"revision={options.revision!r} has no meaning for the local folder {name!r}: leave it out."
            )
        return folder.resolve(), str(folder.resolve()), None
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelLoadError(
            f"{what} folder {name!r} does not exist: expected an existing folder or a Hub id 'org/name'."
        )
    return _hub_folder(name, options, what)


def _hub_folder(name: str, options: LoadOptions, what: str) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Weights are left to transformers, when the model is loaded: a warm run needs none.
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, revision=options.revision, token=options.token))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"{what} {name!r} is neither a local folder nor to be had from the Hub ({reason}): "
            "check the name, the network and the token."
        ) from error
    return folder, name, folder.name


def _auto_class(config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    known = type(config) in AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return AutoModelForCausalLM if known or remote else AutoModel


def _load_tokenizer(folder: Path, options: LoadOptions) -> Any:
    if not identity.tokenizer_files(folder):
        raise _no_tokenizer(str(folder))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerError(
            f"the tokenizer in {str(folder)!r} cannot be loaded ({error}); pass tokenizer=."
        ) from error


def _no_tokenizer(place: str) -> TokenizerError:
    return TokenizerError(
        f"no tokenizer in {place!r}: pass tokenizer= (an object, a folder or a Hub id), or prompts as token ids."
    )


def _jsonable(value: Any) -> Any:
    if value is None:
        return None
    to_dict = getattr(value, "to_dict", None)
    return json.loads(json.dumps(to_dict() if callable(to_dict) else value, sort_keys=True, default=str))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _provenance() -> dict[str, Any]:
    packages = {name: _version(name) for name in ("actcache", "torch", "transformers")}
    return {"provenance": {f"{name}_version": value for name, value in packages.items()}}
