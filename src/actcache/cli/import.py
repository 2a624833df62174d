"""`actcache import`: bring in activations from elsewhere."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, prompts_column_option, store_option


@click.command("import")
@click.argument("path", type=click.Path(exists=True))
@click.option("--model", metavar="NAME", help="Whose activations they are. [default: as the folder says]")
@click.option(
    "--prompts",
    "files",
    multiple=True,
    type=click.Path(exists=True, allow_dash=True, dir_okay=False),
    metavar="FILE",
    help="Their prompts, in order; for a folder texts that it does not hold. Text, JSONL or CSV.",
)
@prompts_column_option
@click.option("--site", metavar="NAME", help="What a .npy file holds, such as resid_post.5.")
@click.option("--pooling", metavar="NAME", help="How each vector was made of its prompt, where it is one per prompt.")
@store_option
@json_option
@debug_option
def command(
    path: str,
    model: str | None,
    files: tuple[str, ...],
    column: str | None,
    site: str | None,
    pooling: str | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Bring in the activations at PATH: a cache folder of lmprobe, or a .npy or .safetensors file.

    Arrays have one row per prompt [N, D] with --pooling, else one per token, padded [N, S, D]. Which rows are tokens a
    tensor named mask or attention_mask [N, S] says beside them, 1 for a token and 0 for padding: a .safetensors file
    holds one. Without it, as in a .npy file, all rows must be tokens: every one of --prompts is a list of S token ids,
    or there is only one.

    All that is known of their model is a name, so they are marked, and used only where --trust-names asks for them.
    """
    from pathlib import Path

    from actcache.cli.output import count, print_json
    from actcache.cli.prompts import read_prompts
    from actcache.errors import OptionError
    from actcache.store.importing import import_arrays
    from actcache.store.lmprobe import import_lmprobe
    from actcache.store.spaces import ROOT

    source = Path(path)
    prompts = read_prompts(files, (), column=column) if files else None
    if source.is_dir() and (source / ROOT).is_dir():
        raise OptionError(f"{path} is a store of actcache: use it as it is, with --store {path}.")
    if source.is_dir():
        report = import_lmprobe(source, model=model, prompts=prompts, store=store)
    else:
        if model is None or prompts is None:
            raise click.UsageError(
                f"{source.name} does not say whose activations it holds: give --model and --prompts."
            )
        report = import_arrays(source, model, prompts, pooling=pooling, site=site, store=store)
    if as_json:
        print_json(
            {
                "models": report.models,
                "spaces": report.spaces,
                "skipped": [{"what": what, "reason": reason} for what, reason in report.skipped],
            }
        )
        return
    for name, number in report.models.items():
        click.echo(f"{name}: {count(number, 'prompt')} imported.")
    if not report.models:
        click.echo("nothing was imported.")
    for what, reason in report.skipped:
        click.echo(f"skipped {what}: {reason}", err=True)
