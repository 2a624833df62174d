"""Activations from elsewhere on their way into a store, marked: all that is known of their model is a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError, LayerRangeError, OptionError, PromptError, UnknownSiteError
from actcache.model.sites import Site
from actcache.store import container
from actcache.store.prompts import IDS, PromptTable
from actcache.store.records import TOKENS, Records, is_layout
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.tensors import kind_of, stand_in, to_array

if TYPE_CHECKING:
    from actcache.store.store import Store

CONTEXT = "imported"
DERIVED = "derived"
"""The layout of results with one row per prompt that belong to no pooling, such as its perplexity."""
RESULTS = ("logits", "perplexity", "token_nll")
"""Sites of results computed from vectors. They are never converted to the store's dtype."""

_BATCH_BYTES = 64 << 20
_MOST = 4096


@dataclass(frozen=True)
class ImportReport:
    """What an import brought in.

    Attributes:
        models: prompts imported, by model name.
        spaces: the id of the space of each model.
        skipped: what was left out, each with the reason.
    """

    models: dict[str, int] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        """Prompts imported, of all models together."""
        return sum(self.models.values())


@dataclass(frozen=True)
class Entry:
    """What is known of one prompt: its text (or chat) and ids, None where unknown, and its rows.

    `vectors`: layout -> site -> ``[T, D]`` for layout "tokens", else ``[1, D]``. `length`: its number of tokens, for
    ids that stand for a text.
    """

    kind: int
    text: str | None
    ids: Sequence[int] | npt.NDArray[Any] | None
    length: int
    vectors: Mapping[str, Mapping[str, npt.NDArray[Any]]]


def imported_space(model_name: str, source: str) -> SpaceInfo:
    """The space of what `source` ("lmprobe", ...) holds under a model's name; the same one again for the same names."""
    if not model_name:
        raise OptionError("the name of the model is empty: give the name under which it is to be found (model=).")
    identity = {"model_name": model_name, "source": "external", "imported": source}
    return SpaceInfo(space_id(identity), identity, {"model_name": model_name})


def import_entries(store: Store, model_name: str, source: str, entries: Iterable[Entry], report: ImportReport) -> None:
    """Store `entries`, those of one form together, and note in `report` what came of it.

    A prompt of which a value does not fit the store's dtype is left out and named.
    """
    space = imported_space(model_name, source)
    waiting: dict[tuple[Any, ...], list[tuple[Entry, Mapping[str, npt.NDArray[Any]]]]] = {}
    sizes: dict[tuple[Any, ...], int] = {}
    seen: set[bytes] = set()

    def write(form: tuple[Any, ...]) -> None:
        seen.update(_write(store, space, form[0], waiting.pop(form), report))
        del sizes[form]

    for entry in entries:
        for layout, sites in _apart(entry.vectors):
            form = (layout, *((site, rows.dtype.name, rows.shape[1]) for site, rows in sorted(sites.items())))
            waiting.setdefault(form, []).append((entry, sites))
            sizes[form] = sizes.get(form, 0) + sum(rows.nbytes for rows in sites.values())
            if sizes[form] > _BATCH_BYTES or len(waiting[form]) == _MOST:
                write(form)
    for form in list(waiting):
        write(form)
    if seen:
        store.merge(space)
        report.models[model_name] = report.models.get(model_name, 0) + len(seen)
        report.spaces[model_name] = space.space


def _apart(
    vectors: Mapping[str, Mapping[str, npt.NDArray[Any]]],
) -> Iterator[tuple[str, Mapping[str, npt.NDArray[Any]]]]:
    """Layouts with their sites; results computed from vectors apart, since they are stored as they are."""
    for layout, sites in vectors.items():
        for results in (False, True):
            part = {site: rows for site, rows in sites.items() if _is_result(site) == results}
            if part:
                yield layout, part


def _is_result(site: str) -> bool:
    return site.partition(".")[0] in RESULTS


