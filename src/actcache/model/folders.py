"""Folders of models and tokenizers: local ones, and the Hub's in the local Hub cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from actcache.errors import ModelLoadError, OptionError, TokenizerError
from actcache.model.options import LoadOptions

_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


def find_folder(name: str, options: LoadOptions, what: str = "model") -> tuple[Path, str, str | None]:
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
        # The revision is the model's; a tokenizer of another repository has no such commit.
        revision = options.revision if what == "model" else None
        folder = Path(snapshot_download(name, allow_patterns=patterns, revision=revision, token=options.token))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelLoadError(
            f"{what} {name!r} is neither a local folder nor to be had from the Hub ({reason}): "
            "check the name, the network and the token."
        ) from error
    return folder, name, folder.name


def load_tokenizer(folder: Path, options: LoadOptions) -> Any:
    """The tokenizer whose files lie in `folder`; `TokenizerError` when they cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TokenizerError(
            f"the tokenizer in {str(folder)!r} cannot be loaded ({error}); pass tokenizer=."
        ) from error


def no_tokenizer(place: str) -> TokenizerError:
    return TokenizerError(
        f"no tokenizer in {place!r}: pass tokenizer= (an object, a folder or a Hub id), or prompts as token ids."
    )
