"""`actcache show`: what is stored for one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from actcache.cli.options import debug_option, json_option, space_option, store_option

if TYPE_CHECKING:
    from actcache.cli.results.store import ShownSite
    from actcache.store.prompts import PromptTable
    from actcache.store.spaces import SpaceInfo
    from actcache.store.store import Store


@click.command("show")
@click.argument("model")
@click.argument("prompt")
@space_option
@store_option
@json_option
@debug_option
def command(model: str, prompt: str, space: str | None, store: str | None, as_json: bool) -> None:
    """Show what is stored for PROMPT of MODEL: text, tokens, sites, layers, dtypes and the length of the vectors,
    and what was said of it: its label and metadata.

    PROMPT is text, or JSON: a list of token ids, or of chat messages. Of several variants the model's own is shown;
    one that was computed with edits only when it is chosen with --space.
    """
    from actcache.cli.lookup import readable, store_to_read, stored_name, token_pieces, variants_of
    from actcache.cli.output import console, one_line, print_json, table
    from actcache.errors import AmbiguousVariantError, NotCachedError
    from actcache.store.given import KINDS, read
    from actcache.store.site_names import site_order
    from actcache.store.variants import by_preference

    opened = store_to_read(store)
    name = stored_name(opened, model)
    variants = {v.space: (v, said) for v, said in variants_of(opened, model, space)}
    in_order = [variants[v.space] for v in by_preference([v for v, _ in variants.values()])]
    holding = [(v, said, found) for v, said in in_order if (found := _find(opened, v.space, prompt)) is not None]
    if not holding:
        raise NotCachedError(f"{one_line(prompt, 60)!r} is not stored for {name!r} (`actcache list` shows what is).")
    variant, said, stored_prompt = holding[0]
    if variant.edits and space is None:
        listed = "; ".join(f"{v.space} ({said})" for v, said, _ in holding)
        raise AmbiguousVariantError(
            f"{one_line(prompt, 60)!r} is stored only as it was computed with edits: choose one with --space: {listed}."
        )
    stored = sorted(_stored(opened, variant.space, stored_prompt), key=lambda s: (s["layout"], site_order(s["site"])))
    perplexity = _perplexity(opened, variant.space, stored_prompt)
    label, metadata = (read(opened, variant.space, kind, stored_prompt)[0] for kind in KINDS)
    (as_given,) = readable(stored_prompt)
    tokens = stored_prompt.tokens(0)
    known = as_given["num_tokens"] is not None
    pieces = token_pieces(name, tokens.tolist()) if known else None
    elsewhere = _elsewhere(opened, variant, stored_prompt)
    if as_json:
        others = [
            {"space": v.space, "variant": said, "revision": v.revision, "dtype": v.dtype} for v, said, _ in holding
        ]
        print_json(
            {
                "model_name": name,
                "variant": said,
                "space": variant.space,
                "prompt": as_given["prompt"],
                "token_ids": tokens if known else None,
                "tokens": pieces,
                "sites": stored,
                "perplexity": perplexity,
                "label": label,
                "metadata": metadata,
                "pulled": variant.pulled,
                "not_here": elsewhere,
                "variants": others,
            }
        )
        return
    out = console()
    given = as_given["prompt"]
    out.print(one_line(given if isinstance(given, str) else str(given)), markup=False, soft_wrap=True)
    shown = " ".join(map(str, tokens.tolist())) if pieces is None else "|".join(one_line(p) for p in pieces)
    out.print(f"{len(tokens)} tokens: {shown}" if known else "tokens: unknown", markup=False, soft_wrap=True)
    rows = table("site", "stored", "dtype", "vectors", "width", "mean norm", right=("vectors", "width", "mean norm"))
    for entry in stored:
        layout = "every token" if entry["layout"] == "tokens" else entry["layout"]
        numbers = str(entry["vectors"]), str(entry["width"]), f"{entry['norm']:.4g}"
        rows.add_row(entry["site"], layout, entry["dtype"], *numbers)
    out.print(rows)
    if elsewhere:
        out.print(
            f"not here yet, and fetched from {variant.pulled} when it is read: {', '.join(elsewhere)}",
            markup=False,
            soft_wrap=True,
        )
    if perplexity is not None:
        out.print("perplexity {:.4g}, of single tokens {:.4g} to {:.4g}".format(*perplexity))
    for what, said_of_it in (("label", label), ("metadata", metadata)):
        if said_of_it is not None:
            out.print(f"{what} {json.dumps(said_of_it, ensure_ascii=False)}", markup=False, soft_wrap=True)
    if len(holding) > 1 or variant.pulled:
        out.print(f"of the variant {said}, space {variant.space}", markup=False)
    for other, other_said, _ in holding[1:]:
        out.print(f"also stored: {other_said}, space {other.space}", markup=False)


def _find(store: Store, space: str, prompt: str) -> PromptTable | None:
    """The stored prompt that `prompt` names: its text, or the JSON of its token ids or messages."""
    found = store.find_prompt(space, prompt)
    if found is None and prompt.lstrip().startswith("["):
        try:
            given = json.loads(prompt)
        except ValueError:
            return None
        ids = given and all(type(i) is int for i in given)
        found = store.find_prompt(space, given) if ids or (given and all(isinstance(m, dict) for m in given)) else None
    return found


def _stored(store: Store, space: str, prompt: PromptTable) -> Iterator[ShownSite]:
    import numpy as np

    from actcache.store.records import is_result

    for layout, stored in store.sites_of(space, prompt).items():
        sites = [site for site in stored if not is_result(site)]
        if not sites:
            continue
        placement = store.locate(space, table=prompt, sites=sites, layout=layout)
        if not placement.found[0]:
            continue
        for site, rows, dtype in zip(sites, placement.rows(0), placement.stored_as(0), strict=True):
            values = rows.reshape(len(rows), -1).astype(np.float64)
            yield {
                "site": site,
                "layout": layout,
                "dtype": dtype,
                "vectors": len(rows),
                "width": values.shape[1],
                "norm": float(np.linalg.norm(values, axis=1).mean()),
            }


def _elsewhere(store: Store, variant: SpaceInfo, prompt: PromptTable) -> list[str]:
    """The sites that a dataset which was pulled has of the prompt, and that were not fetched yet."""
    from actcache.store.pulled import expanded
    from actcache.store.records import PULLED
    from actcache.store.site_names import in_order

    held = {layout: set(sites) for layout, sites in store.sites_of(variant.space, prompt).items()}
    offered = expanded(variant, {PULLED: held.pop(PULLED, set())})
    return in_order({site for layout, sites in offered.items() for site in sites - held.get(layout, set())})


def _perplexity(store: Store, space: str, prompt: PromptTable) -> list[float] | None:
    """Of the prompt: of all its tokens, of the likeliest and of the least likely one; None when it is not stored."""
    from actcache.store.records import DERIVED

    placement = store.locate(space, table=prompt, sites=["perplexity"], layout=DERIVED)
    return [float(value) for value in placement.rows(0)[0][0]] if placement.found[0] else None
