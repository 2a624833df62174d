"""Cache folders of lmprobe: one file per prompt (0.5 and later), or a folder per prompt of torch files (before)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actcache.errors import FormatError, NotCachedError, OptionError
from actcache.store.importing import DERIVED, Entry, ImportReport, import_entries, known_prompts, read_tensors
from actcache.store.prompts import IDS, TEXT
from actcache.store.records import TOKENS
from actcache.store.tensors import to_array

if TYPE_CHECKING:
    from actcache.store.store import Store

_HASH = re.compile(r"[0-9a-f]{16}")
_NAME_FILE = "_model_name.txt"
# Logits in 16 bits give losses that are off by a few hundredths.
_SAME_LOSS, _OTHER_LOSS = 0.1, 4.0

Tensors = dict[str, npt.NDArray[Any]]


def import_lmprobe(
    path: str | Path,
    *,
    model: str | Path | None = None,
    prompts: Iterable[Any] | None = None,
    store: Store | str | Path | None = None,
) -> ImportReport:
    """Bring in a cache folder of lmprobe, or the folder of one model in it.

    Raw and pooled activations of every layer come in as ``resid_post``, router logits, top-k and full logits,
    perplexities as what they are; full logits of all positions where it can be told which of them are padding. Such a
    cache keeps hashes of its prompts and, of full sequences only, a list of their texts: `prompts` gives texts that it
    lacks. A prompt that stays unknown comes in by its token ids where they are there, else it is skipped.

    Args:
        model: which model of the folder; or the name of the one model in it, under which it is to be found.
        prompts: texts whose hashes are looked for.
        store: a `Store`, a folder, or None for the default store.

    Raises:
        NotCachedError: no cache of lmprobe is there, or none of that model.
        OptionError: a model whose name the folder does not tell, and `model` neither.
    """
    from actcache.store.default import model_label, store_at

    opened, root = store_at(store), Path(path).expanduser()
    texts = [text for _, text, _ in known_prompts(prompts)] if prompts is not None else []
    given = {_hash(text): text for text in texts if text is not None}
    report = ImportReport()
    for folder, name in _models(root, None if model is None else str(model)):
        import_entries(opened, model_label(name), "lmprobe", _entries(folder, given, report), report)
    return report


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _is_model(folder: Path) -> bool:
    return _HASH.fullmatch(folder.name) is not None and folder.is_dir() and any(_hashes(folder))


def _models(root: Path, model: str | None) -> list[tuple[Path, str]]:
    """The folders of models below `root`, each with its model's name."""
    if not root.is_dir():
        raise NotCachedError(f"{root} is not a folder: name a cache folder of lmprobe.")
    folders = [root] if _is_model(root) else sorted(f for f in root.iterdir() if _is_model(f))
    if not folders:
        raise NotCachedError(f"{root} holds no cache of lmprobe (folders named by 16 hexadecimal digits).")
    names = {folder: _name(folder) for folder in folders}
    if model is None:
        unnamed = [folder.name for folder, name in names.items() if name is None]
        if unnamed:
            raise OptionError(f"the name of the model in {unnamed[0]} is not kept there: give it (model=, --model).")
        return [(folder, name) for folder, name in names.items() if name is not None]
    chosen = [folder for folder, name in names.items() if name == model or folder.name == _hash(model)]
    if not chosen and len(folders) == 1:
        # The one there is, under the name that was given: a path, where it was a Hub id.
        chosen = folders
    if not chosen:
        known = ", ".join(name or folder.name for folder, name in names.items())
        raise NotCachedError(f"{root} has nothing of {model!r}. It holds: {known}.")
    return [(folder, model) for folder in chosen]


def _name(folder: Path) -> str | None:
    try:
        return (folder / _NAME_FILE).read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _hashes(folder: Path) -> Iterator[str]:
    """The hashes of prompts that have anything in a model's folder, each once."""
    found = set()
    for path in folder.iterdir():
        name = path.name.partition(".")[0]
        fits = path.is_dir() or path.name.endswith(".safetensors")
        if fits and _HASH.fullmatch(name) and name not in found:
            found.add(name)
            yield name


def _entries(folder: Path, given: dict[str, str], report: ImportReport) -> Iterator[Entry]:
    known = {**_manifest(folder), **given}
    for name in sorted(_hashes(folder)):
        tensors: Tensors = {}
        try:
            for suffix in ("", ".perplexity", ".logits"):
                file = folder / f"{name}{suffix}.safetensors"
                if file.is_file():
                    tensors.update({k: v for k, v in read_tensors(file).items() if suffix or k not in tensors})
            if (folder / name).is_dir():
                tensors = {**_legacy(folder / name), **tensors}
        except (FormatError, OSError) as error:
            report.skipped.append((name, str(error)))
            continue
        entry = _entry(name, tensors, known.get(name), report)
        if entry is not None:
            yield entry


def _manifest(folder: Path) -> dict[str, str]:
    found = {}
    try:
        lines = (folder / "_manifest.jsonl").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            text, name = entry["prompt"], entry["hash"]
        except (ValueError, KeyError, TypeError):
            continue
        # Whatever the list says, a text belongs to its own hash.
        if isinstance(text, str) and text and _hash(text) == name:
            found[name] = text
    return found


