"""`actcache info`: what the store holds."""

from __future__ import annotations

from pathlib import Path

import click

from actcache.cli.options import debug_option, json_option, store_option


@click.command("info")
@click.argument("model", required=False)
@store_option
@json_option
@debug_option
def command(model: str | None, store: str | None, as_json: bool) -> None:
    """Report on the store: where it is, its models, prompts and sizes; with MODEL, on that model alone."""
    from actcache.cli.lookup import store_to_read, stored_name
    from actcache.cli.output import console, print_json, size, table
    from actcache.store.default import only_model
    from actcache.store.nearby import where_nothing_is

    opened = store_to_read(store)
    info = opened.info() if model is None else only_model(opened.info(), stored_name(opened, model))
    if as_json:
        print_json(info)
        return
    out = console()
    out.print(f"{info.cache_dir}  {size(info.total_size_bytes)}", soft_wrap=True, markup=False)
    if not info.models:
        out.print(f"nothing is stored{where_nothing_is(opened)}.", soft_wrap=True, markup=False)
        return
    numbers = ("prompts", "layers", "size")
    rows = table("model", "revision", "variant", "space", *numbers, "stored as", right=numbers)
    for entry in info.models:
        rows.add_row(
            _short(entry.model_name),
            (entry.revision or "")[:12],
            entry.variant,
            entry.model_hash[:8],
            f"{entry.num_prompts:,}",
            str(entry.num_layers),
            size(entry.size_bytes),
            ", ".join(entry.stored_dtypes),
        )
    out.print(rows)


def _short(name: str) -> str:
    """A path below the home folder with ~, which keeps long names in one line."""
    try:
        return f"~/{Path(name).relative_to(Path.home())}" if Path(name).is_absolute() else name
    except ValueError:
        return name
