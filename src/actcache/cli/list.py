"""`actcache list`: the prompts that are stored for a model."""

from __future__ import annotations

import shutil
import sys

import click

from actcache.cli.options import debug_option, json_option, store_option


@click.command("list")
@click.argument("model")
@store_option
@json_option
@debug_option
def command(model: str, store: str | None, as_json: bool) -> None:
    """List the prompts that are stored for MODEL, each with its number of tokens.

    A model that is stored in several variants (revision, dtype, ...) has a list for each.
    """
    from actcache.cli.lookup import readable, stored_name
    from actcache.cli.output import one_line, print_json
    from actcache.store.default import store_at

    opened = store_at(store)
    name = stored_name(opened, model)
    variants = [s for s in opened.spaces() if s.model_name == name]
    if as_json:
        print_json(
            [
                {
                    "space": v.space,
                    "revision": v.revision,
                    "dtype": v.dtype,
                    "prompts": readable(opened.prompts(v.space)),
                }
                for v in variants
            ]
        )
        return
    width = shutil.get_terminal_size().columns - 7 if sys.stdout.isatty() else None
    for variant in variants:
        if len(variants) > 1:
            click.echo(f"# {variant.dtype}, revision {variant.revision}, space {variant.space}")
        for prompt in readable(opened.prompts(variant.space)):
            text = prompt["prompt"] if isinstance(prompt["prompt"], str) else str(prompt["prompt"])
            click.echo(f"{prompt['num_tokens']:5}  {one_line(text, width)}")
