"""`actcache evict`: bring the store below a size."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, store_option
from actcache.errors import OptionError


@click.command("evict")
@click.option(
    "--limit-gb",
    type=float,
    metavar="N",
    help="Size to reach, in GB (2**30 bytes). [default: of the default store $ACTCACHE_MAX_GB]",
)
@store_option
@json_option
@debug_option
def command(limit_gb: float | None, store: str | None, as_json: bool) -> None:
    """Bring the store below its limit, or below --limit-gb.

    What was read longest ago goes first. Whoever reads from the store at this moment can go on reading.
    """
    from actcache.cli.lookup import store_to_read
    from actcache.cli.output import count, print_json, size

    opened = store_to_read(store)
    if limit_gb is None and not opened.limit.value:
        raise OptionError("there is no limit to keep to: give --limit-gb (ACTCACHE_MAX_GB is the default store's).")
    report = opened.evict(limit_gb)
    if as_json:
        print_json(report)
        return
    click.echo(f"{count(report.prompts, 'prompt')} evicted, {size(report.bytes_freed)} freed.")
    click.echo(f"{size(report.bytes_kept)} kept, the limit is {size(report.limit_bytes)}.")
