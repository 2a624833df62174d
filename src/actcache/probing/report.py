"""What the probes of all layers found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """Accuracies of `ac.probe_by_layer`, one for each layer; shown as a table.

    Attributes:
        layers: number or name of each layer, as they were given.
        accuracy: share of examples whose class was predicted right by a probe that was not fitted on them, float64
            ``[L]``.
        low, high: confidence interval of each accuracy, float64 ``[L]``.
        majority: the same share for predicting, in each fold, the class that is most frequent among those fitted on.
        shuffled: the same share after the labels were shuffled, the mean over `shuffles`, float64 ``[L]``; None where
            `shuffles` is 0.
        predictions: class predicted for each example, ``[L, B]``.
        converged: whether the probes of every fold converged, bool ``[L]``.
        classes: the classes, in sorted order.
        examples, groups: how many examples there are, and of how many groups; None without groups.
        folds, shuffles, confidence, seed: as they were asked for.
    """

    layers: list[Any]
    accuracy: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    majority: float
    shuffled: npt.NDArray[np.float64] | None
    predictions: npt.NDArray[Any]
    converged: npt.NDArray[np.bool_]
    classes: list[Any]
    examples: int
    groups: int | None
    folds: int
    shuffles: int
    confidence: float
    seed: int

    @property
    def best_layer(self) -> Any:
        """The layer with the highest accuracy, the first of several.

        Its accuracy is the largest of several measured ones, so that it is higher than what it would have on new
        examples: measure it there.
        """
        return self.layers[int(np.argmax(self.accuracy))]

    def table(self) -> str:
        """A line for each layer, and what the numbers are to be held against."""
        interval = f"{100 * self.confidence:g} % interval"
        head = ["layer", "accuracy", interval] + (["shuffled"] if self.shuffled is not None else []) + [""]
        rows = [head]
        for i, layer in enumerate(self.layers):
            row = [str(layer), f"{self.accuracy[i]:.3f}", f"{self.low[i]:.3f} to {self.high[i]:.3f}"]
            row += [f"{self.shuffled[i]:.3f}"] if self.shuffled is not None else []
            notes = ["best"] if layer == self.best_layer else []
            notes += [] if self.converged[i] else ["not converged"]
            rows.append([*row, ", ".join(notes)])
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        if len(self.layers) > 1:
            by_chance = (
                "" if self.shuffled is None else f"; with shuffled labels the best has {self.shuffled.max():.3f}"
            )
            lines.append(
                f"the best of {len(self.layers)} was chosen by these examples: measure it on others{by_chance}"
            )
        grouped = "" if self.groups is None else f" of {self.groups} groups"
        return "\n".join(
            [
                f"{self.examples} examples{grouped}, {len(self.classes)} classes, {self.folds} folds; "
                f"the most frequent class is right for {self.majority:.3f}",
                *lines,
            ]
        )

    def __repr__(self) -> str:
        return self.table()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy by layer with its interval and the baselines, on `ax` or on a new figure; the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise MissingExtraError("ProbeReport.plot needs matplotlib: pip install 'actcache[viz]'") from error
            ax = plt.subplots(layout="constrained")[1]
        at = np.arange(len(self.layers))
        ax.fill_between(at, self.low, self.high, alpha=0.25, linewidth=0)
        ax.plot(at, self.accuracy, marker="o", label=f"probe ({100 * self.confidence:g} % interval)")
        if self.shuffled is not None:
            ax.plot(at, self.shuffled, linestyle=":", color="0.4", label="shuffled labels")
        ax.axhline(self.majority, linestyle="--", color="0.4", label="most frequent class")
        # More names than these would overlap.
        step = -(-len(at) // 16)
        ax.set_xticks(at[::step], [str(layer) for layer in self.layers[::step]])
        ax.set_xlabel("layer")
        ax.set_ylabel("accuracy")
        ax.set_ylim(top=1.02)
        ax.legend()
        return ax
