"""Identity: what makes two activations the same, computed without loading weights."""

import os
import time

import pytest
import torch

from actcache.model import identity, in_memory
from actcache.model.host_memo import HostMemo


def test_config_digest_ignores_labels_and_key_order_but_no_number():
    base = {
        "model_type": "gpt2",
        "n_layer": 2,
        "rope": {"theta": 1.0, "factor": 2.0},
        "layer_types": ["full", {"window": 4, "use_cache": True}],
        "_name_or_path": "a",
        "use_cache": True,
    }
    same = {
        "use_cache": False,
        "_name_or_path": "b",
        "rope": {"factor": 2.0, "theta": 1.0},
        "layer_types": ["full", {"use_cache": False, "window": 4}],
        "n_layer": 2,
        "model_type": "gpt2",
    }
    assert identity.config_digest(base) == identity.config_digest(same)
    for other in (
        {"rope": {"theta": 1.0, "factor": 4.0}},
        {"layer_types": ["full", {"window": 5}]},
        {"layer_types": [{"window": 4}, "full"]},
        {"layer_types": []},
    ):
        assert identity.config_digest({**base, **other}) != identity.config_digest(base)


def test_file_digest_follows_the_bytes_even_when_time_stamps_are_put_back(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"a" * 1000)
    old = time.time_ns() - 10**12
    os.utime(path, ns=(old, old))
    memo = HostMemo(tmp_path / "memo.sqlite")
    before = identity.file_digest(path, memo)
    assert identity.file_digest(path, memo) == before
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(old, old))
    assert identity.file_digest(path, memo) != before


def test_a_remembered_file_whose_time_stamps_are_put_back_is_read_again(tmp_path, monkeypatch):
    """Whoever puts back the time of its last change cannot put back when that was done."""
    monkeypatch.setattr(identity, "_RACY_NS", -1)
    path = tmp_path / "w.bin"
    path.write_bytes(b"a" * 1000)
    old = time.time_ns() - 10**12
    os.utime(path, ns=(old, old))
    memo = HostMemo(tmp_path / "memo.sqlite")
    before, first = identity.file_digest(path, memo), path.stat()
    assert memo._memory
    path.write_bytes(b"b" * 1000)
    while path.stat().st_ctime_ns == first.st_ctime_ns or path.stat().st_mtime_ns != old:
        os.utime(path, ns=(old, old))
    assert (path.stat().st_ino, path.stat().st_size) == (first.st_ino, first.st_size)
    assert identity.file_digest(path, memo) != before


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path):
    """Two writes within one tick of the clock leave the same time stamps."""
    path = tmp_path / "w.bin"
    path.write_bytes(b"a")
    memo = HostMemo(tmp_path / "memo.sqlite")
    identity.file_digest(path, memo)
    assert HostMemo(tmp_path / "memo.sqlite")._memory == {}
    assert memo._memory == {}


def test_a_remembered_digest_survives_the_process(tmp_path):
    first = HostMemo(tmp_path / "memo.sqlite")
    first.put("file", "key", "value")
    assert HostMemo(tmp_path / "memo.sqlite").get("file", "key") == "value"


def test_a_memo_that_cannot_be_written_or_read_is_only_forgotten(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    memo = HostMemo(tmp_path / "file" / "memo.sqlite")
    memo.put("a", "b", "c")
    assert memo.get("a", "b") == "c"
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"not a database" * 100)
    assert HostMemo(damaged).get("a", "b") is None


def test_weight_files_follow_the_shard_index(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "optimizer.bin", "stray.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    names = [p.name for p in identity.weight_files(tmp_path)]
    assert names == ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]


class TestLiveWeights:
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))

    def test_equal_weights_are_equal_wherever_they_lie(self):
        assert in_memory.live_weights_digest(self.model()) == in_memory.live_weights_digest(self.model())

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m[0].weight.data.mul_(1.5),
            lambda m: setattr(m[0], "weight", torch.nn.Parameter(m[0].weight.detach() + 1)),
            lambda m: m[1].running_mean.add_(1),
            lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
            lambda m: m.to(torch.bfloat16),
        ],
        ids=["through .data", "replaced", "a buffer", "load_state_dict", "dtype"],
    )
    def test_changed_weights_are_noticed(self, change):
        model = self.model()
        before = in_memory.live_weights_digest(model)
        assert in_memory.live_weights_digest(model) == before
        with torch.no_grad():
            change(model)
        assert in_memory.live_weights_digest(model) != before

    def test_undoing_a_change_gives_the_first_digest_back(self):
        model = self.model()
        before = in_memory.live_weights_digest(model)
        with torch.no_grad():
            model[0].weight.copy_(model[0].weight + 1)
            changed = in_memory.live_weights_digest(model)
            model.load_state_dict(self.model().state_dict())
        assert changed != before
        assert in_memory.live_weights_digest(model) == before


def test_the_release_of_transformers_counts_where_it_changes_numbers() -> None:
    from importlib.metadata import version

    from actcache.model.loading import open_source
    from actcache.model.options import LoadOptions
    from actcache.testing.tiny import tiny_model

    def values(family: str, **overrides: object) -> dict[str, object]:
        model = tiny_model(family, **overrides)
        return dict(open_source(model, LoadOptions()).identity().values)

    assert values("mamba2", n_groups=2)["transformers"] == version("transformers")
    assert "transformers" not in values("mamba2", n_groups=1)
    assert "transformers" not in values("mamba")
