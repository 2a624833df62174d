"""`actcache verify`: is everything that is stored intact?"""

from __future__ import annotations

from pathlib import Path

import click

from actcache.cli.options import debug_option, json_option, store_option


@click.command("verify")
@click.option("--repair", is_flag=True, help="Drop what is damaged, keep the rest, and build the index again.")
@store_option
@json_option
@debug_option
def command(repair: bool, store: str | None, as_json: bool) -> int:
    """Check every checksum of the store; with --repair, drop what is damaged.

    What was dropped is computed again when it is asked for. The exit status is 1 when something is wrong and was not
    repaired.
    """
    from actcache.cli.output import plain, print_json
    from actcache.errors import MissingFileError
    from actcache.store.default import store_at
    from actcache.store.locations import named_place
    from actcache.store.verification import in_words

    # A name that is misspelled must not be told to be intact.
    place = None if store is None else named_place(store, "--store")
    if isinstance(place, Path) and not place.is_dir():
        raise MissingFileError(f"--store {store}: there is no such folder, and so no store to look at.")
    report = store_at(store).verify(repair)
    if as_json:
        print_json({**plain(report), "repaired": report.repaired, "ok": report.ok})
    else:
        for line in in_words(report):
            click.echo(line)
    return 0 if report.ok else 1
