"""`actcache show`: what is stored for one prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option, store_option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from actcache.store.store import Store


@dataclass(frozen=True)
class StoredSite:
    """One site of one prompt as it is stored: `norm` is the mean length of its vectors."""

    site: str
    layout: str
    dtype: str
    vectors: int
    width: int
    norm: float


@click.command("show")
@click.argument("model")
@click.argument("prompt")
@store_option
@json_option
@debug_option
def command(model: str, prompt: str, store: str | None, as_json: bool) -> None:
    """Show what is stored for PROMPT of MODEL: tokens, sites, layers, dtypes and the length of the vectors."""
    from actcache.cli.lookup import stored_name, token_pieces
    from actcache.cli.output import console, one_line, print_json, table
    from actcache.errors import NotCachedError
    from actcache.store.default import store_at

    opened = store_at(store)
    name = stored_name(opened, model)
    info = opened.discover(name, prompt)
    if info is None:
        raise NotCachedError(f"{one_line(prompt, 60)!r} is not stored for {name!r} (`actcache list` shows what is).")
    variant = info.variants[0]
    tokens = _tokens(opened, variant.space, prompt)
    stored = [s for layout, sites in info.sites.items() for s in _stored(opened, variant.space, tokens, layout, sites)]
    pieces = token_pieces(name, tokens.tolist())
    if as_json:
        print_json(
            {
                "model_name": name,
                "prompt": prompt,
                "token_ids": tokens,
                "tokens": pieces,
                "sites": stored,
                "variants": [{"space": v.space, "revision": v.revision, "dtype": v.dtype} for v in info.variants],
            }
        )
        return
    shown = " ".join(map(str, tokens.tolist())) if pieces is None else "|".join(one_line(p) for p in pieces)
    out = console()
    out.print(f"{len(tokens)} tokens: {shown}", markup=False, soft_wrap=True)
    rows = table("site", "stored", "dtype", "vectors", "width", "mean norm", right=("vectors", "width", "mean norm"))
    for entry in sorted(stored, key=_order):
        layout = "every token" if entry.layout == "tokens" else entry.layout
        rows.add_row(entry.site, layout, entry.dtype, str(entry.vectors), str(entry.width), f"{entry.norm:.4g}")
    out.print(rows)
    for other in info.variants[1:]:
        out.print(f"also stored as {other.dtype}, revision {other.revision}, space {other.space}", markup=False)


def _order(entry: StoredSite) -> tuple[str, str]:
    """Sites by name, layers by number."""
    return entry.layout, re.sub(r"\d+", lambda digits: digits[0].zfill(6), entry.site)


def _tokens(store: Store, space: str, prompt: str) -> npt.NDArray[np.int32]:
    prompts = store.prompts(space)
    (number,) = [i for i in range(len(prompts)) if prompts.text_of(i) == prompt][:1]
    return prompts.tokens(number)


def _stored(
    store: Store, space: str, tokens: npt.NDArray[np.int32], layout: str, sites: list[str]
) -> Iterator[StoredSite]:
    import numpy as np

    from actcache.store.prompts import PromptTable

    placement = store.locate(space, table=PromptTable.build([tokens]), sites=sites, layout=layout)
    if not placement.found[0]:
        return
    for site, rows in zip(sites, placement.rows(0), strict=True):
        values = rows.reshape(len(rows), -1).astype(np.float64)
        norm = float(np.linalg.norm(values, axis=1).mean())
        yield StoredSite(site, layout, str(rows.dtype), len(rows), values.shape[1], norm)
