"""A linear probe for each layer, with what its accuracy has to be held against."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import MissingExtraError, OptionError
from actcache.probing.inputs import layers_of
from actcache.probing.report import ProbeReport
from actcache.progress import progress

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints = npt.NDArray[np.intp]
    Folds = Sequence[tuple[Ints, Ints]]

_ITERATIONS = 1000


def probe_by_layer(
    X: Any,
    y: Iterable[Any],
    groups: Iterable[Any] | None = None,
    *,
    folds: int = 5,
    shuffles: int = 1,
    confidence: float = 0.95,
    C: float = 1.0,
    seed: int = 0,
) -> ProbeReport:
    """How well a linear probe tells the classes `y` apart at each layer, by cross-validation.

    The probe is scikit-learn's logistic regression on features that are standardised with mean and variance of the
    examples that it is fitted on. Every example is predicted once, by a probe that was not fitted on it; folds have
    about the same shares of the classes. With `groups` no group is on both sides: give one wherever examples are
    not independent (sentences of a text, templates with another word in them), or the probe may recognise the group.

    The interval is that of Wilson (1927) for a share of so many independent predictions. With `groups` these are as
    many as the variance between groups leaves, by Korn and Graubard (1998), and no more than there are groups when all
    predictions are right or all are wrong. It is of these probes' accuracy on more such examples, not of how it would
    vary with others to fit on, which cross-validation on one set cannot tell (Bengio and Grandvalet 2004).

    Args:
        X: activations ``[B, L, D]`` as `ac.activations` returns them, or a mapping from layer to ``[B, D]``.
        y: the class of each example: strings, integers or booleans.
        groups: the group of each example.
        folds: in how many parts the examples are divided.
        shuffles: how often the same is done with shuffled labels (Hewitt and Liang 2019 on why); each takes as long as
            the probes themselves. With `groups` that have one class each, groups are shuffled.
        confidence: of the interval.
        C: as in scikit-learn: the smaller, the more weights are drawn towards zero.
        seed: of folds and shuffles; the same seed gives the same report.

    Raises:
        OptionError: shapes that do not fit, values that are not finite, too few examples or groups of a class.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("probe_by_layer needs scikit-learn: pip install 'actcache[probe]'") from error
    _check_numbers(folds, shuffles, confidence, C)
    data = layers_of(X, "X")
    classes, labels = _numbered(y, "y", data.rows)
    if len(classes) < 2:
        raise OptionError(f"y has the one class {classes[0]!r}: there is nothing to tell apart.")
    of = None if groups is None else _numbered(groups, "groups", data.rows)[1]
    splits = _splits(labels, of, classes, folds, seed)
    random = np.random.default_rng(seed)
    others = [_shuffled(labels, of, random) for _ in range(shuffles)]

    predictions = np.empty((len(data.names), data.rows), np.intp)
    converged = np.ones(len(data.names), bool)
    chance = np.zeros((shuffles, len(data.names)))
    with progress(len(data.names), "probing", unit="layer") as bar:
        for k, (_, matrix) in enumerate(data):
            rows = matrix.astype(np.float64)
            predictions[k], converged[k] = _predicted(rows, labels, splits, C)
            chance[:, k] = [(_predicted(rows, other, splits, C)[0] == other).mean() for other in others]
            bar.update()
    right = predictions == labels
    intervals = np.array([interval(each, of, confidence) for each in right])
    return ProbeReport(
        layers=data.names,
        accuracy=right.mean(axis=1),
        low=intervals[:, 0],
        high=intervals[:, 1],
        majority=_majority(labels, splits),
        shuffled=chance.mean(axis=0) if shuffles else None,
        predictions=np.array(classes)[predictions],
        converged=converged,
        classes=classes,
        examples=data.rows,
        groups=None if of is None else int(of.max()) + 1,
        folds=folds,
        shuffles=shuffles,
        confidence=confidence,
        seed=seed,
    )


