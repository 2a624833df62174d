"""Names of stored sites as groups of tensors of a dataset, and which layout of one is taken."""

from __future__ import annotations

from actcache.derive.results import PERPLEXITY
from actcache.share.format import HIDDEN, LOGITS, is_name
from actcache.store.files import log
from actcache.store.records import TOKENS, is_result
from actcache.store.site_names import LAST

_POOLINGS = (TOKENS, LAST, "mean", "first_token", "max", "min")


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


def preference(layout: str) -> tuple[int, str]:
    """What is published first where several layouts hold as much, as a key to sort by."""
    return (_POOLINGS.index(layout) if layout in _POOLINGS else len(_POOLINGS)), layout
