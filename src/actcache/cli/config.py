"""`actcache config`: what is in force, and why."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, store_option


@click.command("config")
@store_option
@json_option
@debug_option
def command(store: str | None, as_json: bool) -> None:
    """Say which settings are in force, and where each comes from."""
    import logging

    from actcache import config
    from actcache.cli.output import console, print_json, size, table
    from actcache.store.default import default_location, store_at

    opened = store_at(store)
    location = config.Setting(opened.location, "--store") if store is not None else default_location()
    settings = {
        "store": location,
        "limit": opened.limit,
        "dtype": opened.dtype,
        "log": config.log_level(),
        "index": config.Setting(opened.index_dir, "default"),
    }
    if opened.is_elsewhere:
        settings["local"] = opened.local_limit
    notes = [] if store is not None or location.source != "ACTCACHE_BACKEND" else [config.overruled_location()]
    notes = list(filter(None, notes))
    if as_json:
        print_json({**settings, "notes": notes})
        return
    level = settings["log"].value
    shown = {
        "store": str(location.value),
        "limit": "none" if opened.limit.value is None else size(opened.limit.value),
        "dtype": opened.dtype.value or "as computed",
        "log": "warnings" if level is None else logging.getLevelName(level).lower(),
        "index": str(opened.index_dir) + (", with what this host has of the store" if opened.is_elsewhere else ""),
        "local": "no limit" if opened.local_limit.value is None else size(opened.local_limit.value),
    }
    variables = {"store": "ACTCACHE_DIR, ACTCACHE_BACKEND", "limit": "ACTCACHE_MAX_GB", "dtype": "ACTCACHE_DTYPE"}
    variables |= {"log": "ACTCACHE_LOG", "local": "ACTCACHE_LOCAL_GB"}
    rows = table("setting", "value", "from", "variable")
    for name, setting in settings.items():
        rows.add_row(name, shown[name], setting.source, variables.get(name, ""))
    console().print(rows)
    for note in notes:
        click.echo(note)
