"""Reading in another dtype and into a given tensor: what would change a value silently is refused before anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.errors import OptionError, ValueOverflowError
from actcache.store import reading
from actcache.store.store import Store

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, Any]:
    """Vectors, some beyond float16, token rows, and integers."""
    store, space = Store(tmp_path / "store", index_dir=tmp_path / "index"), ac.new_space("m")
    rows = torch.randn(4, 8)
    big = rows.clone()
    big[2, 5] = -70000.0
    ids = torch.tensor([[1, 2], [3, 300], [70000, -5], [7, 8]], dtype=torch.int32)
    store.write(space, NAMES, {"x": list(rows), "big": list(big), "ids": list(ids)}, pooling="mean")
    store.write(space, NAMES, {"x": [big[: i + 1] for i in range(4)]})
    return store, space


def refuse_to_look(*_: object, **__: object) -> Any:
    raise AssertionError("the store was looked at")


REFUSED = ["int8", "int64", torch.int32, torch.uint8, np.int16, np.dtype(np.int64), "bool", torch.bool]
# torch takes what is too large for float8 to its largest number.
UNKNOWN = [torch.float8_e4m3fn, "float8_e5m2", torch.complex64, "complex128", "flaot16", "Tensor", "int4", float, 16]


@pytest.mark.parametrize("dtype", [*REFUSED, *UNKNOWN], ids=str)
@pytest.mark.parametrize("site", ["x", "ids"])
@pytest.mark.parametrize("pooling", ["mean", None])
def test_dtypes_that_are_not_floating_are_refused_before_anything(
    stored: tuple[Store, Any], monkeypatch: pytest.MonkeyPatch, dtype: Any, site: str, pooling: str | None
) -> None:
    """Integers would wrap: 300 read as int8 is 44."""
    monkeypatch.setattr(reading, "locate_any", refuse_to_look)
    store, space = stored
    with pytest.raises(OptionError, match="bfloat16"):
        store.read(space, NAMES, site, pooling=pooling, dtype=dtype)


def test_a_misspelt_dtype_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="Did you mean 'bfloat16'"):
        reading.reading_dtype("bflaot16")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", torch.float64), (torch.bfloat16, torch.bfloat16), (np.float64, torch.float64),
        (np.dtype("float32"), torch.float32), (None, torch.float32),
    ],
)  # fmt: skip
def test_floating_dtypes_by_any_of_their_names(stored: tuple[Store, Any], dtype: Any, expected: torch.dtype) -> None:
    store, space = stored
    found = store.read(space, NAMES, "x", pooling="mean", dtype=dtype)
    assert found.dtype == expected
    assert torch.equal(found, store.read(space, NAMES, "x", pooling="mean").to(expected))
    assert store.read(space, NAMES, "x", dtype=dtype)[3].dtype == expected


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_what_becomes_inf_is_named_and_can_be_allowed(stored: tuple[Store, Any], dtype: Any) -> None:
    store, space = stored
    pattern = r"prompt 2, big: the value -70000 becomes -inf in torch.float16: .* bfloat16 .*allow_inf=True"
    with pytest.raises(ValueOverflowError, match=pattern):
        store.read(space, NAMES, "big", pooling="mean", dtype=dtype)
    with pytest.raises(ValueOverflowError, match=r"prompt 1, big"):
        store.read(space, ["a", "c"], "big", pooling="mean", dtype=dtype)
    with pytest.raises(ValueOverflowError, match=r"prompt 3, x: the value -70000"):
        store.read(space, ["a", "b", "b", "d"], "x", dtype=dtype)
    found = store.read(space, NAMES, "big", pooling="mean", dtype=dtype, allow_inf=True)
    exact = store.read(space, NAMES, "big", pooling="mean")
    assert torch.equal(found, exact.half())
    assert found.isfinite().sum() == 31
    assert store.read(space, ["d"], "x", dtype=dtype, allow_inf=True)[0][2, 5] == -torch.inf
    with pytest.raises(ValueOverflowError, match="70000"):
        store.read(space, NAMES, "ids", pooling="mean", dtype=dtype)
    assert store.read(space, NAMES, "ids", pooling="mean", dtype="float32")[2].tolist() == [70000, -5]


def test_inf_that_is_stored_is_read_in_any_dtype(tmp_path: Path) -> None:
    store, space = Store(tmp_path), ac.new_space("m")
    store.write(space, ["a"], {"x": [torch.tensor([torch.inf, torch.nan, 1])]}, pooling="mean")
    found = store.read(space, ["a"], "x", pooling="mean", dtype="float16")[0]
    assert found[0] == torch.inf
    assert found[1].isnan()


BAD_OUT: dict[str, Any] = {
    "another number of prompts": lambda: torch.zeros(3, 8),
    "no tensor": lambda: np.zeros((4, 8), np.float32),
    "one dimension": lambda: torch.zeros(32),
    "three dimensions": lambda: torch.zeros(4, 1, 8),
    "complex numbers": lambda: torch.zeros(4, 8, dtype=torch.complex64),
    "booleans": lambda: torch.zeros(4, 8, dtype=torch.bool),
    "rows that share memory": lambda: torch.zeros(8).expand(4, 8),
    "gradients": lambda: torch.zeros(4, 8, requires_grad=True),
}


@pytest.mark.parametrize("case", BAD_OUT)
def test_an_out_that_does_not_fit_is_refused_before_anything(
    stored: tuple[Store, Any], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(reading, "locate_any", refuse_to_look)
    store, space = stored
    with pytest.raises(OptionError, match="out "):
        store.read(space, NAMES, "x", pooling="mean", out=BAD_OUT[case]())


def test_out_where_it_cannot_mean_anything(stored: tuple[Store, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "locate_any", refuse_to_look)
    store, space = stored
    with pytest.raises(OptionError, match="pooled"):
        store.read(space, NAMES, "x", out=torch.zeros(4, 8))
    with pytest.raises(OptionError, match=r"float32, and dtype=torch.float64"):
        store.read(space, NAMES, "x", pooling="mean", out=torch.zeros(4, 8), dtype="float64")
    with pytest.raises(OptionError, match="positions='last'"):
        store.read(space, NAMES, "x", pooling="mean", positions="last")


def test_what_only_the_stored_vectors_tell_leaves_out_untouched(stored: tuple[Store, Any]) -> None:
    store, space = stored
    cases = [
        ("x", torch.zeros(4, 9), r"\[4, 9\], expected .*\[4, 8\]"),
        ("x", torch.zeros(4, 8, dtype=torch.int64), "int64"),
        ("ids", torch.zeros(4, 2, dtype=torch.int8), "int8"),
        ("x", torch.zeros(4, 8, dtype=torch.float8_e4m3fn), "float8"),
        ("ids", torch.zeros(4, 2, dtype=torch.uint8), "uint8"),
    ]
    for site, out, pattern in cases:
        with pytest.raises(OptionError, match=pattern):
            store.read(space, NAMES, site, pooling="mean", out=out)
        assert not out.float().any()


def test_out_in_any_order_and_dtype_that_holds_the_values(stored: tuple[Store, Any]) -> None:
    store, space = stored
    right = store.read(space, NAMES, "big", pooling="mean")
    wide = torch.zeros(4, 16, dtype=torch.float64)
    for out in (torch.zeros(8, 4).t(), wide[:, ::2], torch.zeros(4, 8, dtype=torch.bfloat16)):
        assert store.read(space, None, "big", pooling="mean", out=out) is out
        assert torch.equal(out, right.to(out.dtype))
    assert not wide[:, 1::2].any()
    ids = store.read(space, NAMES, "ids", pooling="mean")
    for out in (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64).t()):
        assert torch.equal(store.read(space, NAMES, "ids", pooling="mean", out=out), ids.long())
    half = torch.zeros(4, 8, dtype=torch.float16)
    with pytest.raises(ValueOverflowError, match="prompt 2, big"):
        store.read(space, NAMES, "big", pooling="mean", out=half)
    store.read(space, NAMES, "big", pooling="mean", out=half, allow_inf=True)
    assert torch.equal(half, right.half())
