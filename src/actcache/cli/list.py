"""`actcache list`: the prompts that are stored for a model."""

from __future__ import annotations

import shutil
import sys

import click

from actcache.cli.options import debug_option, json_option, space_option, store_option


@click.command("list")
@click.argument("model")
@space_option
@store_option
@json_option
@debug_option
def command(model: str, space: str | None, store: str | None, as_json: bool) -> None:
    """List the prompts that are stored for MODEL, each with its number of tokens.

    Before token ids (those of generated sequences for one) stands what they say, where the model's tokenizer is on this
    machine.

    A model that is stored in several variants (revision, dtype, edits, ...) has a list for each.
    """
    from actcache.cli.lookup import in_words, readable, store_to_read, variants_of
    from actcache.cli.output import count, one_line, print_json, size

    opened = store_to_read(store)
    variants = variants_of(opened, model, space)
    if as_json:
        print_json(
            [
                {
                    "space": v.space,
                    "variant": name,
                    "revision": v.revision,
                    "dtype": v.dtype,
                    "pulled": v.pulled,
                    "num_prompts": v.num_prompts,
                    "size_bytes": v.size_bytes,
                    "prompts": readable(opened.prompts(v.space)),
                }
                for v, name in variants
            ]
        )
        return
    width = shutil.get_terminal_size().columns - 7 if sys.stdout.isatty() else None
    for variant, name in variants:
        if len(variants) > 1:
            revision = "" if variant.revision is None else f", revision {variant.revision}"
            held = f"{count(variant.num_prompts, 'prompt')}, {size(variant.size_bytes)}"
            click.echo(f"# {name}{revision}, space {variant.space}: {held}")
        for prompt in readable(opened.prompts(variant.space)):
            text = in_words(prompt["prompt"], variant.model_name)
            tokens = "?" if prompt["num_tokens"] is None else prompt["num_tokens"]
            click.echo(f"{tokens:>5}  {one_line(text, width)}")
