"""How images, video and sound come into a language model: the tokens that stand for them, as its config tells."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actcache.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

MEDIA = ("image", "video", "audio")
# Text is whatever stands for none of these.
KINDS = (*MEDIA, "text")


def media_tokens(model: nn.Module) -> dict[str, frozenset[int]]:
    """The ids of the tokens at whose places the model puts images, video or sound, by kind; no others.

    A token that begins or ends an image, or separates its rows, is text: it has an embedding of its own.
    """
    from actcache.model.structure import unwrapped

    config = getattr(unwrapped(model), "config", None)
    found: dict[str, frozenset[int]] = {}
    for part in _parts(config):
        for kind in MEDIA:
            ids = [getattr(part, f"{kind}_token_{what}", None) for what in ("id", "index")]
            known = frozenset(one for one in ids if isinstance(one, int) and not isinstance(one, bool))
            if known:
                found.setdefault(kind, known)
    return found


def merges_media(model: nn.Module) -> bool:
    """Whether the language model is a part of `model`, which may hand it embeddings in place of token ids."""
    from actcache.model.structure import text_config, unwrapped

    core = unwrapped(model)
    return bool(media_tokens(model)) or text_config(core) is not getattr(core, "config", None)


def adds_between_blocks(backbone: nn.Module) -> bool:
    """Whether features of images may be added to the stream between two blocks, where they belong to neither."""
    return any(name.startswith("deepstack") for name in inspect.signature(backbone.forward).parameters)


def tokens_of_kind(model: nn.Module, kind: str) -> tuple[frozenset[int], bool]:
    """Token ids that tell which tokens are of a kind, and whether they are those ids (else all others: text).

    Raises `OptionError` for a kind that the model has no tokens for.
    """
    found = media_tokens(model)
    if kind == "text":
        return frozenset().union(*found.values()), False
    if kind not in found:
        has = f"only tokens for {' and '.join(found)}" if found else "no tokens for images, video or sound"
        raise OptionError(
            f"tokens_of({kind!r}) has no meaning on {type(model).__name__}: its config names {has} (as "
            f"{kind}_token_id or {kind}_token_index). Choose positions by number, or set that value if its inputs have "
            "such tokens."
        )
    return found[kind], True


def _parts(config: Any) -> Iterator[Any]:
    """The config, then those of its parts: some name a token only where they describe what reads it."""
    if config is not None:
        yield config
        for name in ("vision_config", "audio_config"):
            part = getattr(config, name, None)
            if part is not None:
                yield part
