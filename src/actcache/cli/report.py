"""`actcache report`: one page of what a store or a dataset holds."""

from __future__ import annotations

import click

from actcache.cli.files import file_to_write, replaced
from actcache.cli.options import debug_option, json_option, space_option, store_option


@click.command("report")
@click.argument("name", metavar="[MODEL|REPO]", required=False)
@click.option("--out", required=True, metavar="FILE", help="The HTML file to write.")
@click.option(
    "--prompt", "texts", multiple=True, metavar="TEXT", help="Show the logit lens of MODEL at this prompt; repeatable."
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a dataset.")
@space_option
@store_option
@json_option
@debug_option
def command(
    name: str | None,
    out: str,
    texts: tuple[str, ...],
    revision: str | None,
    space: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Write one HTML page about the store, about MODEL in it, or about the dataset REPO.

    It has sizes and norms by layer, what storing changed, lengths of prompts, and which were read last. The page needs
    nothing else: no network, no other file. REPO is org/name on the Hub, or a folder, written ./folder; a model that is
    stored under that name comes first.
    """
    from actcache.cli.lookup import stored_name, variants_of
    from actcache.cli.output import console, print_json, size
    from actcache.cli.prompts import read_prompt
    from actcache.errors import NotCachedError
    from actcache.report.of_dataset import dataset_contents
    from actcache.report.of_store import store_contents
    from actcache.report.page import page, summary_of
    from actcache.store.default import store_at

    path = file_to_write("--out", out)
    opened = store_at(store)
    stored = None
    if name is not None:
        try:
            stored = stored_name(opened, name)
        except NotCachedError:
            if texts or space:
                raise
            stored = None
    elif texts:
        raise click.UsageError("--prompt needs the MODEL whose lens it is.")
    if name is not None and stored is None:
        contents = dataset_contents(name, revision=revision)
    elif revision is not None:
        raise click.UsageError("--revision is of a dataset: a store has --space.")
    else:
        variants = variants_of(opened, name, space)
        contents = store_contents(opened, variants, model=name, prompts=[read_prompt(text) for text in texts])
    made = page(contents).encode()
    with replaced("--out", path) as temporary:
        temporary.write_bytes(made)
    if as_json:
        print_json({"written": str(path), "bytes": len(made), "contents": contents_in_json(contents)})
        return
    console().print(f"wrote {path}: {summary_of(contents)}, {size(len(made))}", markup=False, soft_wrap=True)


def contents_in_json(contents: object) -> object:
    """What the page says, without the pages of lenses that are inside it."""
    from actcache.cli.output import plain

    said = plain(contents)
    said["lenses"] = [title for title, _ in said["lenses"]]
    return said
