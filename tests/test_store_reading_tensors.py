"""Tensors in and out of a store: what is written is read, what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from actcache.errors import NotCachedError
from actcache.store.backend import MemoryBackend
from actcache.store.records import Records
from actcache.store.spaces import new_space
from bucket_helpers import opened
from store_helpers import make_store, make_table


def test_sites_of_different_lengths_are_not_stretched(tmp_path: Path) -> None:
    """Texts stored without a tokenizer may have been cut differently; one row must not pass for three."""
    store, space = make_store(tmp_path)
    store.write(space, ["a"], {"x": [np.ones((3, 2), np.float32)]})
    store.write(space, ["a"], {"y": [np.ones((1, 2), np.float32)]})
    place = store.locate(space, texts=["a"], text_context="external", sites=["x", "y"], layout="tokens")
    with pytest.raises(ValueError, match="'y' has 1 rows and 'x' has 3"):
        place.take_padded()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_vectors_of_different_widths_do_not_share_a_tensor(tmp_path: Path, elsewhere: bool, given: bool) -> None:
    torch = pytest.importorskip("torch")
    store, space = opened(MemoryBackend() if elsewhere else tmp_path / "store", tmp_path / "index")
    with store:
        for prompts, width in ((range(40), 8), (range(40, 80), 16)):
            table = make_table(prompts)
            store.append(space, Records.pooled(table, "mean", {"a": np.ones((len(table), width), np.float32)}))
        out = torch.empty(80, 8) if given else None
        with pytest.raises(ValueError, match=r"different widths \[8, 16\] cannot share one tensor: read them apart"):
            store.read(space, make_table(range(80)), "a", pooling="mean", out=out)


def test_write_and_read_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store, _ = make_store(tmp_path)
    space = new_space("gpt2", note="mine")
    prompts = ["a b c", [1, 2], [{"role": "user", "content": "hi"}]]
    values = [torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 4)]
    assert store.write(space, prompts, {"resid_post.3": values}) == 3
    assert new_space("gpt2", note="mine").space == space.space
    assert new_space("gpt2", note="other").space != space.space
    for found, right in zip(store.read(space, prompts[::-1], "resid_post.3"), values[::-1], strict=True):
        assert torch.equal(found, right)
    assert all(map(torch.equal, store.read(space, None, "resid_post.3"), values))
    assert store.contains(space, [*prompts, "no"], "resid_post.3").tolist() == [True, True, True, False]
    last = store.read(space, prompts, "resid_post.3", positions=-1, dtype="float64")
    assert torch.equal(last[2], values[2][-1:].double())
    several = store.read(space, [prompts[0]], "resid_post.3", positions=["first", (1, 3), -1])
    assert torch.equal(several[0], values[0][[0, 1, 2, 2]])
    with pytest.raises(ValueError, match="positions"):
        store.read(space, prompts, "resid_post.3", positions="middle")
    with pytest.raises(NotCachedError, match="1 of 2"):
        store.read(space, ["a b c", "no"], "resid_post.3")
    with pytest.raises(IndexError):
        store.read(space, prompts, "resid_post.3", positions=2)


def test_write_and_read_pooled_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store, _ = make_store(tmp_path)
    space = new_space("gpt2")
    values = torch.randn(3, 4).to(torch.bfloat16)
    store.write(space, ["a", "b", [7]], {"embed": list(values)}, pooling="mean")
    found = store.read(space, [[7], "b", "a"], "embed", pooling="mean")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values.flip(0))
    found[:] = 0
    out = torch.empty(1, 4)
    assert store.read(space, "b", "embed", pooling="mean", out=out) is out
    assert torch.equal(out[0], values[1].float())


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    space = new_space("gpt2")
    with pytest.raises(ValueError, match="2 values for 1 prompts"):
        store.write(space, ["a"], {"embed": [np.ones((1, 2))] * 2})
    with pytest.raises(ValueError, match=r"shape \[3, 2\], expected \[2, D\]"):
        store.write(space, [[1, 2]], {"embed": [np.ones((3, 2))]})
    with pytest.raises(ValueError, match=r"expected \[D\]"):
        store.write(space, ["a"], {"embed": [np.ones((1, 2))]}, pooling="mean")
    with pytest.raises(TypeError):
        store.write(space, [3.5], {"embed": [np.ones((1, 2))]})
    with pytest.raises(ValueError, match="empty"):
        store.read(space, [], "embed")
    assert not store.root.exists()
