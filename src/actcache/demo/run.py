"""The main job, shown: extract, find again, read back, probe each layer, read a fact out of the layers."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache._version import __version__
from actcache.cli.output import console, duration, size, table
from actcache.demo import model_path
from actcache.demo.prompts import demo_prompts, landmarks, split, statements
from actcache.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console

    from actcache.store.store import Store
    from actcache.unified import UnifiedCache, WarmupStats

PROMPTS = 240
_BAR = 24


def run(*, keep: bool = False) -> None:
    """Run the demo on standard output; with `keep` its cache folder stays."""
    if find_spec("sklearn") is None:
        raise MissingExtraError("the demo's probe needs scikit-learn: pip install 'actcache[demo]'")
    from actcache.store.store import Store

    started = time.perf_counter()
    out = console()
    with _folder(keep) as folder:
        fate = "kept" if keep else "removed at the end"
        out.print(
            f"[bold]actcache {__version__}[/]  model {model_path()}\ncache folder {folder} ({fate})", soft_wrap=True
        )
        with _open(Store, folder) as store:
            _extract(out, store)
            _read_back(out, store)
            _probe(out, store)
            _lens(out, store)
            _report(out, store)
    out.print(f"Done in {duration(time.perf_counter() - started)}.")
    if keep:
        out.print(f"Look around:  actcache info --store {folder}", soft_wrap=True)


@contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="actcache-demo-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _open(store_class: type[Store], folder: Path) -> Iterator[Store]:
    # The index goes with the folder, so that nothing of the demo stays behind.
    store = store_class(folder / "store", index_dir=folder / "index")
    try:
        yield store
    finally:
        store.close()


def _heading(out: Console, text: str) -> None:
    out.print(f"\n[bold cyan]{text}[/]")


def _every_token(store: Store) -> UnifiedCache:
    from actcache.unified import UnifiedCache

    return UnifiedCache(model_path(), cache_pooled=False, store=store)


def _last_token(store: Store) -> UnifiedCache:
    from actcache.unified import UnifiedCache

    return UnifiedCache(model_path(), pooling="last_token", store=store)


def _extract(out: Console, store: Store) -> None:
    _heading(out, f"1  Extract every token of every layer, for {PROMPTS} prompts")
    prompts = demo_prompts(PROMPTS)
    cold = _every_token(store)
    plan = cold.plan(prompts)
    lengths = sorted(len(p) for p in prompts)
    out.print(
        f"   {plan.missing} prompts of {lengths[0]} to {lengths[-1]} characters, {plan.tokens:,} tokens; "
        f"{size(plan.bytes_to_write)} to write, {size(plan.bytes_free)} free"
    )
    first = cold.warmup(prompts)
    # A cache object of its own, as another process would have it: it has loaded nothing so far.
    warm = _every_token(store)
    second = warm.warmup(prompts)
    rows = table(
        "", "stored before", "extracted", "time", "tokens/s", "model loaded", right=("stored before", "extracted")
    )
    for name, stats, cache in (("first run", first, cold), ("second run", second, warm)):
        rows.add_row(name, *_cells(stats), "yes" if cache.model_loaded else "no")
    out.print(rows)
    if second.activations_extracted or warm.model_loaded:
        raise RuntimeError("the second warm-up did not find everything: please report this")
    speedup = first.elapsed_seconds / max(second.elapsed_seconds, 1e-9)
    out.print(f"   The second run found all {PROMPTS} prompts and loaded no weights: {speedup:,.0f} times faster.")


def _cells(stats: WarmupStats) -> tuple[str, str, str, str]:
    speed = f"{stats.tokens_per_second:,.0f}" if stats.activations_extracted else ""
    return str(stats.activations_cached), str(stats.activations_extracted), duration(stats.elapsed_seconds), speed


def _read_back(out: Console, store: Store) -> None:
    _heading(out, "2  Read them back")
    prompts = demo_prompts(PROMPTS)
    started = time.perf_counter()
    activations, mask = _every_token(store).get_activations(prompts)
    seconds = time.perf_counter() - started
    out.print(
        f"   activations {list(activations.shape)} and mask {list(mask.shape)} in {duration(seconds)} "
        f"({size(activations.nbytes)})"
    )
    longest = max(range(PROMPTS), key=lambda i: int(mask[i].sum()))
    stored = activations[longest, mask[longest].bool()]
    difference, scale = _bare_difference(prompts[longest], stored)
    out.print(
        f"   Against a bare forward pass of the longest prompt ({stored.shape[0]} tokens, all layers): "
        f"largest difference {difference:.1e} in values up to {scale:.1f}"
    )


def _bare_difference(prompt: str, stored: Any) -> tuple[float, float]:
    """Largest difference of `stored` [T, L*D] from what plain transformers gives, and the largest value there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actcache.model.anatomy import describe

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(model_path())(prompt, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        layers = list(stored.unflatten(1, (len(hidden) - 1, -1)).unbind(1))
        # transformers returns the last layer after the final norm; ours is before it.
        final_norm = describe(model).final_norm
        assert final_norm is not None
        layers[-1] = final_norm(layers[-1])
    difference = max(float((ours - theirs[0]).abs().max()) for ours, theirs in zip(layers, hidden[1:], strict=True))
    return difference, max(float(theirs.abs().max()) for theirs in hidden[1:])


def _probe(out: Console, store: Store) -> None:
    _heading(out, "3  Where does the model know that a statement is true?")
    items = statements()
    train, test = split(items)
    cache = _last_token(store)
    texts = [item.text for item in items]
    cache.warmup(texts)
    activations, _ = cache.get_activations(texts)
    labels = [item.label for item in items]
    layers = activations.unflatten(1, (len(cache.sites), -1)).numpy()
    out.print(
        f"   A logistic regression per layer on the last token: {len(train)} statements to learn from, "
        f"{len(test)} about other facts to test on"
    )
    rows = table("layer", "accuracy on facts it has not seen", right=("layer",))
    for layer in range(layers.shape[1]):
        accuracy = _accuracy(layers[:, layer], labels, train, test)
        rows.add_row(str(layer), f"{accuracy:4.0%}  {_bar(accuracy)}")
    out.print(rows)


def _accuracy(x: npt.NDArray[np.float32], labels: list[int], train: list[int], test: list[int]) -> float:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = np.array(labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(probe.fit(x[train], y[train]).score(x[test], y[test]))


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "·" * (_BAR - filled)


def _lens(out: Console, store: Store) -> None:
    prompt, answer = landmarks()[0]
    _heading(out, f"4  When does “{prompt}” become “{answer.strip()}”?")
    cache = _last_token(store)
    cache.warmup([prompt])
    activations, _ = cache.get_activations([prompt])
    layers = activations.unflatten(1, (len(cache.sites), -1))[0]

    import torch

    from actcache.model.anatomy import describe

    anatomy = describe(cache.model)
    tokenizer = cache.tokenizer
    assert anatomy.final_norm is not None
    assert anatomy.head is not None
    with torch.no_grad():
        chances = anatomy.head(anatomy.final_norm(layers)).softmax(-1)
    wanted = tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    out.print("   What the final norm and head make of each layer's stored vector:")
    rows = table("layer", f"chance of “{answer.strip()}”", "most likely", right=("layer",))
    for layer, chance in enumerate(chances):
        best = ", ".join(f"{tokenizer.decode([int(i)]).strip()} {float(chance[i]):.0%}" for i in chance.topk(4).indices)
        rows.add_row(str(layer), f"{float(chance[wanted]):4.0%}  {_bar(float(chance[wanted]))}", best)
    out.print(rows)


def _report(out: Console, store: Store) -> None:
    _heading(out, "5  What is stored")
    info = store.info()
    for model in info.models:
        out.print(
            f"   {Path(model.model_name).name}: {model.num_prompts} prompts, {model.num_layers} layers, {model.dtype}, "
            f"{size(model.size_bytes)}"
        )
    out.print(f"   {size(info.total_size_bytes)} in all\n")
