"""A cache in a file, and in a pickle: nothing is lost, and nothing that is read is run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import actcache as ac
from actcache.errors import FormatError, MissingFileError, UnsavableError
from actcache.testing.tiny import tiny_model

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def newest(old: Any, new: Any) -> Any:
    return new


class OwnList(list[int]):
    pass


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


@pytest.fixture
def full(gpt2: Any) -> ac.ActivationCache:
    positions = {"subject": [[(0, 2)], [(1, 4)]], "last": -1}
    cache = ac.run_with_cache(gpt2, PROMPTS, "transformer.h.*", sites="resid_post", positions=positions)[1]
    cache = ac.ActivationCache.concatenate([cache, cache])
    cache.columns["label"] = ["a", "b", "c", "d"]
    cache.columns["score"] = np.array([1.5, 2.5, 3.5, 4.5])
    cache.add_metadata(model_name="tiny", target_token_positions={"last": -1}, when=(1, None, 2.5, float("inf")))
    cache.add_with_info("noted", torch.ones(4, 2), {"why": torch.arange(3)})
    cache["own text: anything"] = {"a": [1, "two", None, True, 2.5, (3,)], 4: torch.zeros(0, 3)}
    cache["numpy"] = [np.int64(3), np.float32(0.1), np.array(["x", "longer"]), np.arange(4, dtype=np.uint8)]
    cache["kinds"] = [torch.float16, torch.device("cpu"), slice(1, None)]
    cache["dtypes"] = [torch.ones(2).to(dtype) for dtype in (torch.bfloat16, torch.bool, torch.int8)]
    cache.register_aggregation("own*", newest)
    cache.register_aggregation("noted", ac.aggregate.collect)
    return cache


def same(one: ac.ActivationCache, other: ac.ActivationCache) -> None:
    assert one == other
    assert list(one) == list(other)
    assert torch.equal(one.attention_mask, other.attention_mask)
    assert torch.equal(one.input_ids, other.input_ids)
    assert one.metadata == other.metadata
    assert one.columns.keys() == other.columns.keys()
    assert one.columns["score"].tolist() == other.columns["score"].tolist()
    assert one.columns["label"] == other.columns["label"]
    assert one.missed == other.missed
    assert one.tokens == other.tokens
    assert torch.equal(one.map_to_dict("resid_post.1")["subject"], other.map_to_dict("resid_post.1")["subject"])
    assert torch.equal(one.get_layer(-1), other.get_layer(-1))
    for a, b in zip(one.rows("resid_post.2"), other.rows("resid_post.2"), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_lost(full: ac.ActivationCache, tmp_path: Path) -> None:
    full.save(tmp_path / "cache.safetensors")
    loaded = ac.ActivationCache.load(tmp_path / "cache.safetensors")
    assert os.listdir(tmp_path) == ["cache.safetensors"]
    for twin in (loaded, pickle.loads(pickle.dumps(full)), copy.deepcopy(full)):
        same(twin, full)
        assert type(twin["numpy"][0]) is np.int64
        assert twin["own text: anything"][4].shape == (0, 3)
        # Strategies too: the value of "own text" stays, the notes are collected.
        twin.cat(full)
        assert twin["own text: anything"][4].shape == (0, 3)
        assert len(twin["noted"]) == 2
        assert len(twin.rows("resid_post.0")) == 8


def test_outputs_of_models(gpt2: Any, tmp_path: Path) -> None:
    cache = ac.run_with_cache(gpt2, PROMPTS, include_inputs=True)[1]
    cache.save(str(tmp_path / "all"))
    loaded = ac.ActivationCache.load(str(tmp_path / "all"))
    assert loaded == cache
    assert type(loaded[""].output) is type(cache[""].output)
    assert torch.equal(loaded[""].output.logits, cache[""].output.logits)
    assert torch.equal(loaded.transformer.h[-1].hidden, cache.transformer.h[-1].hidden)


@torch.no_grad()
def test_a_refused_site_stays_refused(gpt2: Any, tmp_path: Path) -> None:
    from actcache.capture.entry import MISSING, Entry
    from actcache.capture.joining import Refused

    cache = ac.ActivationCache({"resid_post.0": Refused("rows moved"), "module": Entry([MISSING, torch.ones(1)], None)})
    cache.save(tmp_path / "c")
    loaded = ac.ActivationCache.load(tmp_path / "c")
    with pytest.raises(ac.ActCacheError, match="rows moved"):
        loaded["resid_post.0"]
    assert loaded["module"] == cache["module"]
    assert len(loaded["module"]) == 2


def test_a_view_writes_what_it_shows(tmp_path: Path) -> None:
    big = torch.randn(1000, 1000)
    cache = ac.ActivationCache({"row": big[3:4], "column": big[:, 5], "same": big[3:4], "turned": big[:2, :3].T})
    cache.save(tmp_path / "c")
    assert (tmp_path / "c").stat().st_size < 4_000 * 2 + 24 + 3_000
    loaded = ac.ActivationCache.load(tmp_path / "c")
    assert loaded == cache
    # Tensors that were one still are.
    assert loaded["same"] is loaded["row"]
    loaded["row"].zero_()
    assert big[3].any()
    grad = torch.ones(2, requires_grad=True)
    ac.ActivationCache({"p": torch.nn.Parameter(grad.detach()), "g": grad * 2}).save(tmp_path / "g")
    assert ac.ActivationCache.load(tmp_path / "g")["g"].tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.uint8, torch.int16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    cache = ac.ActivationCache({"x": torch.tensor([[1.0, 2.0]]).to(dtype)})
    cache.save(tmp_path / "c")
    loaded = ac.ActivationCache.load(tmp_path / "c")["x"]
    assert loaded.dtype == dtype
    assert torch.equal(loaded.float(), cache["x"].float())


def test_any_tool_reads_the_tensors(tmp_path: Path) -> None:
    cache = ac.ActivationCache({"resid_post.0": torch.arange(6.0).reshape(1, 2, 3)})
    cache.save(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="np") as file:
        header = json.loads(file.metadata()["actcache.activation_cache"])
        ((key, value),) = header["items"]
        assert key == "resid_post.0"
        assert file.get_tensor(value["tensor"]).tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) & 0o077 == 0o077 & 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "'bad' cannot be saved: it holds a builtins.object"),
        ([1, {"deep": {3}}], r"'bad'\[1\]\['deep'\] cannot be saved: it holds a builtins.set"),
        (b"bytes", "bytes"),
        (OwnList([1]), "OwnList"),
        (ac.ValueWithInfo(1, object()), "the info of 'bad'"),
        (torch.eye(2).to_sparse(), "sparse"),
        (np.array([object()]), "object"),
    ],
)
def test_what_cannot_be_saved_leaves_the_file_as_it_was(value: Any, message: str, tmp_path: Path) -> None:
    ac.ActivationCache({"good": 1}).save(tmp_path / "c")
    with pytest.raises(UnsavableError, match=message) as caught:
        ac.ActivationCache({"good": 2, "bad": value}).save(tmp_path / "c")
    assert isinstance(caught.value, TypeError)
    assert ac.ActivationCache.load(tmp_path / "c")["good"] == 1
    assert os.listdir(tmp_path) == ["c"]


def test_strategies_are_imported_when_they_are_needed(tmp_path: Path) -> None:
    cache = ac.ActivationCache({"x": torch.ones(1)})
    cache.register_aggregation("x", lambda old, new: new)
    with pytest.raises(UnsavableError, match="registered for 'x'"):
        cache.save(tmp_path / "c")
    cache.register_aggregation("x", newest)
    cache.save(tmp_path / "c")
    data = (tmp_path / "c").read_bytes()
    assert b"test_saving:newest" in data
    (tmp_path / "c").write_bytes(data.replace(b"test_saving:newest", b"no_such_mod:newest"))
    loaded = ac.ActivationCache.load(tmp_path / "c")
    with pytest.raises(ac.ActCacheError, match="no_such_mod"):
        loaded.cat(cache)
    loaded.save(tmp_path / "again")
    loaded.remove_aggregation("x")
    assert len(loaded.cat(cache)["x"]) == 2


def test_files_that_are_no_caches(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no file") as caught:
        ac.ActivationCache.load(tmp_path / "nothing")
    assert isinstance(caught.value, FileNotFoundError)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match="no safetensors file"):
        ac.ActivationCache.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(FormatError, match="does not hold a cache"):
        ac.ActivationCache.load(tmp_path / "other")
    header = {"format": "actcache.activation_cache", "version": 99}
    save_file({}, tmp_path / "newer", metadata={"actcache.activation_cache": json.dumps(header)})
    with pytest.raises(FormatError, match="version 99"):
        ac.ActivationCache.load(tmp_path / "newer")


def test_a_file_names_no_class_of_its_own(tmp_path: Path) -> None:
    value = {"output": ["os:system", [["logits", 1]]]}
    deeper = {"output": ["transformers.utils:os.system", [["logits", 1]]]}
    header = {
        "format": "actcache.activation_cache", "version": 1, "items": [["a", value], ["b", deeper]], "tables": [],
        "masks": {"dict": []}, "columns": {}, "metadata": {}, "strategies": [], "new": [], "depths": [], "missed": [],
        "tokens": None, "batches": 1, "saved": 0.0,
    }  # fmt: skip
    save_file({}, tmp_path / "c", metadata={"actcache.activation_cache": json.dumps(header)})
    loaded = ac.ActivationCache.load(tmp_path / "c")
    assert loaded["a"] == loaded["b"] == {"logits": 1}


def test_a_subclass_comes_back_as_what_loads_it(tmp_path: Path) -> None:
    class Mine(ac.ActivationCache):
        pass

    Mine({"x": 1}).save(tmp_path / "c")
    assert type(Mine.load(tmp_path / "c")) is Mine
    assert type(Mine({"x": 1}) | {"y": 2}) is Mine


def test_saved_caches_are_found_by_what_is_said_of_them(tmp_path: Path) -> None:
    def saved(folder: Path, **fields: Any) -> Path:
        cache = ac.ActivationCache({"resid_post.3": torch.ones(1, 2) * len(fields)})
        cache.add_metadata(
            model_name="gpt2",
            target_token_positions={"last": -1},
            extraction_config={"sites": ["resid_post"]},
            **fields,
        )
        return cache.save(folder)

    (tmp_path / "one").mkdir()
    # In one second, and of the same content: two files.
    first, second = saved(tmp_path, tag="a"), saved(tmp_path, tag="a")
    third = saved(tmp_path / "one", tag="b", seed=7, interventions=["zero"])
    named = saved(tmp_path / "by name", tag="b", vector=torch.ones(2))
    assert len({first, second, third, named}) == 4
    assert named == tmp_path / "by name"
    (tmp_path / "note.txt").write_text("no cache")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")

    def paths(**fields: Any) -> list[Path]:
        return [one.path for one in ac.ActivationCache.saved(tmp_path, **fields)]

    assert paths() == [first, second, third, named]
    assert paths(tag="a") == [first, second]
    assert paths(tag="b", seed=7) == [third]
    assert paths(interventions=["zero"]) == [third]
    assert paths(target_token_positions={"last": -1}) == [first, second, third, named]
    assert paths(vector=torch.ones(2)) == [named]
    assert paths(tag="c") == paths(sed=7) == paths(seed=7.5) == []
    newest = ac.ActivationCache.saved(tmp_path)[-1]
    assert newest.keys == ["resid_post.3"]
    assert newest.load()["resid_post.3"].tolist() == [[2, 2]]
    assert newest.load().metadata["tag"] == newest.metadata["tag"] == "b"
    # A cache is its file, wherever that goes.
    (tmp_path / "one").rename(tmp_path / "two")
    (one,) = ac.ActivationCache.saved(tmp_path, seed=7)
    assert one.path == tmp_path / "two" / third.name
    one.path.unlink()
    assert paths(seed=7) == []
    assert list((tmp_path / "two").iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    cache = ac.ActivationCache({"x": 1})
    with pytest.raises(MissingFileError, match=r"no folder .*nowhere.* make it first"):
        cache.save(tmp_path / "nowhere" / "c")
    with pytest.raises(MissingFileError, match=r"no folder .*nowhere"):
        ac.ActivationCache.saved(tmp_path / "nowhere")
    cache.add_metadata(interventions=object())
    with pytest.raises(UnsavableError, match="metadata 'interventions'"):
        cache.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
