"""Figures: `ac.plot.norms` and `ac.plot.lens`."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.cache import ActivationCache
from actcache.capture.lens import LogitLens
from actcache.capture.lens_html import shortened
from actcache.errors import MissingExtraError, NotCachedError, OptionError, did_you_mean
from actcache.report.contents import Layered, layered
from actcache.store.spaces import space_id
from actcache.store.store import Store
from actcache.unified import UnifiedCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actcache.store.spaces import SpaceInfo

_METRICS = ("probability", "entropy", "kl")
_CELL_TEXT = 10


def norms(source: Store | UnifiedCache | ActivationCache, *, space: str | SpaceInfo | None = None) -> Figure:
    """Mean L2 norm of a row by layer, a line for each site (and pooling).

    Args:
        source: an `ac.Store` with `space` (see `Store.spaces`), an `ac.UnifiedCache` (what is stored of its model), or
            an `ac.ActivationCache` (of its tensors ``[B, S, D]``, padding left out).

    Returns:
        A `matplotlib.figure.Figure`, not shown: a notebook does when it is the last value of a cell, and
        ``figure.savefig(path)`` writes it.

    Raises:
        OptionError: another source, or a store without `space`.
        NotCachedError: nothing in it lies in layers.
        MissingExtraError: matplotlib is not installed.
    """
    lines = _lines(source, space)
    if not lines:
        raise NotCachedError("nothing to draw: no site of a layer is there.")
    figure = _figure("ac.plot.norms")
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for line in lines:
        axes.plot(line.layers, line.values, marker="o", label=line.name)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean L2 norm of a row")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def lens(found: LogitLens, prompt: int = 0, *, metric: str = "probability") -> Figure:
    """A map of one prompt's tokens and layers, each cell with the token that the layer would predict.

    Args:
        found: what `logit_lens` of a `UnifiedCache` or an `ActivationCache` gives.
        prompt: which of its prompts.
        metric: what the colour says: "probability" of the best token, "entropy" in nats, or "kl" from the layer's
            prediction to the model's, in nats.

    Returns:
        A `matplotlib.figure.Figure`, not shown.

    Raises:
        OptionError: no such prompt or metric, or the lens has no KL (which needs `resid_post` of the last block).
        MissingExtraError: matplotlib is not installed.
    """
    if not isinstance(found, LogitLens):
        raise OptionError(f"lens() draws an ac.LogitLens, not {type(found).__name__}: call .logit_lens(...) first.")
    if metric not in _METRICS:
        raise OptionError(f"metric is {metric!r}: expected {', '.join(_METRICS)}.{did_you_mean(metric, _METRICS)}")
    if metric == "kl" and not found.has_kl:
        raise OptionError("this lens has no KL: it lacks resid_post of the last block.")
    count = len(found.mask)
    if not isinstance(prompt, int) or not -count <= prompt < count:
        raise OptionError(f"prompt is {prompt!r}: the lens has {count} of them, 0 to {count - 1}.")
    real = found.mask[prompt]
    if not found.layers or not bool(real.any()):
        raise OptionError("nothing to draw: the lens has no layers, or no positions of that prompt.")
    values = {"probability": lambda: found.probabilities[:, prompt, :, 0], "entropy": lambda: found.entropy[:, prompt]}
    values["kl"] = lambda: found.kl[:, prompt]
    shown = values[metric]()[:, real].numpy()
    best = found.tokens[:, prompt, real, 0].tolist()
    ids = found.input_ids[prompt, real].tolist()
    figure = _figure("ac.plot.lens", width=2.5 + 0.75 * len(ids), height=1.6 + 0.3 * len(found.layers))
    axes = figure.subplots()
    picture = axes.imshow(shown, aspect="auto", origin="lower", cmap="Blues", vmin=0)
    threshold = 0.6 * float(np.nanmax(shown, initial=0.0))
    for layer, row in enumerate(best):
        for at, token in enumerate(row):
            colour = "white" if shown[layer, at] > threshold else "black"
            text = shortened(found.text(token), _CELL_TEXT)
            axes.text(at, layer, text, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    axes.set_yticks(range(len(found.layers)), [str(layer) for layer in found.layers])
    labels = axes.set_xticks(range(len(ids)), ["" if i < 0 else shortened(found.text(i), _CELL_TEXT) for i in ids])
    for tick in labels:
        tick.label1.set_parse_math(False)
    axes.tick_params(axis="x", rotation=45)
    axes.set_ylabel("layer")
    named = {
        "probability": "probability of the best token",
        "entropy": "entropy (nats)",
        "kl": "KL(final || layer) (nats)",
    }
    figure.colorbar(picture, label=named[metric])
    return figure


def _lines(source: Any, space: str | SpaceInfo | None) -> list[Layered]:
    if isinstance(source, UnifiedCache):
        own = space_id(source.extractor.source.identity().values)
        known = any(one.space == own for one in source.store.spaces())
        return layered(source.store.summaries(own), "mean_norm") if known else []
    if isinstance(source, Store):
        if space is None:
            held = ", ".join(s.space for s in source.spaces())
            raise OptionError(f"a Store needs space=: which variant to draw. It has {held or 'none'}.")
        return layered(source.summaries(space), "mean_norm")
    if isinstance(source, ActivationCache):
        return _of_cache(source)
    raise OptionError(
        f"norms() draws an ac.Store, an ac.UnifiedCache or an ac.ActivationCache, not {type(source).__name__}."
    )


def _of_cache(cache: ActivationCache) -> list[Layered]:
    found: dict[str, dict[int, float]] = {}
    for key in cache:
        name, _, layer = str(key).rpartition(".")
        if not layer.isdigit() or not name:
            continue
        try:
            rows = cache.rows(key)
        except (TypeError, ValueError, KeyError):
            continue
        flat = [row.detach().double().reshape(len(row), -1) for row in rows if row.is_floating_point()]
        if flat:
            lengths = np.concatenate([part.norm(dim=-1).cpu().numpy() for part in flat])
            found.setdefault(name, {})[int(layer)] = float(lengths.mean())
    return [Layered(name, sorted(at), [at[layer] for layer in sorted(at)]) for name, at in found.items()]


def _figure(asked: str, width: float = 6.4, height: float = 4.8) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f"{asked} needs matplotlib: pip install 'actcache[viz]'") from error

    class Shown(Figure):
        """Notebooks show it: of others they do so only once pyplot has drawn something."""

        def _repr_png_(self) -> bytes:
            written = BytesIO()
            self.savefig(written, format="png")
            return written.getvalue()

    return Shown(figsize=(width, height), layout="constrained")