def _write(
    store: Store,
    space: SpaceInfo,
    layout: str,
    group: Sequence[tuple[Entry, Mapping[str, npt.NDArray[Any]]]],
    report: ImportReport,
) -> list[bytes]:
    ids = [stand_in(e.kind, e.text or "", e.length) if e.ids is None else np.asarray(e.ids, np.int32) for e, _ in group]
    table = PromptTable.build(ids, [e.text for e, _ in group], [e.kind for e, _ in group], CONTEXT)
    data = {site: np.concatenate([sites[site] for _, sites in group]) for site in sorted(group[0][1])}
    records = Records.tokens(table, data) if layout == TOKENS else Records.pooled(table, layout, data)
    if _is_result(next(iter(data))):
        kept: Records | None = replace(records, screened=True)
    else:
        kept, refused = store.screen(records)
        report.skipped.extend((_named(group[r.prompt][0]), str(r)) for r in refused)
    if kept is None:
        return []
    store.append(store.open_space(space.identity, space.label), kept)
    return [key.tobytes() for key in kept.prompts.token_key]


def _named(entry: Entry) -> str:
    return repr(entry.text if entry.text is not None else list(entry.ids or ()))[:80]


def known_prompts(prompts: Iterable[Any]) -> list[tuple[int, str | None, npt.NDArray[np.int32] | None]]:
    """Kind, text and token ids of each of `prompts` (texts, token ids, chats), as `Entry` takes them."""
    found = []
    for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        kind, text = kind_of(prompt, i)
        found.append((kind, text, np.asarray(prompt, np.int32) if kind == IDS else None))
    if not found:
        raise PromptError("the list of prompts is empty: expected one prompt for each row.")
    return found


def read_tensors(path: Path, *, mapped: bool = False) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file; `mapped` leaves a large one on the disk. FormatError when it is none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        head = first + file.read(container.header_size(first, size) - 8)
        tensors = container.parse(head, size)[1]
        # A map keeps a descriptor for as long as it lives.
        raw: npt.NDArray[np.uint8] = (
            np.memmap(path, np.uint8, "r") if mapped else np.frombuffer(head + file.read(), np.uint8)
        )
    return {t.name: raw[t.start : t.stop].view(t.dtype).reshape(t.shape) for t in tensors.values()}


def import_arrays(
    arrays: str | Path | Mapping[str, Any],
    model_name: str,
    prompts: Iterable[Any],
    *,
    pooling: str | None = None,
    site: str | None = None,
    store: Store | str | Path | None = None,
) -> ImportReport:
    """Bring in arrays of which you know the model and the prompts, in their order.

    Args:
        arrays: a ``.npy`` file of one site (name it with `site`), a ``.safetensors`` file of tensors named by their
            sites, or a mapping of sites to arrays or tensors. Hook points of TransformerLens are names of sites, too;
            those that are no site are skipped and named. Each array is ``[N, D]`` with `pooling`. Without, it is
            ``[N, S, D]``, and rows beyond a prompt's tokens are padding: a tensor named ``mask`` ``[N, S]`` says which
            rows count (token ids say it themselves where they fill the rows).
        model_name: under which they are to be found.
        prompts: texts, lists of token ids or chats, one for each row.
        pooling: how each vector was made of its prompt; a name, such as "last_token".
        store: a `Store`, a folder, or None for the default store.

    Returns:
        An `ImportReport`. What is imported is marked as known by name only: see `UnifiedCache(trust_names=True)`.

    Raises:
        OptionError: arrays whose shapes fit neither each other nor the prompts; a site without its layer.
        UnknownSiteError: a name that is no site.
        FormatError: a file that is neither.
    """
    from actcache.store.default import model_label, store_at

    if site is not None:
        site = _complete(site)
    opened, known = store_at(store), known_prompts(prompts)
    given = _load(arrays, site) if isinstance(arrays, (str, Path)) else {k: to_array(v) for k, v in arrays.items()}
    mask = given.pop("mask", None)
    if mask is None:
        mask = given.pop("attention_mask", None)
    report = ImportReport()
    given = _by_site(given, report, by_token=pooling is None)
    if not given:
        raise OptionError("there are no arrays to import: expected one for each site." + _first_reason(report))
    if pooling is not None and (not is_layout(pooling) or pooling == TOKENS):
        raise OptionError(f"pooling={pooling!r} is not the name of a pooling: use a word such as 'last_token'.")
    wanted = 2 if pooling is not None else 3
    for name, array in given.items():
        if array.ndim != wanted or len(array) != len(known):
            expected = f"[{len(known)}, D]" if wanted == 2 else f"[{len(known)}, S, D]"
            hint = " (give pooling= for one vector per prompt)" if wanted == 3 and array.ndim == 2 else ""
            raise OptionError(f"{name!r} has the shape {list(array.shape)}: expected {expected} for the prompts{hint}.")
    entries = _pooled(given, known, pooling) if pooling is not None else _sequences(given, known, mask)
    import_entries(opened, model_label(model_name), "arrays", entries, report)
    return report


