"""The probe of each layer, against scikit-learn's own cross-validation, and the interval against simulation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import actcache as ac
from actcache.errors import OptionError
from actcache.probing.probe import interval

RNG = np.random.default_rng(7)
Y = np.array(["cat", "dog", "eel"])[RNG.integers(0, 3, 120)]
GROUPS = RNG.integers(0, 24, 120)
# The second layer knows the class, the third the group, the first nothing.
X = RNG.standard_normal((120, 3, 8)).astype(np.float32)
X[:, 1, :3] += 2 * (Y[:, None] == ["cat", "dog", "eel"])
X[:, 2] += 9 * RNG.standard_normal((24, 8))[GROUPS]


def by_scikit_learn(rows: Any, y: Any, groups: Any = None, folds: int = 5, seed: int = 0, C: float = 1.0) -> Any:
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    splitter = kind(folds, shuffle=True, random_state=seed)
    return cross_val_predict(probe, rows.astype(np.float64), y, groups=groups, cv=splitter)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize(("folds", "seed", "C"), [(5, 0, 1.0), (3, 4, 0.01)])
def test_predictions_are_those_of_scikit_learn(groups: Any, folds: int, seed: int, C: float) -> None:
    report = ac.probe_by_layer(X, Y, groups, folds=folds, seed=seed, C=C, shuffles=0)
    for layer in range(3):
        expected = by_scikit_learn(X[:, layer], Y, groups, folds, seed, C)
        np.testing.assert_array_equal(report.predictions[layer], expected)
        assert report.accuracy[layer] == (expected == Y).mean()
    assert report.best_layer == 1 and report.shuffled is None and report.converged.all()
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed)
    majority = cross_val_predict(DummyClassifier(strategy="most_frequent"), Y[:, None], Y, groups=groups, cv=splitter)
    assert report.majority == (majority == Y).mean()
    assert ((report.low <= report.accuracy) & (report.accuracy <= report.high)).all()


def test_groups_are_not_recognised_again() -> None:
    """Each group has one class, and vectors that tell nothing but the group."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    y = rng.permutation(np.arange(40) % 2)[groups]
    rows = (rng.standard_normal((40, 64))[groups] + 0.1 * rng.standard_normal((400, 64)))[:, None]
    naive, honest = ac.probe_by_layer(rows, y), ac.probe_by_layer(rows, y, groups)
    assert naive.accuracy[0] > 0.95
    assert honest.low[0] < 0.5 < honest.high[0]
    assert honest.groups == 40 and naive.groups is None
    # Shuffling whole groups leaves the naive probe nothing to hold on to either.
    assert honest.shuffled is not None and 0.25 < honest.shuffled[0] < 0.75


def test_shuffled_labels_are_at_chance_where_the_probe_is_not() -> None:
    report = ac.probe_by_layer(X, Y, shuffles=3)
    assert report.shuffled is not None
    assert report.accuracy[1] > 0.8
    assert (np.abs(report.shuffled - 1 / 3) < 0.12).all()


def test_the_same_seed_gives_the_same_report() -> None:
    one, same, other = (ac.probe_by_layer(X, Y, GROUPS, seed=seed) for seed in (1, 1, 2))
    assert one.table() == same.table()
    np.testing.assert_array_equal(one.predictions, same.predictions)
    assert one.table() != other.table()


def test_forms_of_the_arguments() -> None:
    report = ac.probe_by_layer(X, Y, shuffles=0)
    named = ac.probe_by_layer({k: X[:, k] for k in (2, 1)}, list(Y), shuffles=0)
    assert named.layers == [2, 1] and named.best_layer == 1
    np.testing.assert_array_equal(named.accuracy, report.accuracy[[2, 1]])
    truth = ac.probe_by_layer(X, Y == "cat", shuffles=0)
    assert truth.classes == [False, True] and set(truth.predictions.ravel()) == {False, True}
    numbers = ac.probe_by_layer(X, (Y == "cat").astype(np.int32), [f"g{g}" for g in GROUPS], shuffles=0)
    assert numbers.classes == [0, 1]


def wilson(right: int, n: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """The roots of ``(p - share)^2 = z^2 p (1 - p) / n`` in p, which is what Wilson's interval is."""
    share = right / n
    roots = np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2])
    return float(min(roots.real)), float(max(roots.real))


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (450, 500)])
def test_the_interval_without_groups_is_wilsons(right: int, n: int) -> None:
    np.testing.assert_allclose(interval(np.arange(n) < right, None, 0.95), wilson(right, n), atol=1e-9)


