"""`actcache verify`: is everything that is stored intact?"""

from __future__ import annotations

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
    from actcache.cli.lookup import store_to_read
    from actcache.cli.output import plain, print_json
    from actcache.store.nearby import where_nothing_is
    from actcache.store.verification import in_words

    opened = store_to_read(store)
    report = opened.verify(repair)
    if as_json:
        print_json({**plain(report), "repaired": report.repaired, "ok": report.ok})
    elif opened.is_elsewhere and report.ok and not report.segments:
        # A misspelled URL must not be told to be intact.
        click.echo(f"nothing is stored{where_nothing_is(opened)}.")
    else:
        for line in in_words(report):
            click.echo(line)
    return 0 if report.ok else 1
