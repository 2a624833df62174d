"""What verbs of the store print with `--json`, where it is no report of the library."""

from __future__ import annotations

from typing import Any, TypedDict

from actcache.cli.results.prompt import Prompt
from actcache.config import Setting
from actcache.store.summaries import SiteSummary


class ListedPrompt(TypedDict):
    """A prompt in a list.

    Attributes:
        prompt: as it was given: text, token ids, or messages.
        num_tokens: null for a text that was stored without its tokens.
    """

    prompt: Prompt
    num_tokens: int | None


class ListedVariant(TypedDict):
    """One variant of the model.

    Attributes:
        space: its id, as --space takes it.
        variant: what tells it from the others, in words.
        revision, dtype: of the model that was run; null where that is not known.
        pulled: the dataset and commit that it was pulled from, or null.
        num_prompts: prompts that are stored.
        size_bytes: bytes on disk.
        prompts: each of them.
    """

    space: str
    variant: str
    revision: str | None
    dtype: str | None
    pulled: str | None
    num_prompts: int
    size_bytes: int
    prompts: list[ListedPrompt]


class OtherVariant(TypedDict):
    """A variant in which a prompt is stored.

    Attributes:
        space: its id, as --space takes it.
        variant: what tells it from the others, in words.
        revision, dtype: of the model that was run; null where that is not known.
    """

    space: str
    variant: str
    revision: str | None
    dtype: str | None


class ShownSite(TypedDict):
    """One site of one prompt as it is stored.

    Attributes:
        site: complete name.
        layout: "tokens" for every token, or the pooling.
        dtype: in which it is stored.
        vectors: how many.
        width: numbers in a vector.
        norm: mean length of the vectors.
    """

    site: str
    layout: str
    dtype: str
    vectors: int
    width: int
    norm: float


class ShowResult(TypedDict):
    """What is stored for a prompt.

    Attributes:
        variant, space: of which variant this is, in words, and its id.
        prompt: as it was given: text, token ids, or messages.
        token_ids: null for a text that was stored without its tokens.
        tokens: the text of each token, a byte that is no UTF-8 by itself as ``\\xab``; null where the model's tokenizer
            is not on this machine.
        sites: one for each site and layout.
        perplexity: of all tokens, of the likeliest and of the least likely; null where it is not stored.
        label, metadata: what was said of the prompt; null for nothing.
        pulled: the dataset and commit that it was pulled from, or null.
        not_here: sites that this dataset has of the prompt, and that are fetched when they are read.
        variants: all in which the prompt is stored, the one that is shown first.
    """

    model_name: str
    variant: str
    space: str
    prompt: Prompt
    token_ids: list[int] | None
    tokens: list[str] | None
    sites: list[ShownSite]
    perplexity: list[float] | None
    label: Any
    metadata: Any
    pulled: str | None
    not_here: list[str]
    variants: list[OtherVariant]


class ImportSkipped(TypedDict):
    """What an import left out."""

    what: str
    reason: str


class ImportResult(TypedDict):
    """What an import brought in.

    Attributes:
        models: prompts imported, by model name.
        spaces: the id of the space of each model.
        skipped: what was left out.
    """

    models: dict[str, int]
    spaces: dict[str, str]
    skipped: list[ImportSkipped]


class VerifySums(TypedDict):
    """What is computed of the list of damage.

    Attributes:
        repaired: how much of what was wrong has been put right.
        ok: whether all is well now.
    """

    repaired: int
    ok: bool


class Invalidated(TypedDict):
    """What was forgotten.

    Attributes:
        forgotten: prompts that were stored.
        space: of which variant.
    """

    forgotten: int
    space: str


class Cleared(TypedDict):
    """What was deleted.

    Attributes:
        deleted: prompts.
    """

    deleted: int


class _ConfigResult(TypedDict):
    store: Setting
    limit: Setting
    dtype: Setting
    log: Setting
    index: Setting
    notes: list[str]


class ConfigResult(_ConfigResult, total=False):
    """What is in force.

    Attributes:
        store: folder or URL.
        limit: bytes that the store keeps to, null for no limit.
        dtype: in which vectors are stored, null for that in which they were computed.
        log: level of Python's logging, null for warnings alone.
        index: folder of this host's index of the store.
        local: bytes that are kept here of a store that lies elsewhere; only of such a store.
        notes: what overrules what.
    """

    local: Setting


class StatsVariant(TypedDict):
    """One variant of a model.

    Attributes:
        space: its id, as --space takes it.
        variant: what tells it from the others, in words.
        size_bytes: bytes on disk.
        sites: one for each site and layout.
    """

    model_name: str
    space: str
    variant: str
    num_prompts: int
    size_bytes: int
    sites: list[SiteSummary]
