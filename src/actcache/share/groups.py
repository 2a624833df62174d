"""Names of stored sites as groups of tensors of a dataset, and which layout of one is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from actcache.derive.results import PERPLEXITY
from actcache.errors import OptionError, did_you_mean
from actcache.model.site_list import ranges
from actcache.share.format import HIDDEN, LOGITS, ROUTER, is_name
from actcache.store.files import log
from actcache.store.records import TOKENS, is_result
from actcache.store.site_names import LAST

_POOLINGS = (TOKENS, LAST, "mean", "first_token", "max", "min")
TENSORS = (HIDDEN, LOGITS, PERPLEXITY, ROUTER)


def by_name(held: dict[str, list[str]]) -> dict[str, dict[str, dict[int | None, str]]]:
    """Activations by the name of their group, then by layout: the stored names by layer."""
    found: dict[str, dict[str, dict[int | None, str]]] = {}
    for layout, sites in held.items():
        for site in sites:
            if is_result(site):
                continue
            group, layer = group_and_layer(site)
            if not is_name(group) or group in (HIDDEN, LOGITS, PERPLEXITY):
                log.warning("%r cannot be the name of tensors of a dataset: it is left out", site)
                continue
            found.setdefault(group, {}).setdefault(layout, {})[layer] = site
    return found


def group_and_layer(site: str) -> tuple[str, int | None]:
    """``attn_out.5`` is of layer 5; a site with more behind it, such as one head, is a group of its own."""
    name, _, layer = site.rpartition(".")
    plain = layer.isascii() and layer.isdigit() and str(int(layer)) == layer and name
    if plain and not name.rpartition(".")[2].isdigit():
        return name, int(layer)
    return site, None


def not_stored(name: str, model: str, layers: Iterable[int | None], known: Collection[str]) -> OptionError:
    """What to raise where no tensors `name` are stored; `layers`: those there are of its group."""
    there = ranges(sorted(layer for layer in layers if layer is not None))
    if there and group_and_layer(name)[1] is not None:
        return OptionError(
            f"tensors: {name!r} is not stored for {model!r}: of {group_and_layer(name)[0]} it has {there}."
        )
    stored = ", ".join(sorted(known)) or "nothing"
    hint = did_you_mean(name, sorted({*known, *TENSORS}))
    return OptionError(f"tensors: {name!r} is not stored for {model!r}.{hint} Stored: {stored}.")


def preference(layout: str) -> tuple[int, str]:
    """What is published first where several layouts hold as much, as a key to sort by."""
    return (_POOLINGS.index(layout) if layout in _POOLINGS else len(_POOLINGS)), layout
