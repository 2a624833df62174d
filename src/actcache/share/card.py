"""The card of a dataset: what it is, what is in it, how to load it, where it comes from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from actcache.errors import OptionError
from actcache.share import blocks
from actcache.share.format import FULL_SEQUENCE, HIDDEN, LOGITS, ROUTER, VERSION
from actcache.store.spaces import SpaceInfo
from actcache.store.variants import edit_text

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def check_license(license: str) -> str:
    """`license` as a card has it; `OptionError` for what cannot be the name of one."""
    if not isinstance(license, str) or not _LICENSE.fullmatch(license):
        raise OptionError(f"license is {license!r:.60}: expected the Hub's name of one, such as 'cc-by-4.0' or 'mit'.")
    return license


def published_name(space: SpaceInfo) -> str:
    """What the model is called in a dataset: a folder by its last part alone, and never by the name of what it is not.

    Those who know only a name take what is called like a model for what that model gives.
    """
    name = space.model_name
    if os.path.isabs(name):
        name = os.path.basename(name.rstrip(os.sep)) or "model"
    edits = "; ".join(edit_text(edit) for edit in space.edits)
    return f"{name} (edited: {edits})" if edits else name


def build(
    *,
    repo_id: str,
    model: str,
    on_hub: bool,
    revision: str | None,
    described: Mapping[str, Any],
    columns: list[str],
    count: int,
    provenance: Mapping[str, Any],
    license: str,
    description: str | None,
) -> str:
    """The text of README.md."""
    shown = plain(model)
    edited = "(edited: " in model
    link = f"[`{shown}`](https://huggingface.co/{model})" if on_hub and _HUB_ID.fullmatch(model) else f"`{shown}`"
    parts = [
        _front_matter(model, count, license),
        f"# Activations of {shown}",
        f"Activations of {link}{f', revision `{plain(revision)}`' if revision else ''}, for {count:,} prompts.",
        "**The model was run with edits: these are not the activations of the model as it is.**" if edited else "",
        (description or "").strip(),
        "## Contents",
        contents(described),
        f"`index/` has one row per prompt: {', '.join(f'`{plain(name)}`' for name in columns)}.",
        "## Load with actcache",
        with_actcache(repo_id, described),
        "## Load with pyarrow and safetensors",
        with_nothing_but(repo_id, described),
        "## Provenance",
        _provenance(provenance, bool(described)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(model: str, count: int, license: str) -> str:
    size = next((name for limit, name in _SIZES if count < limit), "n>1M")
    tag = re.sub(r"[^a-z0-9.-]+", "-", model.lower()).strip("-")[:60]
    lines = [
        "---",
        f"license: {license}",
        # The shards are no examples: the viewer shows the index.
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        "    path: index/train-*.parquet",
        "task_categories:",
        "- feature-extraction",
        "size_categories:",
        f"- {size}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in ("actcache", "activations", "interpretability", "lmprobe", tag) if tag),
        "---",
    ]
    return "\n".join(lines)


def contents(described: Mapping[str, Any]) -> str:
    """What there is, as a table."""
    rows = ["| tensors | site | layers | width | dtype | rows | shards |", "|---|---|---|---|---|---|---|"]
    for name, told in described.items():
        whole = told.get("storage") == FULL_SEQUENCE
        pooling = "every token" if whole else f"one per prompt ({told['pooling']})"
        width = f"top {told['k']}" if name == LOGITS else str(told["dim"])
        site = told.get("site", "logits")
        cells = [name, site, _layers(told.get("layers", [])), width, told["dtype"], pooling, str(len(told["shards"]))]
        rows.append(f"| {' | '.join(plain(cell) for cell in cells)} |")
    return "\n".join(rows)


def _layers(layers: list[int]) -> str:
    if not layers:
        return "-"
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def with_actcache(repo_id: str, described: Mapping[str, Any]) -> str:
    """How this library loads it."""
    name = next((key for key in described if key not in (LOGITS, ROUTER)), None)
    told = described.get(name or "")
    if told is None:
        return _code(f"import actcache as ac\n\ntensors, about = ac.load_activation_dataset({repo_id!r})")
    site = "" if name == HIDDEN else f", site={name!r}"
    pooling = "" if told.get("pooling", "last_token") == "last_token" else f", pooling={told['pooling']!r}"
    which, key, only = "", "None", "it"
    if told["layers"]:
        layer = told["layers"][len(told["layers"]) // 2]
        which, key, only = f", layers=[{layer}]", str(layer), "that layer"
    return _code(
        f"import actcache as ac\n\n"
        f"vectors = ac.load_activations({repo_id!r}{which}{site}{pooling})[{key}]   "
        f"# [prompts, {told['dim']}]; only {only} is downloaded"
    )


def with_nothing_but(repo_id: str, described: Mapping[str, Any]) -> str:
    """How it is loaded with pyarrow and safetensors alone."""
    name = next((key for key in described if key not in (LOGITS, ROUTER)), None) or next(iter(described))
    told = described[name]
    # numpy has no bfloat16, for which the library takes torch.
    framework = "pt" if told["dtype"] == "bfloat16" else "np"
    layers = told.get("layers", [])
    layer = f"layer={layers[len(layers) // 2]}" if layers and name != ROUTER else ""
    key = {LOGITS: '"logits_topk.values"', ROUTER: f'"router.layer_{layers[0] if layers else 0}"'}.get(
        name, f'about["key_pattern"].format({layer})'
    )
    arguments = ", ".join(filter(None, [layer, 'shard=row["shard_index"]']))
    lines = [
        "import json",
        "",
        "import pyarrow.parquet as pq",
        "from safetensors import safe_open",
        "",
        'table = pq.read_table("index/train-00000-of-00001.parquet")',
        f'about = json.loads(table.schema.metadata[b"lmprobe:tensors"])["{name}"]',
        "row = table.slice(0, 1).to_pylist()[0]   # the first prompt: its text, its label, where its vectors are",
        f'path = about["file_pattern"].format({arguments})',
        f'with safe_open(path, framework="{framework}") as file:',
        f'    vector = file.get_slice({key})[row["row_offset"] : row["row_offset"] + 1][0]',
    ]
    if told.get("storage") == FULL_SEQUENCE:
        arguments = ", ".join(filter(None, [layer, "shard=shard"]))
        lines += [
            "",
            "tokens = []   # every token of it; `vector` is the last one",
            'for shard, offset in zip(row["token_shard_ids"], row["token_shard_offsets"]):',
            f'    with safe_open(about["file_pattern"].format({arguments}), framework="{framework}") as file:',
            f"        tokens.append(file.get_slice({key})[offset : offset + 1][0])",
        ]
    fetch = ""
    if "/" in repo_id and not repo_id.startswith((".", "/", "~", "file:")):
        fetch = f"In the folder that `hf download {repo_id} --repo-type dataset --local-dir .` fills:\n\n"
    return fetch + _code("\n".join(lines))


def _provenance(provenance: Mapping[str, Any], has_files: bool) -> str:
    lines = [
        f"- written by actcache {provenance['written_with']['actcache']} at {provenance['created_at']}, in version "
        f"{VERSION} of the lmprobe format",
    ]
    told = provenance.get("identity", {})
    lines += [f"- {plain(key.replace('_', ' '))}: `{plain(value)}`" for key, value in told.items()]
    versions = provenance.get("extracted_with") or {}
    lines += [
        f"- extracted with {plain(key.removesuffix('_version'))} {plain(value)}"
        for key, value in versions.items()
        if value
    ]
    lines += [f"- not part of it: {plain(what)}" for what in provenance.get("left_out", [])]
    lines.append(
        "- the identity of the model, SHA-256 of every file and token ids are in the metadata and columns of the index"
    )
    if has_files:
        lines.append(f"- actcache compares what it reads with the digests of blocks of 64 KiB in `{blocks.FILE}`")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def plain(value: Any) -> str:
    """Text that means nothing else in Markdown or in a table of it."""
    text = " ".join(str(value).split())
    return text.replace("`", "'").replace("|", "/").replace("<", "(").replace("[", "(").replace("]", ")")[:300]
