"""`actcache dataset-info`: what a dataset of the Hub or in a folder holds."""

from __future__ import annotations

import click

from actcache.cli.options import dataset_revision_option, debug_option, json_option


@click.command("dataset-info")
@click.argument("repo")
@dataset_revision_option
@json_option
@debug_option
def command(repo: str, revision: str | None, as_json: bool) -> None:
    """Say what the dataset REPO holds; only its index is transferred.

    REPO is org/name on the Hub, or a folder, written ./folder. A private one is read with the token of `hf auth login`,
    or $HF_TOKEN.
    """
    from actcache.cli.output import console, one_line, print_json, table
    from actcache.model.site_list import ranges
    from actcache.share.metadata import fetch_dataset_metadata

    found = fetch_dataset_metadata(repo, revision=revision)
    labels = sorted({str(label) for label in found.labels or [] if label is not None})
    bare = sum(label is None for label in found.labels or [])
    if as_json:
        print_json(
            {
                "dataset": found.dataset,
                "commit": found.commit,
                "model_name": found.model_name,
                "revision": found.revision,
                "format_version": found.format_version,
                "num_prompts": found.num_prompts,
                "available_layers": found.available_layers,
                "tensors": found.tensor_descriptors,
                "perplexity": found.has_perplexity,
                "labels": None if found.labels is None else labels,
                "prompts_without_label": bare,
                "columns": list(found.metadata),
                "checksums": found.checksums,
                "provenance": found.provenance,
            }
        )
        return
    out = console()
    commit = f" at {found.commit[:12]}" if found.commit else ""
    out.print(f"{one_line(found.dataset)}{commit}: format {found.format_version}", soft_wrap=True, markup=False)
    model = one_line(found.model_name or "not said", 200)
    out.print(f"model    {model}{f' at {found.revision[:12]}' if found.revision else ''}", markup=False)
    out.print(f"prompts  {found.num_prompts:,}", markup=False)
    if labels:
        shown = ", ".join(one_line(label, 30) for label in labels[:10])
        shown += f" and {len(labels) - 10:,} more" if len(labels) > 10 else ""
        out.print(
            f"labels   {shown}{f' ({bare:,} of {found.num_prompts:,} prompts have none)' if bare else ''}", markup=False
        )
    if found.metadata:
        out.print(f"columns  {', '.join(one_line(name, 40) for name in found.metadata)}", markup=False)
    checked = {
        "blocks": "all that is read",
        "files": "files that are read whole",
        "some": "some files: it has no checksums of others",
        None: "nothing: it has no checksums",
    }
    out.print(f"checked  {checked[found.checksums]}", markup=False)
    rows = table("tensors", "layers", "width", "rows", "shards", right=("width", "shards"))
    for name, said in found.tensor_descriptors.items():
        width = said.get("dim", said.get("k", said.get("num_experts", "")))
        whole = said.get("storage") == "full_sequence"
        rows.add_row(
            one_line(name, 60),
            ranges(sorted(said.get("layers", []))),
            one_line(str(width), 20),
            "every token" if whole else one_line(f"one per prompt, {said.get('pooling')}", 60),
            str(len(said["shards"])),
        )
    if found.has_perplexity:
        rows.add_row("perplexity", "", "3", "one per prompt: mean, min, max", "")
    out.print(rows)
