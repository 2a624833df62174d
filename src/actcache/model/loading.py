"""From an id, a path or a live object to a model, its tokenizer and its identity."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.errors import ModelChangedError, ModelLoadError, SiteUnavailableError, did_you_mean
from actcache.model import adapters, identity, implementation
from actcache.model.classes import auto_class, is_causal, load_whole
from actcache.model.config_values import ids_of
from actcache.model.decoder_inputs import decoder_values
from actcache.model.files import ModelFiles
from actcache.model.folders import find_folder
from actcache.model.host_memo import host_memo
from actcache.model.options import (
    LoadOptions,
    check_device_name,
    check_model_kwargs,
    dtype_name,
    resolve_device,
)
from actcache.model.quantized import canonical
from actcache.model.releases import release_values
from actcache.model.source import ModelIdentity, ModelSource, package_version, provenance
from actcache.model.tokenizer import TokenizerSource
from actcache.model.touched import refuse_foreign_hooks

if TYPE_CHECKING:
    import torch

    from actcache.model.head import Head


def open_source(model: Any, options: LoadOptions, tokenizer: Any = None, *, elsewhere: bool = False) -> ModelSource:
    """A source for `model`: a Hub id, a local folder, or a loaded model. `elsewhere`: its weights are not loaded here.

    Raises:
        ModelLoadError: a folder that is not there, or that holds no ``config.json`` or no weights.
        OptionError: a loading option given with a model that is already loaded, or a bad value.
    """
    check_device_name(options.device)
    dtype_name(options.dtype)
    if elsewhere:
        from actcache.model.remote import RemoteSource

        return RemoteSource(model, options, tokenizer)
    if isinstance(model, str | Path):
        return PathSource(model, options, tokenizer)
    from actcache.model.live import LiveSource

    return LiveSource(model, options, tokenizer)


class PathSource(ModelSource):
    """A model named by a local folder or a Hub id: the model itself, or an adapter for one."""

    def __init__(self, model: str | Path, options: LoadOptions, tokenizer: Any = None) -> None:
        self.options = options
        self._model: torch.nn.Module | None = None
        self._state: tuple[object, ModelIdentity] | None = None
        self._loaded_as: Mapping[str, Any] | None = None
        self._as_loaded: object = None
        self._loading = threading.RLock()
        self._head: tuple[Mapping[str, Any], Head] | None = None
        self._extra = check_model_kwargs(options.model_kwargs)
        self._quantization = canonical(options.quantization_config)
        _check_attention(options.attn_implementation)
        self._files = ModelFiles(str(model), options, every=bool(self._extra))
        self.name, self.given = self._files.given.name, str(model)
        by_name = isinstance(tokenizer, str | Path)
        self._tokenizer = TokenizerSource(
            None if by_name else tokenizer,
            lambda: (
                find_folder(str(tokenizer), options, what="tokenizer").folder
                if by_name
                else self._files.tokenizer_folder()
            ),
            # Nor is code of a tokenizer run that only an adapter leads to.
            options if by_name else replace(options, trust_remote_code=self._files.trusted),
        )

    @property
    def config(self) -> Mapping[str, Any]:
        # Values of the config among the arguments of loading take the place of the file's.
        return {**self._files.config, **self._extra} if self._extra else self._files.config

    @property
    def dtype(self) -> str:
        return dtype_name(self.options.dtype) or "float32"

    def identity(self) -> ModelIdentity:
        signature = identity.stat_signature(self._files.all())
        if self._state is not None and self._state[0] == signature:
            return self._state[1]
        options = self.options
        digests = self._files.digests()
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            **digests,
            "dtype": self.dtype,
            "attn_implementation": implementation.run_as(
                self._attn_implementation(digests.get("code")), probabilities=self.needs_probabilities
            ),
            "quantization": self._quantization,
            "model_kwargs": self._extra or None,
            "edits": list(self.edits),
        }
        if self.engine:
            values["engine"] = dict(self.engine)
        if self.generate is not None:
            values["generate"] = dict(self.generate)
        if options.allow_hooks:
            values["hooks"] = sorted(options.allow_hooks)
        values |= decoder_values(self.config) | release_values(self.config)
        label = {
            "model_name": self.name,
            "revision": self._files.given.commit or options.revision,
            "dtype": values["dtype"],
            **provenance(),
        }
        self._state = (signature, ModelIdentity(values, label))
        if self._model is not None and self._loaded_as != values:
            self._model = None
        return self._state[1]

    def _attn_implementation(self, code: str | None) -> str:
        if self.options.attn_implementation is not None:
            return self.options.attn_implementation
        # What transformers picks depends on its version and on the class; asking it builds the model on
        # the meta device, which a warm run should not pay for.
        key = identity.digest_json([dict(self.config), code, package_version("transformers"), package_version("torch")])
        known = host_memo().get("attention", key)
        if known is None:
            try:
                known = str(self._without_weights().config._attn_implementation or "eager")
            except (ValueError, KeyError, ImportError) as error:
                raise ModelLoadError(
                    f"transformers cannot make a model of the config of {self.name!r}: {error}"
                ) from error
            host_memo().put("attention", key, known)
        return known

    def _without_weights(self, **arguments: Any) -> Any:
        """The model on the meta device; raises what transformers raises for arguments that cannot be."""
        import torch

        config = self._auto_config()
        kind = auto_class(config)
        arguments |= self._code_arguments()
        if type(config) in kind._model_mapping:
            # Also of code that was run before, whose class would be given what is meant for finding it.
            arguments.pop("code_revision", None)
        with torch.device("meta"):
            return kind.from_config(config, **arguments)

    def _code_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"trust_remote_code": self._files.trusted}
        elsewhere = self._files.code_revision()
        if elsewhere is not None:
            arguments["code_revision"] = elsewhere.name
        return arguments

    def _auto_config(self) -> Any:
        from transformers import AutoConfig

        base = self._files.base()
        try:
            return AutoConfig.from_pretrained(base.folder, **self._code_arguments())
        except (ValueError, KeyError, OSError, ImportError) as error:
            if "trust_remote_code" in str(error) and not self._files.trusted:
                raise self._untrusted(base.name) from error
            raise ModelLoadError(f"transformers cannot read the config of {self.name!r}: {error}") from error

    def _untrusted(self, base: str) -> ModelLoadError:
        if self._files.adapter is not None:
            return ModelLoadError(
                f"{base!r}, the base model that the adapter {self.name!r} names, needs code of its own, which is not "
                "run on an adapter's word: load the base model yourself, the adapter with peft, and pass the model."
            )
        return ModelLoadError(
            f"{self.name!r} needs code of its own, which is not run unasked: read the code, and pass "
            "trust_remote_code=True (--trust-remote-code on the command line) if you trust it."
        )

    def tokenizer_source(self) -> TokenizerSource:
        return self._tokenizer

    def model(self) -> torch.nn.Module:
        with self._loading:
            values = self.identity().values
            if self._model is None:
                model = self._load(values)
                self._loaded_as, self._as_loaded, self._model = values, _state_of(model), model
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
        from safetensors import SafetensorError

        options = self.options
        device = resolve_device(options.device)
        quantized = options.quantization_config is not None or "quantization_config" in self.config
        kwargs: dict[str, Any] = {
            **options.model_kwargs,
            "dtype": getattr(torch, values["dtype"]),
            "attn_implementation": values["attn_implementation"],
            **self._code_arguments(),
        }
        if options.device_map is not None:
            kwargs["device_map"] = copy.deepcopy(options.device_map)
        elif quantized and device != "cpu":
            kwargs["device_map"] = {"": device}
        if options.quantization_config is not None:
            # Quantisers write into it what they left out.
            kwargs["quantization_config"] = copy.deepcopy(options.quantization_config)
        base = self._files.base()
        place: str | Path = base.folder
        if base.commit is not None:
            place = base.name
            kwargs |= {"revision": base.commit, "token": options.token}
        try:
            if options.attn_implementation is not None:
                # Before gigabytes are fetched and read for nothing.
                self._without_weights(attn_implementation=options.attn_implementation)
            model = load_whole(auto_class(self._auto_config()), place, kwargs, self.name)
        except ModelLoadError:
            raise
        except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
            raise self._explained(error, values["attn_implementation"]) from error
        if self._files.adapter is not None and any(p.is_meta for p in model.parameters()):
            raise ModelLoadError(
                f"the adapter of {self.name!r} cannot be put on a model whose weights are offloaded: merge it first "
                "(peft: merge_and_unload, save_pretrained), or leave out device_map."
            )
        if self._files.adapter is not None:
            model = adapters.attach(model, self._files.adapter_folder())
        if "device_map" not in kwargs and not quantized:
            model = model.to(device)
        model.eval()
        loaded: torch.nn.Module = model
        return loaded

    def _explained(self, error: Exception, attention: str) -> ModelLoadError:
        text = str(error)
        if "trust_remote_code" in text and not self._files.trusted:
            return self._untrusted(self._files.base().name)
        remedy = ""
        if any(
            word in text for word in ("attn_implementation", "ttention implementation", "FlashAttention", attention)
        ):
            remedy = f" Pass another attn_implementation than {attention!r} ('eager' works for every model), or none."
        elif "offload_folder" in text:
            remedy = " Pass model_kwargs={'offload_folder': <a folder with room for the weights>}."
        return ModelLoadError(f"cannot load {self.name!r}: {text.rstrip('. ')}.{remedy}")

    def end_tokens(self) -> list[int]:
        path = self._files.base().folder / "generation_config.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return ids_of(told.get("eos_token_id")) or ids_of(self.config.get("eos_token_id"))

    def predicts_next(self, *, certain: bool = False) -> bool:
        if certain:
            self.model()
        key = identity.digest_json([dict(self.identity().values), package_version("transformers")])
        known = host_memo().get("causal", key)
        # Of a model whose files lack the head only the loaded one tells.
        if known is None or (known == "class" and self._model is not None):
            causal = is_causal(self._without_weights() if self._model is None else self._model)
            known = ("class" if self._model is None else "model") if causal else "no"
            host_memo().put("causal", key, known)
        return known != "no"

    def head(self, device: str | None = None) -> Head:
        if self._model is not None:
            from actcache.model.head import find_head

            return find_head(self.model_to_run())
        place = resolve_device(device or self.options.device)
        key = {**self.identity().values, "device": place}
        if self._head is None or self._head[0] != key:
            self._head = key, self._read_head(self.dtype, place)
        return self._head[1]

    def _read_head(self, dtype: str, device: str) -> Head:
        import torch

        from actcache.model.head_files import load_head, mapped, outside_blocks, plan_head

        why = None
        if self.options.quantization_config is not None or "quantization_config" in self.config:
            why = "its weights are quantised"
        elif self.options.model_kwargs:
            why = f"it is loaded with model_kwargs={dict(self.options.model_kwargs)!r}"
        elif self._files.adapter is not None:
            held = adapters.weight_names(self._files.adapter_folder())
            why = f"its adapter changes {outside[0]!r}" if (outside := outside_blocks(held)) else None
        if why is not None:
            raise SiteUnavailableError(
                f"the head of {self.name!r} is not read by itself, since {why}: load the model first (the attribute "
                "`model` of a UnifiedCache does), its head is then taken from it."
            )
        compute = getattr(torch, dtype)
        empty = self._without_weights(dtype=compute)
        kind, config = type(empty), empty.config
        plan = plan_head(empty)
        tensors = {name: tensor for path in self._files.files_outside_blocks() for name, tensor in mapped(path).items()}
        return load_head(kind, config, plan, tensors, dtype=compute, device=device, name=self.name)

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    def weight_bytes(self) -> int:
        return self._files.weight_bytes


# Known without asking transformers, which takes a second to import.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _check_attention(name: object) -> None:
    """Raise `ModelLoadError` for an attention implementation nobody knows. Whether it runs here is seen on loading."""
    # A repository of kernels, or one name for each part of the model.
    if name is None or not isinstance(name, str) or name in _ATTENTION or "/" in name:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = sorted({*_ATTENTION, *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if name not in known:
        names = ", ".join(map(repr, known))
        raise ModelLoadError(
            f"unknown attn_implementation {name!r}: expected one of {names}.{did_you_mean(name, known)}"
        )


def _state_of(model: torch.nn.Module) -> object:
    """What changes when somebody changes weights, configuration or attention of a loaded model; moving it to a device
    does not."""
    from actcache.model.in_memory import attention_of, settings_of, weights_state

    # Some values are looked up there in each pass.
    config: Any = getattr(model, "config", None)
    values = identity.config_digest(config.to_dict()) if hasattr(config, "to_dict") else None
    return attention_of(model), values, settings_of(model), weights_state(model)
