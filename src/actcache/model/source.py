"""What is known of a model before it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from actcache.model.options import LoadOptions

if TYPE_CHECKING:
    import torch

    from actcache.model.tokenizer import TokenizerSource


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
    def tokenizer_source(self) -> TokenizerSource:
        """The tokenizer, perhaps not loaded yet."""

    def tokenizer(self) -> Any:
        """The tokenizer; `TokenizerError` when there is none."""
        return self.tokenizer_source().get()

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """The model in eval mode on its device, loaded on the first call."""

    @abstractmethod
    def model_to_run(self) -> torch.nn.Module:
        """`model`, when it still is what `identity` says.

        Raises `ForeignHooksError` for hooks of somebody else, `ModelChangedError` for other changes in memory.
        """

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


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    packages = {name: package_version(name) for name in ("actcache", "torch", "transformers")}
    return {"provenance": {f"{name}_version": value for name, value in packages.items()}}
