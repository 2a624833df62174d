"""`actcache push`: publish what is stored for a model as a dataset."""

from __future__ import annotations

from typing import Any

import click

from actcache.cli.options import (
    debug_option,
    json_option,
    shard_max_bytes_option,
    space_option,
    store_option,
    tensors_option,
)
from actcache.cli.prompts import Given, described_prompt_arguments

_POSITIVE = click.IntRange(min=1)


@click.command("push")
@click.argument("repo")
@click.argument("model")
@described_prompt_arguments
@tensors_option("all that the prompts have in common")
@click.option(
    "--pooling", metavar="NAME", help="Which stored form, `tokens` for full sequences. [default: most prompts']"
)
@shard_max_bytes_option
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@click.option("--exist-ok", is_flag=True, help="Replace the dataset that is there.")
@click.option(
    "--skip-missing/--no-skip-missing",
    default=True,
    show_default=True,
    help="Leave out prompts that lack something, or refuse.",
)
@click.option("--description", metavar="TEXT", help="For the card, Markdown.")
@click.option("--license", metavar="NAME", default="cc-by-4.0", show_default=True, help="As the Hub calls it.")
@click.option("--num-workers", type=_POSITIVE, metavar="N", help="Files that are made, and sent, at the same time.")
@click.option("--commit-batch-size", type=_POSITIVE, metavar="N", help="Files per commit. [default: all in one]")
@click.option("--stream", is_flag=True, help="Keep only a few files on this disk at a time.")
@click.option("--stream-batch-size", type=_POSITIVE, metavar="N", default=10, show_default=True, help="How many.")
@click.option(
    "--preload",
    type=click.Choice(["none", "per_layer", "full"]),
    default="none",
    show_default=True,
    help="What is read into memory before files are made.",
)
@click.option("--preload-workers", type=_POSITIVE, metavar="N", default=8, show_default=True, help="Threads for that.")
@click.option("--shuffle/--no-shuffle", default=True, show_default=True, help="Bring the rows in a random order.")
@click.option("--revision", metavar="NAME", help="Of the model, where several are stored.")
@click.option("--dtype", metavar="NAME", help="The dtype the model computed in, where several are stored.")
@space_option
@store_option
@json_option
@debug_option
def command(
    repo: str,
    model: str,
    given: Given,
    shard_max_bytes: int | None,
    space: str | None,
    store: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish what is stored for the prompts in FILES (default: for all) of MODEL as the dataset REPO.

    REPO is org/name on the Hugging Face Hub, where a token that may write is needed (`hf auth login`, or HF_TOKEN), or
    a folder, written ./folder. Run again, a push that was stopped goes on where it was. Labels and
    other columns that are not named are those stored with the prompts.
    """
    from actcache.cli.lookup import one_space, store_to_read, stored_name
    from actcache.cli.output import print_json
    from actcache.share.push import DEFAULT_SHARD_BYTES, push_dataset

    where = store_to_read(store)
    prompts, labels, metadata = None, None, None
    if given:
        prompts, labels, metadata = given.described()
    elif given.label_column is not None:
        raise click.UsageError("--label-column needs FILES, in which the labels are.")
    elif given.metadata_columns:
        raise click.UsageError("--metadata-column needs FILES, in which the columns are.")
    if space is not None:
        space = one_space(where, model, space)
    url = push_dataset(
        repo,
        stored_name(where, model),
        prompts,
        labels=labels,
        metadata=metadata,
        shard_max_bytes=shard_max_bytes or DEFAULT_SHARD_BYTES,
        space=space,
        store=where,
        **options,
    )
    if as_json:
        print_json({"dataset": url})
        return
    click.echo(url)
