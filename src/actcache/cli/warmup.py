"""`actcache warmup`: extract and store what is not yet stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from actcache.cli.options import debug_option, json_option, model_options, unified_cache
from actcache.cli.prompts import Given, described_prompt_arguments
from actcache.cli.workers import distributed, worker_options
from actcache.errors import PartialWarmupError


@click.command("warmup")
@click.argument("model")
@described_prompt_arguments
@click.option(
    "--max-retries",
    type=click.IntRange(min=0),
    metavar="N",
    help="How often a batch that fails is tried again. [default: 3 with --remote, else 0]",
)
@worker_options
@model_options
@json_option
@debug_option
def command(
    model: str,
    given: Given,
    as_json: bool,
    max_retries: int | None,
    engine: str | None,
    workers: dict[str, Any],
    **options: Any,
) -> None:
    """Extract activations of MODEL for the prompts in FILES and store those that are not stored yet.

    MODEL is a folder made by save_pretrained or an id on the Hugging Face Hub. FILES are text (a prompt a line), JSONL,
    CSV or Parquet, folders of these, or datasets of the Hub (hf://datasets/org/name); - is standard input. With
    --engine many processes or machines share the work, and the input is never in memory.
    """
    if engine is not None:
        if given.texts:
            raise click.UsageError(f"--prompt is not for --engine {engine}, whose workers read files of prompts.")
        if not given.files or "-" in given.files:
            raise click.UsageError(
                f"--engine {engine} needs files, folders or hf://datasets/org/name, which workers read."
            )
        work = {
            "engine": engine, "column": given.column, "label_column": given.label_column,
            "metadata_columns": list(given.metadata_columns), "file_format": given.file_format,
            "max_retries": max_retries, **workers,
        }  # fmt: skip
        _report(lambda: distributed(model, list(given.files), work, options), as_json, options["perplexity"])
        return
    prompts, labels, metadata = given.described()
    cache = unified_cache(model, **options)
    _report(
        lambda: cache.warmup(prompts, max_retries=max_retries, labels=labels, metadata=metadata),
        as_json,
        options["perplexity"],
    )


def _report(run: Callable[[], Any], as_json: bool, perplexity: bool) -> None:
    try:
        stats = run()
    except PartialWarmupError as error:
        # All others are stored: say so before the failure is reported.
        _print(error.stats, as_json, error.count, error.failed)
        raise
    _print(stats, as_json)
    if not as_json and not perplexity and stats.activations_extracted:
        # The same settings in Python would load the model again for it.
        click.echo(
            "perplexity is not stored (--compute-perplexity); in Python compute_perplexity=False does without it."
        )


def _print(stats: Any, as_json: bool, count_failed: int = 0, failed: Sequence[tuple[int, str]] = ()) -> None:
    from actcache.cli.output import count, duration, plain, print_json, size

    if as_json:
        rates = {"cache_hit_rate": stats.cache_hit_rate, "tokens_per_second": stats.tokens_per_second}
        named = [{"prompt": place, "reason": reason} for place, reason in failed]
        print_json({**plain(stats), **rates, "prompts_failed": count_failed, "failed": named})
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
