"""`actcache migrate`: give the last tokens of a dataset of full sequences files of their own."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, shard_max_bytes_option
from actcache.cli.upgrade import dry_run_option, run


@click.command("migrate")
@click.argument("repo")
@shard_max_bytes_option
@click.option("--private/--public", default=None, help="Who may see the repository. [default: as it is]")
@dry_run_option
@json_option
@debug_option
def command(repo: str, shard_max_bytes: int | None, private: bool | None, dry_run: bool, as_json: bool) -> None:
    """Split the last tokens of the dataset REPO from all others, so that one vector per prompt is little to fetch.

    REPO is org/name on the Hugging Face Hub, where a token that may write is needed (`hf auth login`, or HF_TOKEN), or
    a folder, written ./folder. It is one commit, in format 2.0; vectors, labels and all else stay as they are. Run
    again, a migration that was stopped goes on where it was.
    """
    from actcache.share.migrate import Migration
    from actcache.share.push import DEFAULT_SHARD_BYTES

    job = Migration(repo, shard_max_bytes=shard_max_bytes or DEFAULT_SHARD_BYTES, private=private)
    run(job, dry_run=dry_run, as_json=as_json)
