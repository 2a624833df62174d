"""ActivationCache objects of TransformerLens on their way into a store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actcache.errors import OptionError
from actcache.store.importing import Entry, ImportReport, Known, hook_site, import_entries, known_prompts, real_rows
from actcache.store.records import TOKENS
from actcache.store.tensors import to_array

if TYPE_CHECKING:
    from actcache.store.store import Store


def import_transformer_lens(
    cache: Mapping[str, Any],
    model_name: str,
    prompts: Iterable[Any],
    *,
    mask: Any = None,
    store: Store | str | Path | None = None,
) -> ImportReport:
    """Bring in an `ActivationCache` of TransformerLens, every token of it.

    Args:
        cache: what ``model.run_with_cache(tokens)`` returned; any mapping of hook names to tensors ``[B, S, ...]``.
        model_name: under which it is to be found.
        prompts: the `B` prompts in their order: texts, lists of token ids or chats.
        mask: ``[B, S]``, which positions are tokens; needed where prompts of different lengths were padded.
        store: a `Store`, a folder, or None for the default store.

    Returns:
        An `ImportReport`. Hook points that are no site, and those without a row for each token (patterns), are skipped
        and named. What is imported is marked as known by name only: see `UnifiedCache(trust_names=True)`.

    Raises:
        OptionError: tensors whose shapes do not fit the prompts, or padding that cannot be told.
    """
    from actcache.store.default import model_label, store_at

    opened, known = store_at(store), known_prompts(prompts)
    report = ImportReport()
    batched = bool(getattr(cache, "has_batch_dim", True))
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, value in cache.items():
        site = hook_site(str(name), report)
        if site is None:
            continue
        array = to_array(value) if batched else to_array(value)[None]
        if array.ndim < 3 or len(array) != len(known):
            raise OptionError(f"{name!r} has the shape {list(array.shape)}: expected [{len(known)}, S, ...].")
        arrays[site] = array.reshape(*array.shape[:2], -1)
    if not arrays:
        raise OptionError(
            "this cache holds nothing that could be imported: expected hook points such as hook_resid_post."
        )
    lengths = {array.shape[1] for array in arrays.values()}
    if len(lengths) > 1:
        raise OptionError(f"the tensors have different numbers of positions {sorted(lengths)}: expected one for all.")
    rows = real_rows(lengths.pop(), known, None if mask is None else to_array(mask))
    import_entries(opened, model_label(model_name), "TransformerLens", _entries(arrays, known, rows), report)
    return report


def _entries(arrays: Mapping[str, npt.NDArray[Any]], known: Known, rows: list[Any]) -> Iterator[Entry]:
    for i, (kind, text, ids) in enumerate(known):
        vectors = {site: array[i, rows[i]] for site, array in arrays.items()}
        yield Entry(kind, text, ids, len(rows[i]), {TOKENS: vectors})
