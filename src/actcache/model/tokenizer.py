"""The tokenizer of a model: an object, or files that are loaded only when they are needed."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actcache.model import identity
from actcache.model.folders import load_tokenizer, no_tokenizer
from actcache.model.options import LoadOptions

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates"
# What a chat template calls for the time of day.
_CLOCK = b"strftime_now"


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a local folder that decide how text becomes token ids; empty when there are none."""
    present = set(os.listdir(folder))
    named = [folder / name for name in present if name in _FILES or name.endswith(".model")]
    if _TEMPLATES in present:
        named += (folder / _TEMPLATES).glob("*")
    return sorted(p for p in named if p.is_file())


class TokenizerSource:
    """A tokenizer that can be identified before it is loaded, and whose identity is that of the moment.

    Args:
        given: a tokenizer object, or None for the one in `folder()`.
        folder: where its files are; called when they are first needed.
    """

    def __init__(self, given: Any, folder: Callable[[], Path], options: LoadOptions) -> None:
        self._given = given
        self._find = folder
        self._folder: Path | None = None
        self._options = options
        self._loaded: Any = None
        self._of_files: tuple[object, str] | None = None
        # The files it was loaded from, and what it was then.
        self._origin: tuple[object, str] | None = None

    def get(self) -> Any:
        """The tokenizer; loaded again when its files changed. `TokenizerError` when there is none."""
        if self._given is not None:
            return self._given
        signature = identity.stat_signature(self._files())
        if self._origin is None or self._origin[0] != signature:
            assert self._folder is not None
            self._loaded = load_tokenizer(self._folder, self._options)
            self._origin = signature, tokenizer_digest(self._loaded)
        return self._loaded

    def digest(self) -> str:
        """What decides the token ids, as of now; of files without loading them."""
        if self._given is not None:
            return tokenizer_digest(self._given)
        files = self._files()
        signature = identity.stat_signature(files)
        if self._of_files is not None and self._of_files[0] == signature:
            of_files = self._of_files[1]
        else:
            of_files = identity.files_digest(files)
            self._of_files = (signature, of_files) if identity.settled(signature) else None
        if self._origin is None or self._origin[0] != signature:
            return of_files
        # Whoever got the loaded one may have changed it.
        now = tokenizer_digest(self._loaded)
        return of_files if now == self._origin[1] else identity.digest_json([of_files, now])

    def reads_the_clock(self) -> bool:
        """Whether the chat template depends on the time, so that one chat has other ids tomorrow."""
        if self._given is not None or self._origin is not None:
            return _CLOCK.decode() in str(getattr(self.get(), "chat_template", None))
        files = (p for p in self._files() if "template" in str(p.relative_to(p.parents[1])) or p.name == _FILES[1])
        return any(_CLOCK in p.read_bytes() for p in files)

    def _files(self) -> list[Path]:
        if self._folder is None:
            self._folder = self._find()
        files = tokenizer_files(self._folder)
        if not files:
            raise no_tokenizer(str(self._folder))
        return files


_known: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer object: its rules, special tokens and chat template.

    The vocabulary is read once per object, and again when its size or anything else of the rest changed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    state: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": special,
        "chat": getattr(tokenizer, "chat_template", None),
        "bos": getattr(tokenizer, "add_bos_token", None),
        "eos": getattr(tokenizer, "add_eos_token", None),
        "split_special": getattr(tokenizer, "split_special_tokens", None),
    }
    if backend is None:
        return identity.digest_json(
            {**state, "vocab": tokenizer.get_vocab(), "settings": getattr(tokenizer, "init_kwargs", {})}
        )
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer, backend.post_processor) if part is not None]
    added = {i: repr(token) for i, token in backend.get_added_tokens_decoder().items()}
    quick = identity.digest_json(
        [state, backend.get_vocab_size(), added, [repr(part.__getstate__()) for part in parts]]
    )
    known = _known.get(tokenizer)
    if known is not None and known[0] == quick:
        return known[1]
    rules = json.loads(backend.to_str())
    # Left over from the last call, and overridden by every call of ours.
    rules.pop("truncation", None)
    rules.pop("padding", None)
    digest = identity.digest_json({**state, "rules": rules})
    _known[tokenizer] = quick, digest
    return digest
