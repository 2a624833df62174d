"""`actcache plan`: what a warm-up with the same arguments would do."""

from __future__ import annotations

from typing import Any

import click

from actcache.cli.options import debug_option, json_option, model_options, unified_cache
from actcache.cli.prompts import Given, prompt_arguments


@click.command("plan")
@click.argument("model")
@prompt_arguments
@model_options
@json_option
@debug_option
def command(
    model: str,
    given: Given,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what `actcache warmup` with the same arguments would compute and write; nothing is computed."""
    prompts = given.read()
    plan = unified_cache(model, **options).plan(prompts)

    from actcache.cli.output import count, duration, plain, print_json, size

    if as_json:
        print_json({**plain(plan), "over_limit": plan.over_limit})
        return
    click.echo(f"stored already   {count(plan.cached, 'prompt')}")
    click.echo(f"to extract       {count(plan.missing, 'prompt')}, {count(plan.tokens, 'token')}")
    free = "" if plan.bytes_free is None else f" ({size(plan.bytes_free)} free)"
    click.echo(f"to write         {size(plan.bytes_to_write)}{free}")
    if plan.over_limit:
        click.echo(
            f"the limit        {size(plan.bytes_limit)}: not all of this stays. Raise the limit "
            "(ACTCACHE_MAX_GB), or store fewer prompts, sites or layers."
        )
    click.echo(f"time, roughly    {duration(plan.seconds) if plan.seconds >= 1 else 'less than a second'}")
    if plan.missing and plan.batching:
        click.echo(f"not mixed        {plan.batching}")
