"""`actcache clear`: delete what is stored."""

from __future__ import annotations

import sys

import click

from actcache.cli.options import debug_option, json_option, store_option


@click.command("clear")
@click.argument("model", required=False)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@store_option
@json_option
@debug_option
def command(model: str | None, yes: bool, store: str | None, as_json: bool) -> None:
    """Delete what is stored for MODEL, or everything.

    Says what it will delete and asks first. Files that actcache did not write are never touched.
    """
    from actcache.cli.lookup import stored_name
    from actcache.cli.output import count, print_json, size
    from actcache.store.default import only_model, store_at

    opened = store_at(store)
    name = None if model is None else stored_name(opened, model)
    info = opened.info() if name is None else only_model(opened.info(), name)
    if info.models and not yes:
        click.echo(f"in {info.cache_dir}:", err=True)
        for entry in info.models:
            held = f"{count(entry.num_prompts, 'prompt')}, {size(entry.size_bytes)}"
            click.echo(f"  {entry.model_name} ({entry.variant})  {held}", err=True)
        if not sys.stdin.isatty():
            raise click.UsageError("nobody to ask here: give --yes to delete this.")
        if not click.confirm("Delete this?", err=True):
            raise click.ClickException("nothing was deleted.")
    deleted = opened.clear(name) if info.models or name is None else 0
    if as_json:
        print_json({"deleted": deleted})
    else:
        click.echo(f"{count(deleted, 'prompt')} deleted." if deleted else "nothing is stored.")
