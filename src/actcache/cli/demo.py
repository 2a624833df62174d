"""`actcache demo`: the main job on the shipped model."""

from __future__ import annotations

import os

import click

from actcache.cli.options import debug_option, json_option


@click.command("demo")
@click.option("--keep", is_flag=True, help="Keep the demo's cache folder, to look around in it.")
@click.option("--model-path", is_flag=True, help="Only print the folder of the shipped model, to use it as MODEL.")
@json_option
@debug_option
def command(keep: bool, model_path: bool, as_json: bool) -> None:
    """Run the main job on the model that is part of the package.

    Extracts 240 prompts, finds them again, reads them back, trains a probe on each layer and reads a fact out of the
    layers. Uses a cache folder of its own, which it names and removes.
    """
    from actcache.cli.output import print_json

    if model_path:
        from actcache.demo import model_path as shipped

        if as_json:
            print_json({"model": shipped()})
        else:
            click.echo(shipped())
        return
    # transformers has a bar for loading weights, which takes no time here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from actcache.demo.run import run

    found = run(keep=keep, quiet=as_json)
    if as_json:
        print_json(found)