def _legacy(folder: Path) -> Tensors:
    """The tensors of one prompt of an old cache, under the names that new ones use."""
    import torch

    found = {}
    for path in sorted(folder.rglob("*.pt")):
        pooled = path.parent.name if path.parent != folder else ""
        try:
            # Nothing but tensors: anything else in such a file would be code.
            value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FormatError(f"{path} is not a file of tensors: {error}") from None
        if isinstance(value, torch.Tensor):
            found[f"{pooled}_{path.stem}" if pooled else path.stem] = to_array(value)
    return found


def _entry(name: str, tensors: Tensors, text: str | None, report: ImportReport) -> Entry | None:
    ids = tensors.get("token_ids")
    ids = ids.reshape(-1) if ids is not None and ids.size and ids.dtype.kind in "iu" else None
    if text is None and ids is None:
        report.skipped.append((name, "its text is unknown, and so are its token ids: give its text (prompts=)"))
        return None
    mask = tensors.get("attention_mask")
    real = np.flatnonzero(mask.reshape(-1)) if mask is not None else None
    length = len(ids) if ids is not None else len(real) if real is not None else None
    if ids is not None and real is not None and len(real) != len(ids):
        report.skipped.append((name, f"{len(ids)} token ids, and {len(real)} tokens in its mask"))
        return None
    vectors: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for key, value in sorted(tensors.items()):
        place = _place(key, value)
        if place is None:
            continue
        layout, site, rows = place
        if layout == TOKENS:
            unpadded = None
            if mask is not None and real is not None and len(rows) == mask.size:
                unpadded = rows[real]
            elif len(rows) == length:
                unpadded = rows
            elif site == "logits" and ids is not None and len(rows) > len(ids):
                unpadded = _told_by_losses(rows, ids, tensors.get("token_perplexity"))
            if unpadded is None:
                report.skipped.append(
                    (name, f"{key} has {len(rows)} rows, and which are of its {length} tokens is unknown")
                )
                continue
            rows = unpadded
        vectors.setdefault(layout, {})[site] = rows
    if not vectors:
        report.skipped.append((name, "it holds nothing that could be imported"))
        return None
    return Entry(IDS if text is None else TEXT, text, ids, length or 4, vectors)


def _told_by_losses(
    rows: npt.NDArray[Any], ids: npt.NDArray[Any], perplexity: npt.NDArray[Any] | None
) -> npt.NDArray[Any] | None:
    """Which of the `rows` ``[P, V]`` of logits are those of `ids`; None where that cannot be told.

    Logits of all positions are kept with the padding of their batch, on a side that is not kept. Only on one side are
    the losses of the tokens those that are kept beside them.
    """
    n = len(ids)
    if perplexity is None or perplexity.size != n - 1 or n < 2 or int(ids.max()) >= rows.shape[1]:
        return None
    with np.errstate(all="ignore"):
        expected = np.log(perplexity.reshape(-1).astype(np.float64))
        # The perplexity of an unlikely token may have been too large for 16 bits.
        known = np.flatnonzero(np.isfinite(expected))
        away = []
        for side in (rows[:n], rows[len(rows) - n :]):
            logits = side[:-1].astype(np.float64)
            largest = logits.max(axis=1)
            total = np.log(np.exp(logits - largest[:, None]).sum(axis=1)) + largest
            differing = np.abs(total - logits[np.arange(n - 1), ids[1:]] - expected)
            away.append(float(differing[known].max(initial=0)))
    near, far = sorted(away)
    if not near <= _SAME_LOSS or not far > _OTHER_LOSS * near:
        return None
    return rows[:n] if away[0] == near else rows[len(rows) - n :]


def _place(key: str, value: npt.NDArray[Any]) -> tuple[str, str, npt.NDArray[Any]] | None:
    """Layout, site and rows ``[*, D]`` of a tensor; None for what is no result of a pass."""
    if match := re.fullmatch(r"layer_(\d+)", key):
        return TOKENS, f"resid_post.{int(match[1])}", _rows(value)
    if match := re.fullmatch(r"pooled_(\w+)_layer_(\d+)", key):
        return match[1], f"resid_post.{int(match[2])}", _rows(value)
    if match := re.fullmatch(r"router_layer_(\d+)", key):
        return TOKENS, f"router_logits.{int(match[1])}", _rows(value)
    if key == "perplexity" and value.size == 3:
        return DERIVED, "perplexity", value.reshape(1, 3).astype(np.float32)
    if key == "token_perplexity" and value.dtype.kind == "f":
        # One for each token but the last, which nothing follows.
        with np.errstate(all="ignore"):
            loss = np.log(value.reshape(-1, 1).astype(np.float32))
        return TOKENS, "token_nll", np.concatenate([loss, np.full((1, 1), np.nan, np.float32)])
    if match := re.fullmatch(r"logits(?:_top_k_(values|indices))?", key):
        rows = _rows(value)
        width = f".top{rows.shape[1]}.{match[1]}" if match[1] else ""
        return ("last_token" if len(rows) == 1 else TOKENS), f"logits{width}", rows
    return None


def _rows(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value.reshape(1, -1)
