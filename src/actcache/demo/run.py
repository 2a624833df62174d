"""The main job, shown: extract, find again, read back, probe each layer, read a fact out of the layers."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
    import torch
    from rich.console import Console

    from actcache.cli.results.models import DemoResult, DemoRun, Stored
    from actcache.extract.stats import WarmupStats
    from actcache.store.store import Store
from actcache.unified import UnifiedCache

PROMPTS = 240
_BAR = 24


def run(*, keep: bool = False, quiet: bool = False) -> DemoResult:
    """Run the demo on standard output, or print nothing; with `keep` its cache folder stays. What it has found."""
    if find_spec("sklearn") is None:
        raise MissingExtraError("the demo's probe needs scikit-learn: pip install 'actcache[demo]'")
    from actcache.store.store import Store

    out = console()
    out.quiet = quiet
    started = time.perf_counter()
    with _folder(keep) as folder:
        _say(out, f"actcache {__version__} on the model in {model_path()}")
        _say(out, f"cache folder {folder} ({'kept' if keep else 'removed at the end'})")
        _import_libraries(out)
        # The index lies beside the store, so that nothing of the demo stays behind.
        with _one_thread(), closing(Store(folder / "store", index_dir=folder / "index")) as store:
            first, second = _extract(out, store)
            difference, largest = _read_back(out, store)
            accuracy = _probe(out, store)
            chance = _lens(out, store)
            stored = _report(out, store)
    seconds = time.perf_counter() - started
    _say(out, f"Done in {duration(seconds)}.")
    if keep:
        _say(out, f"Look around:  actcache info --store {folder / 'store'}")
    return {
        "model": str(model_path()),
        "folder": str(folder) if keep else None,
        "first": first,
        "second": second,
        "difference": difference,
        "largest": largest,
        "accuracy": accuracy,
        "chance": chance,
        "stored": stored,
        "seconds": seconds,
    }


@contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="actcache-demo-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _import_libraries(out: Console) -> None:
    """Import them now: what the first run is timed at should be its own work."""
    started = time.perf_counter()
    import sklearn.linear_model  # noqa: F401
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        # transformers imports the classes of a model when it is made; this makes one without memory.
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path()))
    _say(out, f"torch, transformers and scikit-learn imported in {duration(time.perf_counter() - started)}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The model is so small that a second thread costs more than it brings, most of all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _heading(out: Console, text: str) -> None:
    out.print(f"\n{text}", style="bold cyan", markup=False, soft_wrap=True)


def _say(out: Console, text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)


def _every_token(store: Store) -> UnifiedCache:
    from actcache.unified import UnifiedCache

    return UnifiedCache(model_path(), compute_perplexity=False, cache_pooled=False, store=store)


def _last_token(store: Store) -> UnifiedCache:
    from actcache.unified import UnifiedCache

    return UnifiedCache(model_path(), compute_perplexity=False, pooling="last_token", store=store)


def _read(cache: UnifiedCache, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    answer = cache.get_activations(prompts)
    assert isinstance(answer, tuple), "one site gives one answer"
    return answer


def _extract(out: Console, store: Store) -> tuple[DemoRun, DemoRun]:
    _heading(out, f"1  Extract every token of every layer, for {PROMPTS} prompts")
    prompts = demo_prompts(PROMPTS)
    cold = _every_token(store)
    plan = cold.plan(prompts)
    lengths = sorted(map(len, prompts))
    _say(
        out,
        f"   {plan.missing} prompts of {lengths[0]} to {lengths[-1]} characters, {plan.tokens:,} tokens; "
        f"{size(plan.bytes_to_write)} to write, {size(plan.bytes_free or 0)} free",
    )
    first = cold.warmup(prompts)
    # A cache object of its own, as another process would have it: it has loaded nothing so far.
    warm = _every_token(store)
    second = warm.warmup(prompts)
    columns = ("", "stored before", "extracted", "time", "tokens/s", "weights loaded")
    rows = table(*columns, right=columns[1:])
    for name, stats, cache in (("first run", first, cold), ("second run", second, warm)):
        rows.add_row(name, *_cells(stats), "yes" if cache.model_loaded else "no")
    out.print(rows)
    if second.activations_extracted or warm.model_loaded:
        raise RuntimeError("the second warm-up did not find everything: please report this")
    _say(out, f"   The second run found all {PROMPTS} prompts and loaded no weights.")
    return _numbers(first, cold), _numbers(second, warm)


def _numbers(stats: WarmupStats, cache: UnifiedCache) -> DemoRun:
    return {
        "activations_cached": stats.activations_cached,
        "activations_extracted": stats.activations_extracted,
        "elapsed_seconds": stats.elapsed_seconds,
        "tokens_per_second": stats.tokens_per_second,
        "weights_loaded": cache.model_loaded,
    }


def _cells(stats: WarmupStats) -> tuple[str, str, str, str]:
    speed = f"{stats.tokens_per_second:,.0f}" if stats.activations_extracted else ""
    return str(stats.activations_cached), str(stats.activations_extracted), duration(stats.elapsed_seconds), speed


def _read_back(out: Console, store: Store) -> tuple[float, float]:
    _heading(out, "2  Read them back")
    prompts = demo_prompts(PROMPTS)
    started = time.perf_counter()
    activations, mask = _read(_every_token(store), prompts)
    assert mask is not None
    seconds = time.perf_counter() - started
    _say(
        out,
        f"   activations {list(activations.shape)} and mask {list(mask.shape)} in {duration(seconds)} "
        f"({size(activations.nbytes)})",
    )
    # One of middling length has shared its batch with others, so that this says something about batching too.
    chosen = int(mask.sum(1).argsort()[PROMPTS // 2])
    stored = activations[chosen, mask[chosen].bool()]
    difference, scale = _bare_difference(prompts[chosen], stored)
    _say(
        out,
        f"   Against a bare forward pass of one prompt alone ({stored.shape[0]} tokens, all layers): "
        f"largest difference {difference:.1e} in values up to {scale:.1f}",
    )
    return difference, scale


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


def _probe(out: Console, store: Store) -> list[float]:
    _heading(out, "3  Where does the model know that a statement is true?")
    items = statements()
    train, test = split(items)
    cache = _last_token(store)
    texts = [item.text for item in items]
    cache.warmup(texts)
    activations, _ = _read(cache, texts)
    labels = [item.label for item in items]
    layers = activations.unflatten(1, (len(cache.sites), -1)).numpy()
    _say(
        out,
        f"   A logistic regression per layer on the last token: {len(train)} statements to learn from, "
        f"{len(test)} about other facts to test on",
    )
    rows = table("layer", "accuracy on facts it has not seen (chance: 50%)", right=("layer",))
    accuracies = [_accuracy(layers[:, layer], labels, train, test) for layer in range(layers.shape[1])]
    for layer, accuracy in enumerate(accuracies):
        rows.add_row(str(layer), f"{accuracy:4.0%}  {_bar(accuracy)}")
    out.print(rows)
    return accuracies


def _accuracy(x: npt.NDArray[np.float32], labels: list[int], train: list[int], test: list[int]) -> float:
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = np.array(labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    return float(probe.fit(x[train], y[train]).score(x[test], y[test]))


def _bar(share: float) -> str:
    filled = round(share * _BAR)
    return "█" * filled + "·" * (_BAR - filled)


def _lens(out: Console, store: Store) -> list[float]:
    prompt, answer = landmarks()[0]
    _heading(out, f"4  When does “{prompt}” become “{answer.strip()}”?")
    cache = _last_token(store)
    cache.warmup([prompt])
    activations, _ = _read(cache, [prompt])
    layers = activations.unflatten(1, (len(cache.sites), -1))[0]

    import torch

    from actcache.model.anatomy import describe
    from actcache.model.pieces import escaped, piece_of

    anatomy = describe(cache.model)
    tokenizer = cache.tokenizer
    assert anatomy.final_norm is not None
    assert anatomy.head is not None
    with torch.no_grad():
        chances = anatomy.head(anatomy.final_norm(layers)).softmax(-1)
    wanted = tokenizer(answer, add_special_tokens=False)["input_ids"][0]
    _say(out, "   What the final norm and head make of each layer's stored vector:")
    rows = table("layer", f"chance of “{answer.strip()}”", "most likely", right=("layer",))
    for layer, chance in enumerate(chances):
        likely = ((escaped(piece_of(tokenizer, int(i))).strip(), float(chance[i])) for i in chance.topk(4).indices)
        best = ", ".join(f"{piece} {share:.0%}" for piece, share in likely)
        rows.add_row(str(layer), f"{float(chance[wanted]):4.0%}  {_bar(float(chance[wanted]))}", best)
    out.print(rows)
    return [float(chance) for chance in chances[:, wanted]]


def _report(out: Console, store: Store) -> list[Stored]:
    _heading(out, "5  What is stored")
    info = store.info()
    for model in info.models:
        _say(
            out,
            f"   {Path(model.model_name).name}: {model.num_prompts} prompts, {model.num_layers} layers, {model.dtype}, "
            f"{size(model.size_bytes)}",
        )
    _say(out, f"   {size(info.total_size_bytes)} in all\n")
    return [
        {"prompts": model.num_prompts, "layers": model.num_layers, "dtype": model.dtype, "size_bytes": model.size_bytes}
        for model in info.models
    ]
