"""What verbs of datasets, and `actcache report`, print with `--json`."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from actcache.report.contents import Contents


class PushResult(TypedDict):
    """Where a dataset was pushed.

    Attributes:
        dataset: its URL, or its folder.
    """

    dataset: str


class PullResult(TypedDict):
    """What was pulled.

    Attributes:
        prompts: how many are registered, or with --materialize fetched.
        dataset, commit: what was read.
        space: the id under which it is in the store.
        model_space: the id of the model that the dataset was computed with; null where only a name is known.
        trusted: whether it answers for any model of that name.
    """

    prompts: int
    model_name: str
    dataset: str
    commit: str
    space: str
    model_space: str | None
    trusted: bool


class LoadResult(TypedDict):
    """What was written.

    Attributes:
        file: the file.
        prompts: how many.
        size_bytes: of the file.
        tensors: the shape of each, by name.
    """

    file: str
    prompts: int
    size_bytes: int
    tensors: dict[str, list[int]]


class DryRun(TypedDict):
    """How it was called.

    Attributes:
        dry_run: whether nothing was changed.
    """

    dry_run: bool


class DatasetInfo(TypedDict):
    """What a dataset holds.

    Attributes:
        commit: the one that was read; null for a folder.
        model_name, revision: the model that it says it was computed with; null where it does not say.
        format_version: of the dataset, such as "2.0".
        tensors: what its metadata says of each kind of tensors, by name; see the format of datasets.
        perplexity: whether it has that of prompts.
        labels: all that occur, as text; null where it has none.
        prompts_without_label: how many of a dataset with labels have none.
        columns: names of other columns.
        checksums: what is checked when it is read: "blocks" (all of it), "files" (those read whole), "some" (of its
            files); null: nothing.
        provenance: what made the dataset, as it says itself.
    """

    dataset: str
    commit: str | None
    model_name: str | None
    revision: str | None
    format_version: str
    num_prompts: int
    available_layers: list[int]
    tensors: dict[str, dict[str, Any]]
    perplexity: bool
    labels: list[str] | None
    prompts_without_label: int
    columns: list[str]
    checksums: str | None
    provenance: dict[str, Any]


class LensTitles(TypedDict):
    """What is different in JSON.

    Attributes:
        lenses: the titles of the logit lenses that the page shows.
    """

    lenses: list[str]


class ReportResult(TypedDict):
    """What was written.

    Attributes:
        written: the file, `bytes` long.
        contents: what the page says.
    """

    written: str
    bytes: int
    contents: Annotated[Contents, LensTitles]
