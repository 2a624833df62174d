"""`actcache clear`: delete what is stored."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option, space_option, store_option

if TYPE_CHECKING:
    from actcache.store.spaces import SpaceInfo

_CHOOSE = "choose one with --space, or say --all-variants."


@click.command("clear")
@click.argument("model", required=False)
@space_option
@click.option("--all-variants", is_flag=True, help="All variants of MODEL: revisions, dtypes, edits, ...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@store_option
@json_option
@debug_option
def command(
    model: str | None, space: str | None, all_variants: bool, yes: bool, store: str | None, as_json: bool
) -> None:
    """Delete what is stored for MODEL, or everything.

    Says what it will delete, variant by variant, and asks first. Where MODEL is stored in several variants (revision,
    dtype, edits, ...), --yes alone deletes none of them: --space chooses one, --all-variants takes them all. Files that
    actcache did not write are never touched.
    """
    from actcache.cli.lookup import store_to_read, variants_of
    from actcache.cli.output import count, print_json
    from actcache.errors import NotCachedError
    from actcache.store.nearby import where_nothing_is

    # As an unset variable of the shell is given, which would choose whatever there is.
    if space == "":
        raise click.UsageError("--space is empty: give the beginning of a space id (see `actcache info`).")
    everything = model is None and space is None
    if all_variants and (everything or space is not None):
        raise click.UsageError("--all-variants goes with MODEL, and without --space.")
    opened = store_to_read(store)
    variants = variants_of(opened, model, space)
    unclear = len(variants) > 1 and not everything and not all_variants
    if variants and (unclear or not yes):
        _show(str(opened.location), variants)
        if yes:
            raise click.UsageError(f"these are {len(variants)} variants: {_CHOOSE}")
        if not sys.stdin.isatty():
            also = f" These are {len(variants)} variants: {_CHOOSE}" if unclear else ""
            raise click.UsageError(f"nobody to ask here: give --yes to delete this.{also}")
        asked = "Delete this?" if len(variants) == 1 else f"Delete all {len(variants)}?"
        if not click.confirm(asked, err=True):
            raise click.ClickException("nothing was deleted.")
    deleted = 0
    if everything:
        deleted = opened.clear()
    else:
        for variant, _ in variants:
            # Somebody else may have deleted it meanwhile; what has come meanwhile was not agreed to.
            with contextlib.suppress(NotCachedError):
                deleted += opened.clear(variant.space)
    if as_json:
        print_json({"deleted": deleted})
    else:
        click.echo(
            f"{count(deleted, 'prompt')} deleted." if deleted else f"nothing is stored{where_nothing_is(opened)}."
        )


def _show(location: str, variants: Sequence[tuple[SpaceInfo, str]]) -> None:
    from actcache.cli.output import count, size

    click.echo(f"in {location}:", err=True)
    for variant, name in variants:
        held = f"{count(variant.num_prompts, 'prompt')}, {size(variant.size_bytes)}"
        of = f"  space {variant.space[:8]}" if len(variants) > 1 else ""
        click.echo(f"  {variant.model_name} ({name}){of}  {held}", err=True)
