"""Options of runs on many workers. They carry the names of the Python parameters."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--address", metavar="HOST:PORT", help="A Ray cluster. [default: $RAY_ADDRESS, or a new one here]"),
    click.option("--num-workers", type=click.IntRange(min=1), metavar="N", help="How many. [default: as many as fit]"),
    click.option("--num-gpus-per-worker", type=click.FloatRange(min=0), metavar="N", help="GPUs, or a share of one."),
    click.option("--num-cpus-per-worker", type=click.FloatRange(min=0), metavar="N", help="Processors. [default: 1]"),
    click.option("--unit-prompts", type=click.IntRange(min=1), metavar="N", help="Prompts in a unit, about."),
    click.option(
        "--max-failed",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Failed prompts that end a run. [default: 0.1]",
    ),
    click.option("--failed-file", type=click.Path(dir_okay=False), help="Where to write all failed prompts, as JSONL."),
)
_NAMES = (
    "address", "num_workers", "num_gpus_per_worker", "num_cpus_per_worker", "unit_prompts", "max_failed", "failed_file",
)  # fmt: skip


def worker_options(command: F) -> F:
    """Add --engine, and what belongs to it, to a verb, which gets `engine` and a dict of what else was given."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, engine: str | None, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _NAMES}
        workers = {name: value for name, value in given.items() if value is not None}
        if workers and engine is None:
            raise click.UsageError(f"--{next(iter(workers)).replace('_', '-')} belongs to --engine ray, local or rank.")
        return command(*arguments, engine=engine, workers=workers, **options)

    made: Any = wrapped
    for option in reversed(_OPTIONS):
        made = option(made)
    engines = click.Choice(["ray", "local", "rank"])
    about = "Share the work: Ray, processes here, or the ranks of a launcher."
    return cast(F, click.option("--engine", type=engines, help=about)(made))


def distributed(model: str, files: list[str], workers: dict[str, Any], options: dict[str, Any]) -> Any:
    """Run `ac.warmup_distributed` with what `model_options` and `worker_options` gave."""
    from actcache.distributed.warmup import warmup_distributed

    given = {**options, **workers}
    given["compute_perplexity"], given["cache_pooled"] = given.pop("perplexity"), not given.pop("raw")
    known_as = given.pop("known_as")
    given["trust_names"] = given["trust_names"] if known_as is None else known_as
    # Ray says there what becomes of machines, and who asks for JSON wants nothing else.
    with contextlib.redirect_stdout(sys.stderr):
        return warmup_distributed(files, model, **given)
