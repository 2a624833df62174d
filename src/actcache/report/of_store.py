"""The page of a store, or of one model in it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from actcache.capture import lens_html
from actcache.report.contents import Contents, variant_of
from actcache.store.spaces import SpaceInfo
from actcache.store.store import Store
from actcache.unified import UnifiedCache
from actcache.wording import count, size


def store_contents(
    store: Store, variants: Sequence[tuple[SpaceInfo, str]], *, model: str | None = None, prompts: Sequence[Any] = ()
) -> Contents:
    """What `store` holds of `variants` (spaces and their names); with `prompts` also the logit lens of these, by
    `model`: read from what is stored, and computed and stored where it is not there.

    Raises what `UnifiedCache.logit_lens` does.
    """
    # First: what it computes is stored, and counts.
    lenses = [lens_of(model, store, prompts)] if prompts and model is not None else []
    info = store.info()
    facts = {
        "size": size(info.total_size_bytes),
        "limit": "none" if info.cache_limit_bytes is None else size(info.cache_limit_bytes),
        "models": str(len({m.model_name for m in info.models})),
        "variants": str(len(info.models)),
        "prompts": f"{sum(m.num_prompts for m in info.models):,}",
    }
    notes = [] if info.models else ["Nothing is stored."]
    title = "Activations that are stored" if model is None else f"Stored activations of {model}"
    shown = {space.space: name for space, name in variants}
    now = [variant_of(store, space, shown[space.space]) for space in store.spaces() if space.space in shown]
    now.sort(key=lambda variant: variant.model_name)
    return Contents(title, str(info.cache_dir), facts, now, notes, lenses)


def lens_of(
    model: str | PathLike[str] | None,
    store: Store,
    prompts: Sequence[Any],
    *,
    revision: str | None = None,
    trust_names: bool = False,
) -> tuple[str, str]:
    """Title and page of the logit lens of `prompts`, by `model`: of what `store` has of them
    (with `trust_names` also of what it knows by the model's name alone); the rest is computed and stored."""
    cache = UnifiedCache(
        model,
        cache_pooled=False,
        compute_perplexity=False,
        store=store,
        batch_size=None,
        sites=("resid_post",),
        revision=revision,
        trust_names=trust_names,
    )
    return f"{cache.model_name}, {count(len(prompts), 'prompt')}", lens_html.page(cache.logit_lens(list(prompts)))
