"""`actcache upgrade`: bring a dataset of format 1.x to 2.0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option

if TYPE_CHECKING:
    from actcache.share.reform import Job

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Change nothing, and say what would be done: files and bytes."
)


@click.command("upgrade")
@click.argument("repo")
@click.option("--remove-json/--no-remove-json", default=True, show_default=True, help="Remove lmprobe_info.json.")
@dry_run_option
@json_option
@debug_option
def command(repo: str, remove_json: bool, dry_run: bool, as_json: bool) -> None:
    """Bring the dataset REPO from format 1.x to 2.0; no vectors are touched.

    REPO is org/name on the Hugging Face Hub, where a token that may write is needed (`hf auth login`, or HF_TOKEN), or
    a folder, written ./folder. Its metadata goes into the index, its card says what is new. It is one commit.
    """
    from actcache.share.migrate import Upgrade

    run(Upgrade(repo, remove_json=remove_json), dry_run=dry_run, as_json=as_json)


def run(job: Job, *, dry_run: bool, as_json: bool) -> None:
    """Do a job, or say what it would do."""
    from actcache.cli.output import one_line, plain, print_json, size

    with job.planned() as plan:
        report = plan.report
        if not dry_run:
            plan.apply()
    if as_json:
        print_json({**plain(report), "dry_run": dry_run})
        return
    if dry_run:
        click.echo("\n".join(one_line(line) for line in str(report).splitlines()))
        return
    if not report.changed:
        click.echo(f"{one_line(report.dataset)}: {report.summary}")
        return
    new = len(report.added) + len(report.replaced)
    click.echo(
        f"{one_line(report.url)}: {report.summary}; {new:,} files, {size(report.bytes_to_send)}; "
        f"{len(report.removed):,} removed"
    )
