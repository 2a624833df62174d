"""`ac.warmup_distributed`: a warm-up on many workers, of a laptop or of a cluster."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actcache.distributed.dispatch import Crew, dispatch
from actcache.distributed.inputs import KINDS, Source, find_inputs
from actcache.distributed.job import Job, make_job
from actcache.distributed.ledger import Ledger
from actcache.distributed.processes import Processes, check_count, cores
from actcache.distributed.ranks import own_device, own_rank
from actcache.distributed.units import Units
from actcache.distributed.worker import Task, Worker
from actcache.errors import OptionError, PartialWarmupError, PromptError, require_choice
from actcache.extract.stats import WarmupStats
from actcache.progress import progress

ENGINES = ("ray", "local", "rank")


def warmup_distributed(
    source: Source,
    model: str | Path,
    *,
    engine: str = "ray",
    address: str | None = None,
    num_workers: int | None = None,
    num_gpus_per_worker: float = 0,
    num_cpus_per_worker: float = 1,
    store: Any = None,
    column: str | None = None,
    label_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    file_format: str | None = None,
    unit_prompts: int | None = None,
    max_failed: float = 0.1,
    failed_file: str | Path | None = None,
    verify_cache: bool = False,
    max_retries: int | None = None,
    start_timeout: float = 300.0,
    **options: Any,
) -> WarmupStats:
    """Compute and store what is missing for all prompts of `source`, on many workers, each with its own model.

    The input is cut into fixed units, which workers read themselves; each writes what it computes straight into
    `store`. Whatever is killed, workers, machines, or this process, loses the batches that it had in hand, and the same
    call again does only what is missing. A prompt that cannot be done takes no other with it.

    Args:
        source: a file of prompts (Parquet, JSONL, CSV with a header, text with a prompt a line), a folder or a pattern
            of such, the same of a dataset of the Hub (``"hf://datasets/org/name[@revision][/path]"``), or
            a list of these.
        model: Hub id or local folder, which must be the same wherever workers run.
        engine: ``"ray"``: actors of Ray, here or on a cluster (extra ``actcache[ray]``); ``"local"``: processes of this
            machine; ``"rank"``: this process is one of many that torchrun, Slurm or an indexed Kubernetes job has
            started, and does its share of the units, every so manyth.
        address: of a Ray cluster, as ``ray.init`` takes it; None for the Ray that this process has begun, that of
            ``RAY_ADDRESS``, or a new one on this machine.
        num_workers: how many; None for as many as there are processors, or GPUs, or as Ray has room for. With
            ``"rank"`` how many processes there are, where the launcher does not say so.
        num_gpus_per_worker: GPUs of each, less than 1 where several share one; with 0 they see none.
        num_cpus_per_worker: processors of each, which has so many threads.
        store: a folder that all machines share, a URL, or an `ac.Store` of these; None for the default store.
        column: of Parquet and CSV, or field of JSONL, with the prompt; None: ``prompt``, ``text``, ``messages``,
            ``input_ids``, or the only one, the same for all lines of a file.
        label_column: likewise, with the label of each prompt, which is stored with it. Of CSV whole numbers where all
            of the file are, else text.
        metadata_columns: likewise, those that become the metadata of each prompt. Each row has to have what is asked
            for, and may have null there; a prompt that occurs twice in a unit has to have the same.
        file_format: ``"parquet"``, ``"jsonl"``, ``"csv"``, ``"tsv"`` or ``"text"``; None: by the file's suffix.
        unit_prompts: how many prompts a unit has, about; None: 8 to 1,024, so that a small input is 64 units.
        max_failed: the run ends at once when more have failed than this share of the prompts gone through, or of 1,000
            where fewer have gone through.
        failed_file: a file for all failed prompts, one JSON object a line; the error has the first 1,000.
        verify_cache: False trusts the index about what is stored before; True checks that its rows are undamaged.
        max_retries: how often a batch that fails is tried again, after 2, 4, 8 s and so on; None for 3 remote, and 0
            here.
        start_timeout: seconds for which a run waits for a Ray cluster that has room for no worker at all.
        options: those of `UnifiedCache`; what is in this process only, such as a loaded model, cannot be given.

    Returns:
        The sums of all workers; with ``"rank"`` those of this process. What a killed worker had stored counts as cached
        when its unit is done again. ``elapsed_seconds`` is the time of the whole call.

    Raises:
        OptionError, MissingFileError, PromptError, and what `UnifiedCache` raises: before any worker is started.
        MissingExtraError: Ray, or pyarrow for Parquet, is not installed.
        WorkersError: no worker can be started (too few free processors or GPUs), or they end one after the other.
        PartialWarmupError: some prompts failed; all others are stored. Or too many failed, and the run was ended.
    """
    start = time.perf_counter()
    require_choice(engine, ENGINES, "engine")
    if isinstance(metadata_columns, str):
        raise OptionError(f"metadata_columns={metadata_columns!r}: expected a list of names.")
    check_count(num_workers, "num_workers")
    for name, value in (
        ("num_gpus_per_worker", num_gpus_per_worker), ("num_cpus_per_worker", num_cpus_per_worker),
        ("start_timeout", start_timeout),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise OptionError(f"{name} is {value!r}: expected a number, 0 or more.")
    if address is not None and engine != "ray":
        raise OptionError(f"address={address!r} is of a Ray cluster, and engine is {engine!r}: leave one of them out.")
    if file_format is not None:
        require_choice(file_format, KINDS, "file_format")
    if engine == "rank":
        if options.get("device_map") is None:
            options["device"] = own_device(options.get("device", "auto"))
    elif not num_gpus_per_worker:
        options["device"] = _without_gpu(options.get("device", "auto"))
    rank, size = own_rank(num_workers) if engine == "rank" else (0, 1)
    ledger = Ledger(max_failed=max_failed, failed_file=failed_file, first=rank, step=size)
    job = make_job(model, store, options, verify_cache=verify_cache, max_retries=max_retries)
    inputs = find_inputs(
        source,
        column=column,
        kind=file_format,
        token=options.get("token"),
        label=label_column,
        metadata=metadata_columns,
    )
    units = Units(inputs, prompts=unit_prompts, config=job.config)
    if next(iter(units), None) is None:
        raise PromptError(f"no prompts in {', '.join(one.path for one in inputs[:3])}: empty.")
    if engine == "rank":
        with ledger, _bar(units, job, size) as done:
            whole = _alone(units, job, ledger, rank, size, done)
    else:
        crew = _crew(engine, job, address, num_workers, num_cpus_per_worker, num_gpus_per_worker, start_timeout)
        with ledger, _bar(units, job) as done, contextlib.closing(crew):
            whole = dispatch(units, crew, ledger, done)
    stats = replace(ledger.stats, elapsed_seconds=time.perf_counter() - start)
    if ledger.lost or not whole:
        raise _failure(ledger, stats, whole)
    return stats


def _without_gpu(device: Any) -> str:
    """Where a worker runs its model that is given no GPU: Ray may let it see those of others."""
    if str(device) not in ("auto", "cpu"):
        raise OptionError(
            f"device={str(device)!r}: workers have no GPU without num_gpus_per_worker=1, or a share of one."
        )
    return "cpu"


def _crew(
    engine: str, job: Job, address: str | None, workers: int | None, cpus: float, gpus: float, timeout: float
) -> Crew:
    if engine == "ray":
        from actcache.distributed.actors import Actors

        return Actors(job, address, workers, cpus, gpus, timeout)
    threads = max(1, int(cpus))
    if workers is None:
        workers = max(1, cores() // threads) if not gpus else _as_many_as_gpus(gpus)
    return Processes(job, workers, threads, gpus)


def _as_many_as_gpus(gpus: float) -> int:
    import torch

    return max(1, int(torch.cuda.device_count() / gpus + 1e-9))


@contextlib.contextmanager
def _bar(units: Units, job: Job, share: int = 1) -> Iterator[Callable[[int], object]]:
    total = units.count()
    total = None if total is None else -(-total // share)
    with progress(total, f"extracting {Path(job.label).name}", unit="unit") as bar:
        yield bar.update


def _alone(units: Units, job: Job, ledger: Ledger, rank: int, size: int, done: Callable[[int], object]) -> bool:
    """This process's share, in it; whether it was gone through."""
    worker = Worker(job)
    try:
        for unit in itertools.islice(units, rank, None, size):
            before = ledger.units
            ledger.add(Task(unit), worker.run(Task(unit)))
            done(ledger.units - before)
            if ledger.too_many:
                return False
    finally:
        worker.close()
    return True


def _failure(ledger: Ledger, stats: WarmupStats, whole: bool) -> PartialWarmupError:
    shown = "; ".join(f"prompt {i}: {reason}" for i, reason in ledger.failed[:3])
    more = f"; and {ledger.lost - 3:,} more" if ledger.lost > 3 else ""
    which = "1 prompt was" if ledger.lost == 1 else f"{ledger.lost:,} prompts were"
    rest = "The others are stored; run again to try these again."
    if not whole:
        rest = (
            f"That is more than max_failed={ledger.max_failed:g} of {stats.total_prompts:,}: the run was ended. What "
            "was finished is stored."
        )
    return PartialWarmupError(
        f"{which} not stored ({shown}{more}). {rest}", stats=stats, failed=ledger.failed, count=ledger.lost
    )
