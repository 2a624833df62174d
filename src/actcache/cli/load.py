"""`actcache load`: activations of a dataset into a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actcache.cli.files import file_to_write, replaced
from actcache.cli.options import (
    dataset_layers_option,
    dataset_revision_option,
    debug_option,
    json_option,
    prompts_column_option,
)

if TYPE_CHECKING:
    import numpy.typing as npt

_SUFFIXES = (".safetensors", ".npz")
_LARGEST_TEXTS = 1 << 30


@click.command("load")
@click.argument("repo")
@click.option(
    "--out", required=True, metavar="FILE", type=click.Path(dir_okay=False), help="A .safetensors or .npz file."
)
@dataset_layers_option
@click.option(
    "--pooling",
    metavar="NAME",
    default="last_token",
    show_default=True,
    help="last_token, first_token, mean, max, min; none for every token.",
)
@click.option("--prompts", "files", multiple=True, type=click.Path(exists=True, allow_dash=True, dir_okay=False),
              metavar="FILE", help="Only these prompts, in this order. Text, JSONL or CSV. [default: all]")  # fmt: skip
@prompts_column_option
@click.option("--site", metavar="NAME", default="resid_post", show_default=True, help="Which site of the dataset.")
@click.option("--labels/--no-labels", default=True, show_default=True, help="Whether labels go into the file.")
@dataset_revision_option
@json_option
@debug_option
def command(
    repo: str,
    out: str,
    layers: list[int] | None,
    pooling: str,
    files: tuple[str, ...],
    column: str | None,
    site: str,
    labels: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write activations of the dataset REPO into a file; only what is asked for is transferred.

    REPO is org/name on the Hub, or a folder, written ./folder. The file has a float32 tensor layer_5 [B, D] for each
    layer, or with --pooling none [rows, D] and row_offset [B + 1], where prompt i owns the rows row_offset[i] to
    row_offset[i + 1]. Prompts and labels are in the metadata of a .safetensors file as JSON, and arrays of a .npz file.
    """
    from actcache.cli.output import count, print_json, size
    from actcache.cli.prompts import read_prompts
    from actcache.share.load import load_activations
    from actcache.share.metadata import fetch_dataset_metadata

    path = file_to_write("--out", out)
    if path.suffix not in _SUFFIXES:
        raise click.UsageError(f"--out {out}: expected a name that ends with {' or '.join(_SUFFIXES)}.")
    asked = read_prompts(files, (), column=column) if files else None
    found = fetch_dataset_metadata(repo, revision=revision)
    prompts = found.prompts if asked is None else asked
    if path.suffix == ".npz":
        _check_npz(path, prompts, found.labels if labels and asked is None else None)
    # The same commit, whatever is pushed meanwhile.
    loaded = load_activations(
        repo,
        prompts=asked,
        layers=layers,
        pooling=None if pooling == "none" else pooling,
        return_labels=labels,
        site=site,
        revision=found.commit,
    )
    values, given = loaded if labels else (loaded, None)
    arrays = _arrays(values, site)
    if path.suffix == ".npz":
        _write_npz(path, arrays, prompts, given)
    else:
        said = {"dataset": found.dataset, "commit": found.commit, "model": found.model_name}
        _write_safetensors(path, arrays, {**said, "site": site, "pooling": pooling}, prompts, given)
    written = path.stat().st_size
    if as_json:
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        print_json({"file": path, "prompts": len(prompts), "size_bytes": written, "tensors": shapes})
        return
    click.echo(f"{path}: {count(len(prompts), 'prompt')}, {count(len(values), 'layer')}, {size(written)}")


def _check_npz(path: Path, prompts: Sequence[Any], labels: Sequence[Any] | None) -> None:
    """`click.UsageError` for the first prompt that, or whose label, no array of a .npz file holds."""
    instead = "which only a .safetensors file holds"
    for i, prompt in enumerate(prompts):
        reason = _lost(prompt) if isinstance(prompt, str) else "is no text"
        if reason:
            raise click.UsageError(f"--out {path}: prompt {i}, {prompt!r:.60}, {reason}, {instead}.")
    _check_room(path, "prompts", prompts)
    if labels is None or all(label is None for label in labels):
        return
    for i, label in enumerate(labels):
        reason = "has no label" if label is None else None
        if isinstance(label, str):
            reason = f"has the label {label!r:.60}, which {lost}" if (lost := _lost(label)) else None
        elif label is not None and not -(2**63) <= label < 2**63:
            reason = f"has a label of more than 64 bits, {label}"
        if reason:
            raise click.UsageError(
                f"--out {path}: prompt {i}, {prompts[i]!r:.60}, {reason}, {instead}; --no-labels leaves labels out."
            )
    _check_room(path, "labels", [label for label in labels if isinstance(label, str)])


def _lost(text: str) -> str | None:
    return "ends in a NUL character" if text.endswith("\0") else None


def _check_room(path: Path, what: str, texts: Sequence[str]) -> None:
    """`click.UsageError` where an array of texts, each of which takes the room of the longest, is too large."""
    longest = max(range(len(texts)), key=lambda i: len(texts[i]), default=None)
    if longest is not None and (room := 4 * len(texts[longest]) * len(texts)) > _LARGEST_TEXTS:
        raise click.UsageError(
            f"--out {path}: in a .npz file all {what} take the room of the longest, {what}[{longest}] with "
            f"{len(texts[longest]):,} characters, together {room:,} bytes: write a .safetensors file."
        )


def _arrays(values: dict[int | None, Any], site: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors of the file: rows of prompts one after the other, and where those of each begin."""
    import numpy as np

    names = {layer: site if layer is None else f"layer_{layer}" for layer in values}
    first = next(iter(values.values()))
    if not isinstance(first, list):
        return {names[layer]: array for layer, array in values.items()}
    arrays = {names[layer]: np.concatenate(parts) for layer, parts in values.items()}
    arrays["row_offset"] = np.cumsum([0, *map(len, first)], dtype=np.int64)
    return arrays


def _write_npz(path: Path, arrays: dict[str, npt.NDArray[Any]], prompts: Any, labels: Any) -> None:
    import numpy as np

    _check_npz(path, prompts, None if labels is None else labels.tolist())
    named = {"prompts": np.array(prompts, np.str_), **({} if labels is None else {"labels": labels}), **arrays}
    with replaced("--out", path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **named)


def _write_safetensors(
    path: Path, arrays: dict[str, npt.NDArray[Any]], said: dict[str, Any], prompts: Any, labels: Any
) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    metadata = {key: str(value) for key, value in said.items() if value is not None}
    metadata["prompts"] = json.dumps(prompts, ensure_ascii=False)
    if labels is not None:
        metadata["labels"] = json.dumps(labels.tolist(), ensure_ascii=False)
    with replaced("--out", path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)
