"""`actcache sites`: the places of a model that can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option

if TYPE_CHECKING:
    from actcache.model.sites import SiteInfo


@click.command("sites")
@click.argument("model")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@json_option
@debug_option
def command(model: str, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """List the sites of MODEL: name, shape, and the module that each is read at.

    Shapes: B prompts, S positions, D hidden size, V vocabulary. A site that every block has is shown once, for block
    0; --json lists each.
    """
    from actcache.cli.output import console, print_json, table
    from actcache.model.loading import open_source
    from actcache.model.options import LoadOptions
    from actcache.model.sites import list_sites

    options = LoadOptions(device="cpu", revision=revision, trust_remote_code=trust_remote_code)
    source = open_source(model, options)
    found = list_sites(source.model())
    if as_json:
        print_json([{"site": str(i.site), "shape": i.shape, "path": i.path, "side": i.side} for i in found])
        return
    families: dict[tuple[str | None, str], list[SiteInfo]] = {}
    for info in found:
        families.setdefault((info.site.stack, info.site.name), []).append(info)
    rows = table("site", "blocks", "shape", "read at")
    for members in families.values():
        first = members[0]
        blocks = (
            "" if first.site.layer is None else _ranges([i.site.layer for i in members if i.site.layer is not None])
        )
        rows.add_row(
            str(first.site), blocks, first.shape.replace("[", r"\["), f"{first.side} of {first.path or 'the model'}"
        )
    console().print(rows)


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
