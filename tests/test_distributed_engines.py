"""Whole runs with real processes and a real Ray: killed workers and drivers, folders and buckets. Slow ones all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import actcache as ac
from actcache.distributed import dispatch
from actcache.errors import OptionError, PartialWarmupError, WorkersError
from children import children, end_all_but
from distributed_helpers import (
    OPTIONS,
    PROMPTS,
    WHOLE_RUNS,
    arguments,
    check_stored,
    expected,
    folder,
    set_fault,
    stored,
    write,
)

__all__ = ["expected", "folder"]

pytestmark = WHOLE_RUNS


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Where the store is: a folder, or a bucket of a server that speaks S3."""
    return tmp_path / "store" if request.param == "folder" else request.getfixturevalue("bucket") + "/run"


def test_two_workers_store_what_bare_forwards_give(
    engine: str, place: Any, folder: Path, tmp_path: Path, expected: Any
) -> None:
    source = write(tmp_path / "prompts.jsonl")
    stats = ac.warmup_distributed(source, folder, store=place, **arguments(engine))
    assert (stats.total_prompts, stats.activations_extracted, stats.activations_cached) == (160, 160, 0)
    assert stats.tokens_extracted == sum(map(len, PROMPTS))
    assert stats.elapsed_seconds > 0
    check_stored(place, expected, index_dir=tmp_path / "fresh")
    again = ac.warmup_distributed(source, folder, store=place, **arguments(engine))
    assert (again.total_prompts, again.activations_cached, again.bytes_written) == (160, 160, 0)


def test_a_killed_worker_costs_only_what_it_had_in_hand(
    engine: str, place: Any, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second batch, of which the first may be stored."""
    once = tmp_path / "once"
    set_fault(monkeypatch, once=str(once))
    source = write(tmp_path / "prompts.jsonl")
    stats = ac.warmup_distributed(source, folder, store=place, **arguments(engine, batch_size=4))
    assert once.exists()
    assert stats.total_prompts == 160
    assert stats.activations_extracted + stats.activations_cached == 160
    # A unit has a dozen prompts.
    assert stats.activations_cached <= 16
    check_stored(place, expected, index_dir=tmp_path / "fresh")


DRIVER = """
import json, sys
import actcache as ac
source, folder, store, options = sys.argv[1:]
ac.warmup_distributed(source, folder, store=store, **json.loads(options))
"""


def test_a_killed_driver_costs_only_what_was_in_hand(
    engine: str, place: Any, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "prompts.jsonl")
    given = arguments(engine, batch_size=2)
    with monkeypatch.context() as during:
        set_fault(during, slow=0.15)
        command = [sys.executable, "-c", DRIVER, str(source), str(folder), str(place), json.dumps(given)]
        driver = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 240
        while stored(place, tmp_path / "watching") < 40:
            assert driver.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Nobody goes on: what it had started ends.
    end_all_but(children() - descendants())
    found = at_rest(place, tmp_path)
    assert 40 <= found < 160
    # As another machine: what only the first one's disk held is lost with it.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other machine"))
    stats = ac.warmup_distributed(source, folder, store=place, **given)
    assert stats.total_prompts == 160 and stats.activations_cached == found
    assert stats.activations_extracted == 160 - found
    check_stored(place, expected, index_dir=tmp_path / "fresh")


def at_rest(place: Any, tmp_path: Path) -> int:
    """How many prompts are stored; a server may still be at work on what it was sent by who was killed."""
    found = [-1, stored(place, tmp_path / "counting 0")]
    while found[-1] != found[-2] and len(found) < 20:
        time.sleep(2)
        found.append(stored(place, tmp_path / f"counting {len(found)}"))
    return found[-1]


def descendants() -> set[int]:
    """Children of this process that run what a driver has started, handed on by its end."""
    found = set()
    for pid in children():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"ray" in line or b"actcache.distributed" in line:
            found.add(pid)
    return found


def test_workers_of_a_killed_driver_end_by_themselves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_fault(monkeypatch, slow=0.5)
    source = write(tmp_path / "prompts.jsonl")
    given = json.dumps(arguments("local", batch_size=1))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(source), str(folder), str(tmp_path / "s"), given], stderr=subprocess.PIPE
    )
    before = children() - {driver.pid}
    deadline = time.monotonic() + 120
    while stored(tmp_path / "s") == 0:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    # Its end of the pipes is closed, and theirs of its standard error.
    driver.communicate(timeout=60)
    while children() - before - {driver.pid}:
        for pid in children() - before - {driver.pid}:
            os.waitpid(pid, os.WNOHANG)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_prompts_that_cannot_be_done_are_reported_alone(
    engine: str, folder: Path, tmp_path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that no batch survives, one that ends every worker, those that the model cannot take, and lines that are
    none."""
    set_fault(monkeypatch, failing=201, fatal=202)
    prompts: list[Any] = list(PROMPTS)
    for at, prompt in ((10, [201, 1]), (60, [202, 1]), (100, [999]), (120, [1] * 65), (130, "the line"), (140, None)):
        prompts.insert(at, prompt)
    source = write(tmp_path / "prompts.jsonl", prompts)
    source.write_text(source.read_text().replace('"the line"', "{no JSON"))
    with pytest.raises(PartialWarmupError, match="6 prompts were not stored") as caught:
        ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments(engine, batch_size=4))
    assert [place for place, _ in caught.value.failed] == [10, 60, 100, 120, 130, 140]
    for (_, reason), said in zip(
        caught.value.failed,
        ("this batch fails", "whatever worker", "id 999", "has 65 tokens", "not JSON", "not null"),
        strict=True,
    ):
        assert said in reason and str(source) in reason
    assert caught.value.stats.total_prompts == 166  # type: ignore[attr-defined]
    check_stored(tmp_path / "s", expected)


