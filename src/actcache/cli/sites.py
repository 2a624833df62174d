"""`actcache sites`: the places of a model that can be read."""

from __future__ import annotations

import click

from actcache.cli.options import debug_option, json_option, revision_option, trust_remote_code_option


@click.command("sites")
@click.argument("model")
@revision_option
@trust_remote_code_option
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
    rows = table("site", "blocks", "shape", "read at")
    for site, blocks, shape, where in found.rows():
        rows.add_row(site, blocks, shape.replace("[", r"\["), where)
    console().print(rows)
