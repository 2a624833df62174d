"""What is known of a model before it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actcache.errors import SiteUnavailableError
from actcache.model.config_values import WIDTH, context_length, depth_names, first_int, text_values
from actcache.model.decoder_inputs import is_encoder_decoder
from actcache.model.options import LoadOptions

if TYPE_CHECKING:
    import torch

    from actcache.model.anatomy import Anatomy
    from actcache.model.head import Head
    from actcache.model.invariance import BatchPolicy
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
    # What the caller, or whoever loaded it, wrote: of a folder `name` is the full path.
    given: str = ""
    options: LoadOptions
    # What identifies the ready-made edits with which it is run; set before its identity is asked for.
    edits: tuple[Mapping[str, Any], ...] = ()
    # What has to be the same besides, where something else than transformers in this process runs it; set like `edits`.
    engine: Mapping[str, Any] = MappingProxyType({})
    # The settings by which prompts are continued before they are run; set like `edits`.
    generate: Mapping[str, Any] | None = None
    # Whether they change attention probabilities, for which some models run another implementation of attention.
    needs_probabilities: bool = False

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

    @abstractmethod
    def head(self, device: str | None = None) -> Head:
        """The final norm and the head: the model's own where it is loaded, else read from its files by themselves and
        put on `device` (None: where the model would be).

        Raises `SiteUnavailableError` for a model without a head, or one of which no part is read by itself.
        """

    @abstractmethod
    def end_tokens(self) -> list[int]:
        """The token ids that end a text which the model generates, as its files or its generation config say."""

    @abstractmethod
    def predicts_next(self, *, certain: bool = False) -> bool:
        """Whether its logits are predictions of the token that follows, as those of a causal language model are.

        `certain`: a model is loaded where its class would have a head, which its files may lack."""

    @property
    @abstractmethod
    def loaded(self) -> bool:
        """Whether the weights are in memory."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of the weights, as stored or in memory."""

    def batch_policy(self) -> BatchPolicy:
        """How prompts may share a forward pass; of a model in memory the modules count too."""
        from actcache.model.invariance import batch_policy

        model: Any = self.model() if self.loaded else None
        return batch_policy(
            # A file may leave out what is its class's default.
            self.config if model is None else model.config.to_dict(),
            model=model,
            quantization_config=self.options.quantization_config,
        )

    @property
    def stacks(self) -> tuple[str | None, ...]:
        """The prefixes of site names: ``("encoder", "decoder")``, or ``(None,)`` where there is one stack of blocks."""
        return ("encoder", "decoder") if is_encoder_decoder(self.config) else (None,)

    def depth(self, stack: str | None, site: str = "resid_post") -> int:
        """Number of blocks of a stack, from the configuration alone.

        Raises `SiteUnavailableError` for a stack this model does not have, or when it has two and none is named;
        `site` is the name that the message shows.
        """
        self.require_stack(stack, site)
        config = self._text_config(stack)
        n = first_int(config, *depth_names(config, stack))
        return n if n is not None else int(self.anatomy().depth(stack))

    def require_stack(self, stack: str | None, site: str) -> None:
        """Raise `SiteUnavailableError` when names of this model's sites do not begin with `stack`."""
        if stack in self.stacks:
            return
        if stack is None:
            choices = " or ".join(repr(f"{name}.{site}") for name in self.stacks)
            raise SiteUnavailableError(f"site {site!r}: {self.name!r} has two stacks of blocks, write {choices}")
        raise SiteUnavailableError(
            f"site {f'{stack}.{site}'!r}: {self.name!r} has one stack of blocks, write {site!r} without {stack!r}"
        )

    @property
    def n_layers(self) -> int:
        """Number of blocks, those of both stacks of an encoder-decoder."""
        return sum(self.depth(stack) for stack in self.stacks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        n = first_int(self._text_config(), *WIDTH)
        return n if n is not None else int(self.anatomy().d_model)

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The compute dtype, such as ``"float32"``."""

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids the model knows."""
        return first_int(self._text_config(), "vocab_size")

    @property
    def context_length(self) -> int | None:
        """The longest prompt the model takes, in tokens; None when it is unbounded or not told."""
        return context_length(self._text_config())

    def _text_config(self, stack: str | None = None) -> Mapping[str, Any]:
        return text_values(self.config, stack or self.stacks[0])

    def anatomy(self) -> Anatomy:
        """The parts of the model, which is loaded where they are not known without."""
        from actcache.model.anatomy import describe

        return describe(self.model_to_run())


@cache
def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance() -> dict[str, Any]:
    packages = {name: package_version(name) for name in ("actcache", "torch", "transformers")}
    return {"provenance": {f"{name}_version": value for name, value in packages.items()}}
