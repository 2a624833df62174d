"""Every byte of a tensor counts, wherever it lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.model import checksum as module
from actcache.model.checksum import checksum, local_checksum

BOTH = pytest.mark.parametrize("checksum", [checksum, local_checksum], ids=["anywhere", "local"])


@BOTH
@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40_000), data=st.data())
def test_no_byte_can_change_unnoticed(checksum: Callable[..., int], size: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before = checksum(tensor)
    at = data.draw(st.integers(0, size - 1))
    tensor[at] ^= data.draw(st.integers(1, 255))
    assert checksum(tensor) != before


@BOTH
def test_values_that_change_places_are_noticed(checksum: Callable[..., int]) -> None:
    tensor = torch.randn(64, 512)
    before = checksum(tensor)
    assert checksum(tensor[torch.randperm(64, generator=torch.Generator().manual_seed(0))]) != before
    assert checksum(tensor.flip(1)) != before
    assert checksum(tensor.clone()) == before


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_dtypes_and_layouts(checksum: Callable[..., int], dtype: torch.dtype) -> None:
    values = torch.randn(300, 700)
    tensor = values > 0 if dtype is torch.bool else (values * 9).to(dtype)
    assert checksum(tensor.T) == checksum(tensor.T.contiguous())
    assert checksum(tensor.T) != checksum(tensor)
    # A slice that begins at an odd place in memory has the bytes of its copy.
    assert checksum(tensor.view(-1)[3:]) == checksum(tensor.view(-1)[3:].clone())
    assert checksum(tensor[:0]) == 0
    assert checksum(tensor.to("meta")) == 0


def test_it_is_the_same_where_products_of_integers_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(700, 4096)
    expected = checksum(tensor)
    # As on an accelerator, whose matrix products know no integers.
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    monkeypatch.setattr(module, "_CHUNK", 64)
    assert checksum(tensor) == local_checksum(tensor) == expected
