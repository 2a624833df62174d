"""`actcache pull`: let a dataset answer for its model."""

from __future__ import annotations

import click

from actcache.cli.options import (
    dataset_layers_option,
    dataset_revision_option,
    debug_option,
    json_option,
    prompts_column_option,
    store_option,
    tensors_option,
)


@click.command("pull")
@click.argument("repo")
@tensors_option("all")
@dataset_layers_option
@click.option("--target-prompts", "files", multiple=True, metavar="FILE",
              type=click.Path(exists=True, allow_dash=True, dir_okay=False),
              help="Only these prompts. Text, JSONL or CSV. [default: all]")  # fmt: skip
@prompts_column_option
@click.option("--overwrite", is_flag=True, help="Forget first what was pulled of this dataset before.")
@click.option("--materialize", is_flag=True, help="Fetch all of it now, not when it is read.")
@click.option(
    "--num-workers",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Streams at the same time. [default: auto]",
)
@click.option("--trust-names", is_flag=True, help="Let it answer for any model of the name that it claims.")
@dataset_revision_option
@store_option
@json_option
@debug_option
def command(
    repo: str,
    tensors: tuple[str, ...] | None,
    layers: list[int] | None,
    files: tuple[str, ...],
    column: str | None,
    overwrite: bool,
    materialize: bool,
    num_workers: int,
    trust_names: bool,
    revision: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Let the dataset REPO answer for its model: prompts are registered, vectors fetched when they are read.

    REPO is org/name on the Hub, or a folder, written ./folder. A dataset that this library has pushed answers for the
    very model it was computed with. Of others nothing but a name is known: they answer where --trust-names is given,
    here or where they are used.
    """
    from actcache.cli.output import count, print_json
    from actcache.cli.prompts import read_prompts
    from actcache.share.pull import pull
    from actcache.store.default import store_at

    where = store_at(store)
    space, prompts = pull(
        where,
        repo,
        tensors=tensors,
        layers=layers,
        target_prompts=read_prompts(files, (), column=column) if files else None,
        overwrite=overwrite,
        token=None,
        materialize=materialize,
        num_workers=num_workers,
        show=None,
        trust_names=trust_names,
        revision=revision,
    )
    pulled, said = space.identity["pulled"], space.label["pulled"]
    if as_json:
        print_json(
            {
                "prompts": prompts,
                "model_name": space.model_name,
                "dataset": pulled["dataset"],
                "commit": pulled["commit"],
                "space": space.space,
                "model_space": said["claims"],
                "trusted": trust_names,
            }
        )
        return
    done = "pulled" if materialize else "registered"
    click.echo(
        f"{space.model_name}: {count(prompts, 'prompt')} {done}, of {pulled['dataset']} at {pulled['commit'][:12]}."
    )
    if said["claims"] is None and not trust_names:
        click.echo("only the model's name is known: it answers where --trust-names is given.", err=True)
