"""What a multimodal model is given before it hands embeddings on to its language model: token ids and their mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from actcache.model.anatomy import Anatomy
from actcache.model.media import merges_media


class Shown:
    """The ids and the mask of the call that is running, of the outermost of the modules that are listened to."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None

    def listeners(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Any]]:
        return [(module, _Listener(self, module)) for module in modules]

    def begin(self, given: dict[str, Any]) -> bool:
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if self._ids is not None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return False
        self._ids = ids
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return True

    def end(self) -> None:
        self._ids = self._mask = None

    def of(self, batch: int, length: int, past: int) -> tuple[Tensor | None, Tensor | None]:
        """Ids ``[B, S]`` and mask ``[B, past + S]`` of a pass of these sizes, None for what does not fit it."""
        ids, mask = self._ids, self._mask
        if ids is None or ids.shape != (batch, length):
            return None, None
        fits = mask is not None and mask.shape == (batch, past + length)
        return ids, mask if fits else None


def shown_by(model: nn.Module, anatomy: Anatomy | None) -> Shown | None:
    """Something to look at where the language model may be handed embeddings; None where it is given ids itself."""
    merges = merges_media(model) if anatomy is None else anatomy.merges_media
    return Shown() if merges else None


class _Listener:
    __slots__ = ("_names", "_shown")

    def __init__(self, shown: Shown, module: nn.Module) -> None:
        from actcache.capture.passes import argument_names

        self._shown = shown
        self._names = argument_names(type(module).forward)

    def begin(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        args, kwargs = inputs
        return self._shown.begin({**dict(zip(self._names, args, strict=False)), **kwargs})

    def end(self, token: bool, output: Any) -> None:
        if token:
            self._shown.end()

    def fail(self, token: bool) -> None:
        if token:
            self._shown.end()
