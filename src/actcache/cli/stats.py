"""`actcache stats`: what is stored at each site, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option, space_option, store_option

if TYPE_CHECKING:
    from rich.table import Table

    from actcache.store.summaries import SiteSummary, StoredAs


_NUMBERS = ("vectors", "width", "norm", "std", "size")
_UNBOUNDED = 10_000
_ERRORS = ("as", "max error", "rel. error", "cosine")


@click.command("stats")
@click.argument("model", required=False)
@space_option
@store_option
@json_option
@debug_option
def command(model: str | None, space: str | None, store: str | None, as_json: bool) -> None:
    """Say of every site how many vectors are stored and how large they are, and what storing them has changed.

    With MODEL, of that model alone; each variant of a model (revision, dtype, edits, ...) has numbers of its own.
    Errors are those of the dtype in which vectors are stored, measured when they were written.
    """
    from actcache.cli.lookup import store_to_read, variants_of
    from actcache.cli.output import console, count, print_json, size
    from actcache.store.nearby import where_nothing_is

    opened = store_to_read(store)
    variants = variants_of(opened, model, space)
    if as_json:
        print_json(
            [
                {
                    "model_name": v.model_name,
                    "space": v.space,
                    "variant": name,
                    "num_prompts": v.num_prompts,
                    "size_bytes": v.size_bytes,
                    "sites": opened.summaries(v.space),
                }
                for v, name in variants
            ]
        )
        return
    out = console()
    if not variants:
        out.print(f"nothing is stored{where_nothing_is(opened)}.", soft_wrap=True, markup=False)
    for variant, name in variants:
        held = f"{count(variant.num_prompts, 'prompt')}, {size(variant.size_bytes)}"
        out.print(f"{variant.model_name} ({name}): {held}", markup=False, soft_wrap=True)
        summaries = opened.summaries(variant.space)
        for layout in dict.fromkeys(entry.layout for entry in summaries):
            title = "every token" if layout == "tokens" else layout
            entries = [entry for entry in summaries if entry.layout == layout]
            whole = _table(entries, title, _NUMBERS, _ERRORS)
            # A table that is folded into the width of a terminal is not read any more.
            if out.measure(whole, options=out.options.update(max_width=_UNBOUNDED)).maximum <= out.width:
                out.print(whole)
            else:
                out.print(_table(entries, title, _NUMBERS))
                out.print(_table(entries, f"{title}: as stored", (), _ERRORS))


def _table(entries: list[SiteSummary], title: str, numbers: tuple[str, ...], errors: tuple[str, ...] = ()) -> Table:
    """A line for each site, or where there are `errors` for each dtype in which it is stored."""
    from actcache.cli.output import table

    rows = table("site", *numbers, *errors, right=(*numbers, *errors[1:]), title=title)
    for entry in entries:
        first = (entry.site, *(_numbers(entry) if numbers else ()))
        for last in ([_errors(stored) for stored in entry.stored] or [("integers", "", "", "")]) if errors else [()]:
            rows.add_row(*first, *last)
            first = ("",) * len(first)
    return rows


def _numbers(entry: SiteSummary) -> tuple[str, ...]:
    from actcache.cli.output import size

    values = [f"{v:.4g}" if v is not None else "" for v in (entry.mean_norm, entry.std)]
    return f"{entry.rows:,}", str(entry.width), *values, size(entry.size_bytes)


def _errors(stored: StoredAs) -> tuple[str, str, str, str]:
    # Of a cosine near 1 only what is missing to 1 tells anything.
    missing = 1 - stored.cosine
    cosine = "1" if missing <= 0 else f"1 - {missing:.1g}"
    return stored.dtype, f"{stored.error_max:.3g}", f"{stored.error_relative:.2g}", cosine
