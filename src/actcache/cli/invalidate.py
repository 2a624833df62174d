"""`actcache invalidate`: forget stored prompts, so that they are computed again."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, space_option, store_option
from actcache.cli.prompts import Given, prompt_arguments


@click.command("invalidate")
@click.argument("model")
@prompt_arguments
@click.option("--all-prompts", is_flag=True, help="All prompts of the variant.")
@space_option
@click.option("--revision", metavar="NAME", help="The variant of this revision of the model.")
@click.option("--dtype", metavar="NAME", help="The variant that was computed in this dtype.")
@store_option
@json_option
@debug_option
def command(
    model: str,
    given: Given,
    all_prompts: bool,
    space: str | None,
    revision: str | None,
    dtype: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Forget what is stored for the prompts in FILES of one variant of MODEL, so that it is computed again.

    Of each prompt everything goes, all sites and layers. Where MODEL is stored in several variants (revision, dtype,
    edits, ...), --space, --revision or --dtype chooses one. The room on the disk is free when segments are merged;
    `clear` deletes whole variants, and frees it at once.
    """
    from actcache.cli.lookup import one_space, store_to_read, stored_name
    from actcache.cli.output import count, print_json
    from actcache.store.default import one_variant

    # As an unset variable of the shell is given, which would choose whatever there is.
    if space == "":
        raise click.UsageError("--space is empty: give the beginning of a space id (see `actcache info`).")
    if all_prompts and given:
        raise click.UsageError("--all-prompts goes without FILES and --prompt.")
    if not all_prompts and not given:
        raise click.UsageError("no prompts: name a file, give --prompt TEXT, or say --all-prompts.")
    opened = store_to_read(store)
    prompts = None if all_prompts else given.read()
    if space is not None:
        space = one_space(opened, model, space)
    variant = one_variant(opened, stored_name(opened, model), revision=revision, dtype=dtype, space=space)
    forgotten = opened.invalidate(variant.space, prompts)
    if as_json:
        print_json({"forgotten": forgotten, "space": variant.space})
        return
    asked = "" if prompts is None else f" of {len(prompts):,}"
    click.echo(f"{count(forgotten, 'prompt')}{asked} forgotten." if forgotten else "none of them is stored.")
