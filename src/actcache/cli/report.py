"""`actcache report`: one page of what a store or a dataset holds."""

from __future__ import annotations

import click

from actcache.cli.files import file_to_write, replaced
from actcache.cli.options import dataset_revision_option, debug_option, json_option, space_option, store_option


@click.command("report")
@click.argument("name", metavar="[MODEL|REPO]", required=False)
@click.option("--out", required=True, metavar="FILE", help="The HTML file to write.")
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Show the logit lens of MODEL, or of the dataset's model, at this prompt; repeatable.",
)
@click.option("--model", metavar="NAME", help="The model of a dataset, for --prompt. [default: as it says]")
@dataset_revision_option
@space_option
@store_option
@json_option
@debug_option
def command(
    name: str | None,
    out: str,
    texts: tuple[str, ...],
    model: str | None,
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
    from actcache.cli.lookup import store_to_read, stored_name, variants_of
    from actcache.cli.output import console, print_json, size
    from actcache.cli.prompts import read_prompt
    from actcache.errors import DatasetAccessError, DatasetNotFoundError, NotCachedError, OptionError
    from actcache.report.of_dataset import dataset_contents
    from actcache.report.of_store import store_contents
    from actcache.report.page import page, summary_of
    from actcache.share.location import local_folder

    path = file_to_write("--out", out)
    opened = store_to_read(store)
    prompts = [read_prompt(text) for text in texts]
    missing: NotCachedError | None = None
    if name is not None:
        try:
            stored_name(opened, name)
        except NotCachedError as error:
            if space:
                raise
            missing = error
    elif texts:
        raise click.UsageError("--prompt needs the MODEL whose lens it is.")
    if model is not None and (missing is None or not texts):
        raise click.UsageError("--model is for --prompt with a dataset: a store knows the models of what it holds.")
    if name is not None and missing is not None:
        try:
            local_folder(name)
        except OptionError as error:
            raise NotCachedError(f"{missing} As the name of a dataset {error}") from None
        try:
            contents = dataset_contents(name, revision=revision, prompts=prompts, model=model)
        except (DatasetNotFoundError, DatasetAccessError) as error:
            raise NotCachedError(f"{missing} As a dataset it cannot be read: {error}") from None
    elif revision is not None:
        raise click.UsageError("--revision is of a dataset: a store has --space.")
    else:
        contents = store_contents(opened, variants_of(opened, name, space), model=name, prompts=prompts)
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