def test_a_small_input_is_spread_over_workers(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a Parquet file of one row group: neither worker goes on before the other has something to do. What both of
    them say is told once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from actcache.distributed.inputs import find_inputs
    from actcache.distributed.units import Units

    pq.write_table(pa.table({"input_ids": PROMPTS[:40]}), tmp_path / "p.parquet")
    assert len(list(Units(find_inputs(tmp_path / "p.parquet")))) == 5
    (tmp_path / "together").mkdir()
    set_fault(monkeypatch, together=str(tmp_path / "together"), loud=True)
    given = arguments(engine, batch_size=4)
    del given["unit_prompts"]
    stats = ac.warmup_distributed(tmp_path / "p.parquet", folder, store=tmp_path / "s", **given)
    assert stats.activations_extracted == 40
    assert len(list((tmp_path / "together").iterdir())) == 2
    said = [record.getMessage() for record in caplog.records if record.name == "actcache.workers"]
    assert sorted(line.partition(": ")[2] for line in said) == [
        "UserWarning: an odd value", "an odd configuration", "an odd prompt",
    ]  # fmt: skip
    assert all(line.partition(":")[0] in ("worker 0", "worker 1") for line in said)


def test_what_ends_every_worker_is_an_error(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_fault(monkeypatch, fatal=1)
    # As many take minutes to start.
    monkeypatch.setattr(dispatch, "_DEATHS", 3)
    source = write(tmp_path / "prompts.jsonl", [[1, i] for i in range(200)])
    with pytest.raises(WorkersError, match="workers ended in turn and none finished anything"):
        ac.warmup_distributed(source, folder, store=tmp_path / "s", **arguments(engine, num_workers=1))


def test_workers_without_room_are_an_error_and_not_a_wait(folder: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    source = write(tmp_path / "prompts.jsonl")
    try:
        with pytest.raises(WorkersError, match=r"99 workers do not fit on this machine: each needs 1 CPU, and Ray has"):
            ac.warmup_distributed(source, folder, store=tmp_path / "s", num_workers=99, **OPTIONS)
        assert not ray.is_initialized()
        with pytest.raises(WorkersError, match="each needs 1 CPU and 64 GPU"):
            ac.warmup_distributed(source, folder, store=tmp_path / "s", num_gpus_per_worker=64, **OPTIONS)
        # A cluster of others', all of which is in use.
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        holder = ray.remote(num_cpus=1)(type("Holder", (), {"here": lambda self: None})).remote()
        ray.get(holder.here.remote())
        own = ray.get_runtime_context().gcs_address
        for other in ("127.0.0.1:1", "ray://example.invalid:10001", "local"):
            with pytest.raises(
                OptionError, match=f"address={other!r}: this process uses another Ray already, at {own}"
            ):
                ac.warmup_distributed(source, folder, store=tmp_path / "s", address=other, **OPTIONS)
        with pytest.raises(WorkersError, match=r"in 0 s: each needs 1 CPU, and Ray has 1 CPU \(0 free\)"):
            ac.warmup_distributed(source, folder, store=tmp_path / "s", address=own, start_timeout=0, **OPTIONS)
        with pytest.raises(WorkersError, match=r"in 3 s: each needs 1 CPU, and Ray has 1 CPU \(0 free\)"):
            ac.warmup_distributed(source, folder, store=tmp_path / "s", start_timeout=3, **OPTIONS)
        ray.kill(holder)
        # It is there still, and what has room now is done.
        stats = ac.warmup_distributed(source, folder, store=tmp_path / "s", num_workers=1, **OPTIONS)
        assert stats.activations_extracted == 160 and ray.is_initialized()
    finally:
        ray.shutdown()
    with pytest.raises(WorkersError, match=r"cannot be reached at address '127.0.0.1:1'"):
        ac.warmup_distributed(source, folder, store=tmp_path / "s", address="127.0.0.1:1", **OPTIONS)


def test_ranks_that_run_at_once(folder: Path, tmp_path: Path, expected: Any) -> None:
    """As torchrun starts them."""
    source = write(tmp_path / "prompts.jsonl")
    given = json.dumps({"engine": "rank", "unit_prompts": 10, **OPTIONS})
    command = [sys.executable, "-c", DRIVER, str(source), str(folder), str(tmp_path / "s"), given]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    run = subprocess.run([*torchrun, *command], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    check_stored(tmp_path / "s", expected)


def test_a_script_without_a_guard_and_an_interrupt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a notebook or a script does: nothing of it is run again in workers, and Ctrl-C ends them."""
    set_fault(monkeypatch, slow=0.3)
    source = write(tmp_path / "prompts.jsonl")
    script = tmp_path / "script.py"
    script.write_text(
        f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nprint('once')\n{DRIVER}"
    )
    given = json.dumps(arguments("local", batch_size=2))
    command = [sys.executable, str(script), str(source), str(folder), str(tmp_path / "s"), given]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while stored(tmp_path / "s") == 0:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert out == "once\n" and "KeyboardInterrupt" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(driver.pid, 0)
    assert 0 < stored(tmp_path / "s") < 160