def _by_site(
    given: Mapping[str, npt.NDArray[Any]], report: ImportReport, *, by_token: bool
) -> dict[str, npt.NDArray[Any]]:
    """Arrays by the names of their sites. Hook points of TransformerLens that are none are noted in `report`: whoever
    has saved what `run_with_cache` returns has all of them; heads are joined."""
    found: dict[str, npt.NDArray[Any]] = {}
    names: dict[str, str] = {}
    for name, array in given.items():
        is_hook = name.rpartition(".")[2].startswith("hook_")
        site = hook_site(name, report) if is_hook else name
        if site is None:
            continue
        site = _complete(site)
        if site in found:
            raise OptionError(f"{names[site]!r} and {name!r} are the same site, {site}: leave one of them out.")
        names[site] = name
        found[site] = array.reshape(*array.shape[:2], -1) if is_hook and by_token and array.ndim == 4 else array
    return found


def _first_reason(report: ImportReport) -> str:
    return f" {report.skipped[0][1]}" if report.skipped else ""


def hook_site(name: str, report: ImportReport) -> str | None:
    """The site that a hook point of TransformerLens is; None, which is noted in `report`, where it is none or its
    values have no row for each token."""
    try:
        site = Site.parse(name)
    except (UnknownSiteError, LayerRangeError) as error:
        report.skipped.append((name, str(error)))
        return None
    if site.name == "pattern":
        report.skipped.append((name, "a pattern has no row for each token"))
        return None
    return str(site)


def _complete(name: str) -> str:
    """The name of one site as it is stored, of any of its names."""
    if _is_result(name):
        return name
    site = Site.parse(name)
    if not site.complete or (site.layer or 0) < 0:
        raise OptionError(f"site {name!r} does not say of which block: count from 0, as in '{replace(site, layer=5)}'.")
    return str(site)


def _load(path: str | Path, site: str | None) -> dict[str, npt.NDArray[Any]]:
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        found = read_tensors(path, mapped=True)
        return {site: next(iter(found.values()))} if site is not None and len(found) == 1 else found
    if path.suffix != ".npy":
        raise FormatError(f"{path} is neither a .npy nor a .safetensors file, nor a folder of lmprobe.")
    if site is None:
        raise OptionError(f"{path.name} does not say what it holds: name its site (site=), such as 'resid_post.5'.")
    try:
        return {site: np.load(path, mmap_mode="r", allow_pickle=False)}
    except ValueError as error:
        raise FormatError(f"{path} is not an array of numpy: {error}") from None


Known = Sequence[tuple[int, str | None, "npt.NDArray[np.int32] | None"]]


def _pooled(given: Mapping[str, npt.NDArray[Any]], known: Known, pooling: str) -> Iterable[Entry]:
    for i, (kind, text, ids) in enumerate(known):
        yield Entry(kind, text, ids, 4, {pooling: {site: array[i : i + 1] for site, array in given.items()}})


def _sequences(given: Mapping[str, npt.NDArray[Any]], known: Known, mask: npt.NDArray[Any] | None) -> Iterable[Entry]:
    chosen = real_rows(next(iter(given.values())).shape[1], known, mask)
    for (kind, text, ids), rows, i in zip(known, chosen, range(len(known)), strict=True):
        yield Entry(kind, text, ids, len(rows), {TOKENS: {site: array[i, rows] for site, array in given.items()}})


def real_rows(longest: int, known: Known, mask: npt.NDArray[Any] | None) -> list[npt.NDArray[np.int64]]:
    """Which of `longest` rows are tokens of each prompt.

    Raises:
        OptionError: that cannot be told, or a mask and token ids that contradict each other.
    """
    found = []
    for i, (_, _, ids) in enumerate(known):
        if mask is not None:
            rows = np.flatnonzero(np.asarray(mask)[i])
        elif (ids is not None and len(ids) == longest) or len(known) == 1:
            rows = np.arange(longest)
        else:
            raise OptionError(
                f"which of the {longest} rows of prompt {i} are padding cannot be told: give a mask [N, S] of tokens."
            )
        if ids is not None and len(ids) != len(rows):
            raise OptionError(f"prompt {i} has {len(ids)} token ids and {len(rows)} rows: expected one for each token.")
        if not len(rows):
            raise OptionError(f"the mask of prompt {i} is empty: expected at least one token.")
        found.append(rows)
    return found