def test_examples_that_say_the_same_count_once() -> None:
    right = np.arange(30) < 21
    alone = interval(right, np.arange(30), 0.95)
    tenfold = interval(np.repeat(right, 10), np.repeat(np.arange(30), 10), 0.95)
    # 29 / 30 of the groups are free, as in any estimated variance.
    np.testing.assert_allclose(tenfold, wilson(21 * 29 / 30, 29), atol=1e-9)
    np.testing.assert_allclose(alone, tenfold, atol=1e-9)
    assert interval(np.ones(300, bool), np.repeat(np.arange(30), 10), 0.95) == pytest.approx(wilson(30, 30))


@pytest.mark.parametrize("within", [1.0, 5.0])
def test_the_interval_covers_what_it_promises(within: float) -> None:
    """40 groups of unequal sizes, whose members are more alike the smaller `within` is."""
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(1000):
        groups = np.repeat(np.arange(40), rng.integers(4, 17, 40))
        chance = rng.beta(0.8 * within, 0.2 * within, 40)[groups]
        right = rng.random(len(groups)) < chance
        low, high = interval(right, groups, 0.95)
        covered += low <= 0.8 <= high
        low, high = interval(right, None, 0.95)
        naive += low <= 0.8 <= high
    assert covered > 910
    assert naive < covered - 50


def test_the_table_says_what_the_numbers_are_held_against() -> None:
    report = ac.probe_by_layer(X, Y, GROUPS)
    assert repr(report) == report.table()
    first, head, *lines, last = report.table().splitlines()
    assert first.startswith("120 examples of 24 groups, 3 classes, 5 folds; ")
    assert head.split() == ["layer", "accuracy", "95", "%", "interval", "shuffled"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]
    assert [line.endswith("best") for line in lines] == [False, True, False]
    assert f"{report.accuracy[1]:.3f}" in lines[1]
    # The best of many layers is good on noise, too.
    assert report.shuffled is not None
    by_chance = f"with shuffled labels the best has {report.shuffled.max():.3f}"
    assert last == f"the best of 3 was chosen by these examples: measure it on others; {by_chance}"
    alone = ac.probe_by_layer(X[:, 1:2], Y, GROUPS, shuffles=0).table().splitlines()
    assert len(alone) == 3 and "chosen" not in alone[-1]


def test_probes_that_do_not_converge_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actcache.probing.probe._ITERATIONS", 1)
    report = ac.probe_by_layer(X, Y, shuffles=0)
    assert not report.converged.any()
    assert "not converged" in report.table()


def test_the_plot_shows_what_the_report_holds(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = ac.probe_by_layer(X, Y)
    ax = report.plot()
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), report.accuracy)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), report.shuffled)
    assert {t.get_text() for t in ax.get_xticklabels()} == {"0", "1", "2"}
    assert report.plot(ax) is ax
    ax.figure.savefig(tmp_path / "plot.png")
    plt.close("all")


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "probe"), ("matplotlib", "viz")])
def test_without_its_package_the_extra_is_named(package: str, extra: str) -> None:
    code = f"""
import sys; sys.modules[{package!r}] = None
import numpy as np, actcache as ac
X, y = np.random.default_rng(0).standard_normal((10, 1, 2)), [0, 1] * 5
try:
    ac.probe_by_layer(X, y, shuffles=0).plot()
except ac.errors.MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"actcache[{extra}]" in done.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": X[:, 0]}, r"X\[:, None\]"),
        ({"X": X[:-1]}, "120 values for 119"),
        ({"X": np.where(X[3, 1, 2] == X, np.inf, X)}, "row 3"),
        ({"y": ["cat"] * 120}, "one class 'cat'"),
        ({"y": [None, *Y[1:]]}, r"y\[0\] is None"),
        ({"y": np.arange(120) / 7}, r"y\[0\] is 0.0"),
        ({"y": [1, *Y[1:]]}, "mixes"),
        ({"y": "cat"}, "one value for each"),
        ({"y": ["rare", "rare", *Y[2:]]}, "'rare' has 2 examples"),
        ({"y": np.where(GROUPS == 5, "rare", Y), "groups": GROUPS}, "'rare' has 1 groups"),
        ({"groups": GROUPS % 4}, "4 groups, fewer than folds=5"),
        ({"groups": GROUPS[:5]}, "groups has 5 values"),
        ({"folds": 1}, "folds is 1"),
        ({"shuffles": -1}, "shuffles is -1"),
        ({"confidence": 95}, "confidence is 95"),
        ({"C": 0}, "C is 0"),
    ],
)
def test_what_does_not_fit_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ac.probe_by_layer(**({"X": X, "y": Y} | changed))
