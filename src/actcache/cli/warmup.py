"""`actcache warmup`: extract and store what is not yet stored."""

from __future__ import annotations

from typing import Any

import click

from actcache.cli.options import debug_option, json_option, model_options, unified_cache
from actcache.cli.prompts import prompt_arguments, read_labelled
from actcache.errors import PartialWarmupError


@click.command("warmup")
@click.argument("model")
@prompt_arguments
@click.option(
    "--label-column",
    metavar="NAME",
    help="Column or field that holds the label of each prompt, to be stored with it.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(min=0),
    metavar="N",
    help="How often a batch that fails is tried again. [default: 3 with --remote, else 0]",
)
@model_options
@json_option
@debug_option
def command(
    model: str,
    files: tuple[str, ...],
    texts: tuple[str, ...],
    column: str | None,
    label_column: str | None,
    file_format: str | None,
    as_json: bool,
    max_retries: int | None,
    **options: Any,
) -> None:
    """Extract activations of MODEL for the prompts in FILES and store those that are not stored yet.

    MODEL is a folder made by save_pretrained or an id on the Hugging Face Hub. FILES are text (a prompt a line), JSONL
    or CSV; - is standard input.
    """
    prompts, labels = read_labelled(files, texts, column=column, label_column=label_column, file_format=file_format)
    cache = unified_cache(model, **options)
    try:
        stats = cache.warmup(prompts, max_retries=max_retries, labels=labels)
    except PartialWarmupError as error:
        # All others are stored: say so before the failure is reported.
        _print(error.stats, as_json)
        raise
    except KeyboardInterrupt:
        raise click.ClickException(
            "stopped. What was finished is stored: the same command goes on from there."
        ) from None
    _print(stats, as_json)


def _print(stats: Any, as_json: bool) -> None:
    from actcache.cli.output import count, duration, plain, print_json, size

    if as_json:
        rates = {"cache_hit_rate": stats.cache_hit_rate, "tokens_per_second": stats.tokens_per_second}
        print_json({**plain(stats), **rates})
        return
    # Of a few prompts it would say how long it takes to load the model.
    speed = f", {stats.tokens_per_second:,.0f} tokens per second" if stats.tokens_extracted >= 1000 else ""
    click.echo(
        f"{count(stats.total_prompts, 'prompt')}: {stats.activations_cached:,} were stored, "
        f"{stats.activations_extracted:,} extracted in {duration(stats.elapsed_seconds)}{speed}; "
        f"{size(stats.bytes_written)} written."
    )
    if stats.prompts_evicted:
        click.echo(
            f"{count(stats.prompts_evicted, 'prompt')} did not stay: the limit of the store has no room for all."
        )
