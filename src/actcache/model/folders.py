"""Folders of models and tokenizers: local ones, and the Hub's in the local Hub cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actcache.errors import ModelLoadError, OptionError, TokenizerError
from actcache.model.options import LoadOptions

_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


# Weights are left to transformers, when the model is loaded: a warm run needs none.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


class Place(NamedTuple):
    """Where a model's files are: their folder, its canonical name, and the commit when they came from the Hub."""

    folder: Path
    name: str
    commit: str | None


def find_folder(name: str, options: LoadOptions, what: str = "model") -> Place:
    """The place of `name`: a local folder, or a repository of the Hub, of which all but the weights is fetched.

    Raises `ModelLoadError` when it is neither, and for a revision or a token that does not lead there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if options.revision is not None and what == "model":
            raise OptionError(
                f"revision={options.revision!r} has no meaning for the local folder {name!r}: leave it out."
            )
        return Place(folder.resolve(), str(folder.resolve()), None)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelLoadError(
            f"{what} folder {name!r} does not exist: expected an existing folder or a Hub id 'org/name'."
        )
    return _hub_folder(name, options, what)


def _hub_folder(name: str, options: LoadOptions, what: str) -> Place:
    # The revision is the model's; a tokenizer of another repository has no such commit.
    revision = options.revision if what == "model" else None
    folder = fetch(name, _SMALL, revision=revision, token=options.token, what=what)
    return Place(folder, name, folder.name)


def fetch(
    name: str, patterns: Sequence[str], *, revision: str | None, token: str | bool | None, what: str = "model"
) -> Path:
    """The folder of the local Hub cache that holds the files of a repository that match; fetched where missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), revision=revision, token=token))
    except RevisionNotFoundError as error:
        raise ModelLoadError(
            f"{what} {name!r} has no revision {revision!r} on the Hub: expected a branch, a tag or a commit of it."
        ) from error
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{what} {name!r} is gated on the Hub: accept its conditions there, and pass token= of that account."
        ) from error
    except RepositoryNotFoundError as error:
        remedy = (
            "check the name and what the token may read" if isinstance(token, str) else "check the name, or pass token="
        )
        raise ModelLoadError(
            f"{what} {name!r} is neither a local folder nor to be had from the Hub: there is no such repository, or it "
            f"is private: {remedy}."
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(token, str) and token:
            reason = reason.replace(token, "***")
        raise ModelLoadError(
            f"{what} {name!r} is neither a local folder nor to be had from the Hub ({reason}): "
            "check the name, the network and the token."
        ) from error


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
