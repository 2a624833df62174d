"""Whole runs that end badly: stores and models out of reach, workers that cannot begin, drivers that are told to stop,
too much that fails. Slow ones all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actcache as ac
from actcache.errors import BackendError, ModelLoadError, PartialWarmupError, StoreAccessError, WorkersError
from children import children
from distributed_helpers import (
    OPTIONS,
    PROMPTS,
    WHOLE_RUNS,
    arguments,
    check_stored,
    expected,
    folder,
    make_model,
    set_fault,
    stored,
    write,
)

__all__ = ["expected", "folder"]

pytestmark = WHOLE_RUNS


def command(folder: Path, source: Path, store: Path, engine: str) -> list[str]:
    return [
        sys.executable, "-m", "actcache", "warmup", str(folder), str(source), "--engine", engine, "--num-workers", "2",
        "--unit-prompts", "12", "--batch-size", "2", "--store", str(store),
    ]  # fmt: skip


def workers_of_this_process() -> list[int]:
    lines = {}
    for pid in children():
        try:
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
    return [pid for pid, line in lines.items() if b"actcache.distributed" in line]


def test_a_folder_that_workers_do_not_see(
    engine: str, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone between the driver's look and theirs, as one that other machines do not have is."""
    source = write(tmp_path / "prompts.jsonl")
    with monkeypatch.context() as during:
        set_fault(during, gone=str(tmp_path / "s"))
        with pytest.raises(StoreAccessError, match=r"the folder of the store, .* is not on this machine"):
            ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments(engine))
    assert workers_of_this_process() == []
    if engine == "local":
        # Nothing that would be in the way is left of it.
        assert ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments(engine)).total_prompts == 160
        check_stored(tmp_path / "s", expected)


def test_a_model_that_workers_do_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_model(tmp_path / "model")
    source = write(tmp_path / "prompts.jsonl")
    set_fault(monkeypatch, gone=str(made))
    with pytest.raises(ModelLoadError, match="model"):
        ac.warmup_distributed(source, made, store=tmp_path / "s", **arguments("local"))
    assert workers_of_this_process() == [] and stored(tmp_path / "s") == 0


def test_a_bucket_that_workers_cannot_reach(
    bucket: str, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "prompts.jsonl")
    place = bucket + "/run"
    with monkeypatch.context() as during:
        nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "ACTCACHE_DEADLINE_S": "0.5"}
        set_fault(during, environment=nowhere)
        with pytest.raises((BackendError, StoreAccessError), match=r"127\.0\.0\.1:9"):
            ac.warmup_distributed(source, folder, store=place, **arguments("local"))
    assert workers_of_this_process() == []
    stats = ac.warmup_distributed(source, folder, store=place, **arguments("local"))
    assert stats.activations_extracted + stats.activations_cached == 160
    check_stored(place, expected, index_dir=tmp_path / "fresh")


def test_workers_that_end_before_they_begin(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_fault(monkeypatch, ends=7)
    with pytest.raises(WorkersError, match="workers end before they are ready: one ended with status 7"):
        ac.warmup_distributed(write(tmp_path / "p.jsonl"), folder, store=tmp_path / "s", **arguments("local"))
    assert workers_of_this_process() == []


def test_what_workers_cannot_import(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module that only this process has: an error, and no run that waits without end."""
    module = types.ModuleType("only_here")
    exec("def first(rows):\n    return rows[0]", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    source = write(tmp_path / "p.jsonl")
    with pytest.raises(WorkersError, match=r"ended with status 1 \(ModuleNotFoundError: No module named 'only_here'"):
        ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments("local", pooling=module.first))
    assert workers_of_this_process() == []


def test_sigterm_ends_driver_and_workers(
    engine: str, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systems stop services: the driver alone is told. The same command goes on."""
    source = write(tmp_path / "prompts.jsonl")
    before = children()
    line = command(folder, source, tmp_path / "s", engine)
    line += ["--num-cpus-per-worker", "0.5"] if engine == "ray" else []
    with monkeypatch.context() as during:
        set_fault(during, slow=0.2)
        driver = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while stored(tmp_path / "s") == 0:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.send_signal(signal.SIGTERM)
        out, err = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 1, err
    assert out == "" and "actcache: stopped" in err.splitlines()[-1] and "Traceback" not in err, err
    # What it had started has ended with it, or does so now.
    while left := [pid for pid in children() - before if pid != driver.pid]:
        assert time.monotonic() < deadline, left
        for pid in left:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    found = stored(tmp_path / "s")
    assert 0 < found < 160
    stats = ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments("local"))
    assert (stats.activations_cached, stats.activations_extracted) == (found, 160 - found)
    check_stored(tmp_path / "s", expected)


def test_more_failed_prompts_than_the_stated_share_end_a_run(
    engine: str, folder: Path, tmp_path: Path, expected: Any
) -> None:
    """What was finished by then is stored."""
    source = write(tmp_path / "prompts.jsonl", [*PROMPTS, *[[999]] * 2000])
    with pytest.raises(PartialWarmupError, match=r"more than max_failed=0.1 of .*: the run was ended") as caught:
        ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments(engine, unit_prompts=40))
    # Of a thousand prompts at least; each worker has at most one more unit in hand.
    assert 100 < caught.value.count <= 260
    stats: Any = caught.value.stats
    assert stats.total_prompts < 600
    # The last unit of the other one may be stored and not counted.
    assert stats.activations_extracted <= stored(tmp_path / "s") <= 160
    again = ac.UnifiedCache(folder, store=tmp_path / "s", **OPTIONS)
    values = again.get_activations(PROMPTS)[0].numpy().reshape(expected.shape)
    np.testing.assert_allclose(values, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_a_cluster_that_loses_a_machine(
    folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, each with room for one worker and half of a GPU for it; what it had in hand is done by the other.
    What Ray says of it is not where the JSON is."""
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "together").mkdir()
    # Both have begun when the first batch is stored; the environment is that of the machines.
    set_fault(monkeypatch, slow=0.2, together=str(tmp_path / "together"))
    source = write(tmp_path / "prompts.jsonl")
    room = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=room)
    try:
        other = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 << 20)
        line = [
            *command(folder, source, tmp_path / "s", "ray"), "--address", cluster.address, "--num-cpus-per-worker", "1",
            "--num-gpus-per-worker", "0.5", "--json",
        ]  # fmt: skip
        driver = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 200
            while stored(tmp_path / "s") < 30:
                assert driver.poll() is None, driver.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            cluster.remove_node(other, allow_graceful=False)
            out, err = driver.communicate(timeout=200)
        finally:
            driver.kill()
    finally:
        cluster.shutdown()
        ray.shutdown()
    assert driver.returncode == 0, err
    said = json.loads(out)
    assert (said["total_prompts"], said["activations_cached"] + said["activations_extracted"]) == (160, 160)
    assert "another one takes its place" in err
    check_stored(tmp_path / "s", expected)
