"""A model that runs elsewhere: its configuration and tokenizer are here, its weights are not, and are never loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from actcache.errors import OptionError
from actcache.model import identity, implementation
from actcache.model.classes import auto_class, is_causal
from actcache.model.config_values import first_int
from actcache.model.loading import PathSource
from actcache.model.options import DTYPES, LoadOptions
from actcache.model.sketch import sketch
from actcache.model.source import ModelIdentity, provenance

if TYPE_CHECKING:
    import torch

    from actcache.model.anatomy import Anatomy
    from actcache.model.head import Head


class RemoteSource(PathSource):
    """A Hub id (or a folder that the server has under the same path), as far as it is known without weights.

    Raises `OptionError` for what only who runs the model decides, and as `PathSource` does.
    """

    def __init__(self, model: Any, options: LoadOptions, tokenizer: Any = None) -> None:
        if not isinstance(model, str | Path):
            raise OptionError(
                f"model is a {type(model).__name__}, and remote= needs a name: the server has its own weights."
            )
        given = [name for name in ("dtype", "device_map", "quantization_config") if getattr(options, name) is not None]
        given += ["model_kwargs"] if options.model_kwargs else []
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be chosen where the model runs elsewhere (remote=): whoever serves it has "
                "loaded it already. Leave it out."
            )
        super().__init__(model, options, tokenizer)
        if self._files.adapter is not None:
            raise OptionError(f"{self.name!r} is an adapter, which no server is given: run it here (remote=False).")
        self._made: tuple[torch.nn.Module, torch.nn.Module] | None = None

    @property
    def dtype(self) -> str:
        """The dtype of the checkpoint, in which servers usually run it. What comes back has the dtype it has."""
        told = str(self.config.get("dtype") or self.config.get("torch_dtype") or "").removeprefix("torch.")
        return told if told in DTYPES else "float32"

    def identity(self) -> ModelIdentity:
        # All that is known of the weights there is the name they go by: never those of a local run's.
        values: dict[str, Any] = {
            "identity": identity.IDENTITY_VERSION,
            "engine": dict(self.engine),
            "model": self.name,
            "revision": self.options.revision,
            "commit": self.commit,
            "config": identity.config_digest(self.config),
            "attn_implementation": implementation.run_as(self.attn_implementation, probabilities=False),
            "edits": list(self.edits),
        }
        label = {
            "model_name": self.name,
            "revision": self._files.given.commit or self.options.revision,
            "dtype": self.dtype,
            **provenance(),
        }
        return ModelIdentity(values, label)

    @property
    def attn_implementation(self) -> str:
        """The implementation of attention that the server is asked to run it with: the one that would run here."""
        return self._attn_implementation(None)

    @property
    def revision(self) -> str | None:
        return self.options.revision

    @property
    def commit(self) -> str | None:
        """The commit that name and revision stand for here; None for a folder."""
        return self._files.given.commit

    @property
    def skeleton(self) -> torch.nn.Module:
        """The model without weights: modules on the meta device."""
        return self._both()[0]

    def anatomy(self) -> Anatomy:
        from actcache.model.anatomy import describe

        return describe(self._both()[1])

    def _both(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        if self._made is None:
            chosen = {"attn_implementation": self.attn_implementation}
            empty = self._without_weights(**chosen)
            config = self._auto_config()
            small = sketch(auto_class(config), config, empty, **chosen, **self._code_arguments())
            self._made = empty, small
        return self._made

    @property
    def vocab_size(self) -> int | None:
        return first_int(self._text_config(), "vocab_size")

    def predicts_next(self, *, certain: bool = False) -> bool:
        return is_causal(self.skeleton)

    def head(self, device: str | None = None) -> Head:
        # Of the files, which are those of the name here: norms and heads are computed in float32.
        return self._read_head("float32", device or "cpu")

    def model(self) -> NoReturn:
        raise OptionError(
            f"{self.name!r} runs elsewhere (remote=): its weights are not here, and are not loaded. For this it has to "
            "run here (remote=False)."
        )

    def model_to_run(self) -> NoReturn:
        self.model()

    @property
    def loaded(self) -> bool:
        return False