def interval(
    right: npt.NDArray[np.bool_], groups: npt.NDArray[np.intp] | None, confidence: float
) -> tuple[float, float]:
    """The confidence interval of the share of `right`, as `probe_by_layer` describes it; `groups`: 0, 1, ..., each."""
    n, share = float(len(right)), float(right.mean())
    if groups is not None:
        count = int(groups.max()) + 1
        excess = np.bincount(groups, right - share)
        variance = count / (count - 1) * float((excess**2).sum()) / n**2
        n = min(n, share * (1 - share) / variance) if variance > 0 else float(count)
        # Rows that differ within groups as much as between them tell no less than one row of each.
        n = max(n, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _predicted(
    rows: npt.NDArray[np.float64], labels: Ints, splits: Folds, C: float
) -> tuple[npt.NDArray[np.intp], bool]:
    """The class of each row, by the probe fitted without its fold; and whether all probes converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predicted, converged = np.empty(len(rows), np.intp), True
    for fitted, held in splits:
        if len(np.unique(labels[fitted])) == 1:
            # It takes two to fit a probe, and of shuffled groups one may be left.
            predicted[held] = labels[fitted[0]]
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=_ITERATIONS))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            probe.fit(rows[fitted], labels[fitted])
        converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        predicted[held] = probe.predict(rows[held])
    return predicted, converged


def _majority(labels: Ints, splits: Folds) -> float:
    right = sum(int((labels[held] == np.bincount(labels[fitted]).argmax()).sum()) for fitted, held in splits)
    return right / len(labels)


def _splits(labels: Ints, groups: Ints | None, classes: list[Any], folds: int, seed: int) -> Folds:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    unit, members = ("examples", np.arange(len(labels))) if groups is None else ("groups", groups)
    for k, name in enumerate(classes):
        count = len(np.unique(members[labels == k]))
        if count < (folds if groups is None else 2):
            needed = f"folds={folds}" if groups is None else "2, so that it can be fitted and tested"
            raise OptionError(f"class {name!r} has {count} {unit}, fewer than {needed}.")
    count = len(np.unique(members))
    if count < folds:
        raise OptionError(f"there are {count} {unit}, fewer than folds={folds}.")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    made = list(kind(folds, shuffle=True, random_state=seed).split(labels[:, None], labels, groups))
    for fitted, _ in made:
        absent = np.setdiff1d(np.arange(len(classes)), labels[fitted])
        if len(absent):
            raise OptionError(
                f"all groups with class {classes[absent[0]]!r} came into one fold, so that none is left to fit on: "
                f"ask for more folds than {folds}, try another seed, or give it more groups."
            )
    return made


def _shuffled(labels: Ints, groups: Ints | None, random: np.random.Generator) -> Ints:
    if groups is not None:
        of_group = np.full(int(groups.max()) + 1, -1)
        of_group[groups] = labels
        if (of_group[groups] == labels).all():
            return random.permutation(of_group)[groups]
    return random.permutation(labels)


def _check_numbers(folds: Any, shuffles: Any, confidence: Any, C: Any) -> None:
    for name, value, least in (("folds", folds, 2), ("shuffles", shuffles, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} is {value!r}: expected an integer, {least} or more.")
    if isinstance(confidence, bool) or not isinstance(confidence, float) or not 0 < confidence < 1:
        raise OptionError(f"confidence is {confidence!r}: expected a number between 0 and 1, such as 0.95.")
    if isinstance(C, bool) or not isinstance(C, (int, float)) or not 0 < C < float("inf"):
        raise OptionError(f"C is {C!r}: expected a positive number.")


def _numbered(values: Iterable[Any], what: str, rows: int) -> tuple[list[Any], Ints]:
    """The different values in sorted order, and the number of each example's."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise OptionError(f"{what} is {values!r:.60}: expected one value for each of the {rows} examples.")
    given = [value.item() if hasattr(value, "item") else value for value in values]
    if len(given) != rows:
        raise OptionError(f"{what} has {len(given)} values for {rows} examples.")
    for i, value in enumerate(given):
        if not isinstance(value, (str, int)):
            raise OptionError(f"{what}[{i}] is {value!r}: expected strings, integers or booleans.")
    if len({isinstance(value, str) for value in given}) > 1:
        raise OptionError(f"{what} mixes strings and numbers: which are the same?")
    different = sorted(set(given))
    number = {value: k for k, value in enumerate(different)}
    return different, np.array([number[value] for value in given])
