"""Sharing on the Hub against plain uploads and downloads of the same bytes with the same client; what is transferred;
memory.

    python benchmarks/share.py [--quick] [--json FILE] [--folder DIR]

The Hub is the loopback one, in a process of its own: the network costs nothing, so that what is done beside it shows.
Each push goes to a new repository, of a store that is opened anew, to a Hub that has none of its files.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from _hub_server import Hub, hub
from _measure import Tables, arguments, compare, reporting

PROMPTS, LAYERS, WIDTH = 2000, 12, 768
PER_PROMPT = 40
"""Bytes of memory that one more prompt may take. Nothing is kept of each, so that this is how far two runs differ."""
AT_MOST = {"... materialize": 96, "load, one layer": 24}
"""MB that may be taken at any size, of what is on its way in large pieces: 32 MB that are read, as many that wait and
that are written; 2 MB for each connection, and as much for the index. Smaller datasets take less, so that two sizes
tell nothing there."""
MEMORY_LAYERS = 3
"""Of the stores that are looked at: it is the number of prompts that counts."""
PUSH = READ = 0.5
"""At least this speed, as a share of that of a plain upload, or of a download and a read of the files."""
ONE_LAYER = 1.1
"""At most so many bytes for one layer, as a share of its own, beside those of the index."""
_names = (f"user/set{uuid.uuid4().hex}" for _ in itertools.count())


def make_store(folder: Path, prompts: int, layers: int = LAYERS) -> Path:
    """A store with pooled vectors of all layers, in segments of the size that merging makes of them."""
    from actcache.store.prompts import PromptTable
    from actcache.store.records import Records
    from actcache.store.store import Store

    rng = np.random.default_rng(0)
    with Store(folder / "store", index_dir=folder / "index") as store:
        space = store.open_space({"benchmark": True}, {"model_name": "benchmark", "dtype": "float32"})
        for start in range(0, prompts, 5000):
            numbers = range(start, min(start + 5000, prompts))
            ids = [[number, *range(15)] for number in numbers]
            table = PromptTable.build(ids, [f"prompt {number}" for number in numbers], text_context="benchmark")
            shape = len(ids), WIDTH
            data = {f"resid_post.{layer}": rng.standard_normal(shape, np.float32) for layer in range(layers)}
            store.append(space, Records.pooled(table, "last_token", data))
    return folder / "store"


def push(store: Path, **options: Any) -> None:
    import actcache as ac

    ac.push_dataset(next(_names), "benchmark", None, store=store, **options)


def plain_upload(folder: Path) -> None:
    from huggingface_hub import HfApi

    api, name = HfApi(), next(_names)
    api.create_repo(name, repo_type="dataset")
    api.upload_folder(folder_path=folder, repo_id=name, repo_type="dataset")


def plain_read(name: str, folder: Path) -> dict[str, Any]:
    """Everything of a dataset, downloaded with the client and read with what its format names."""
    import pyarrow.parquet as pq
    from huggingface_hub import snapshot_download
    from safetensors.numpy import load_file

    snapshot_download(name, repo_type="dataset", local_dir=folder)
    found: dict[str, Any] = {"index": pq.read_table(folder / "index")}
    for path in sorted((folder / "tensors").glob("*.safetensors")):
        found |= load_file(path)
    return found


def reading(folder: Path, rounds: int) -> Tables:
    """`load_activations` of everything."""
    import actcache as ac

    name = next(_names)
    ac.push_dataset(name, "benchmark", None, store=make_store(folder, PROMPTS))
    nbytes = PROMPTS * LAYERS * WIDTH * 4
    rows = compare(
        lambda: plain_read(name, folder / "plain"),
        {
            "load_activations": lambda: ac.load_activations(name),
            "... of all tensors": lambda: ac.load_activation_dataset(name),
        },
        rounds,
        reference_name="download + read",
        warmup=1,
        before=lambda _: shutil.rmtree(folder / "plain", ignore_errors=True),
    )
    title = f"read {PROMPTS} prompts x {LAYERS} layers x {WIDTH}, {nbytes / 1e6:.0f} MB"
    return [(title, rows, {"show": "speed", "nbytes": nbytes, "bounds": {"load_activations": READ}})]


def one_layer(folder: Path, running: Hub) -> bool:
    """What is transferred for one layer of a dataset; whether it is little more than that layer and the index."""
    import actcache as ac

    made, name = folder / "made", next(_names)
    store = make_store(folder, PROMPTS)
    ac.push_dataset(made, "benchmark", None, store=store)
    ac.push_dataset(name, "benchmark", None, store=store)
    layer = PROMPTS * WIDTH * 4
    index = sum(path.stat().st_size for path in (made / "index").iterdir())
    before = running.sent()
    ac.load_activations(name, layers=[LAYERS // 2])
    sent = running.sent() - before
    share = (sent - index) / layer
    print(
        f"\none layer of {LAYERS}: {sent:,} bytes transferred, {layer:,} of the layer, {index:,} of the index: "
        f"{share:.3f} <= {ONE_LAYER} {'ok' if share <= ONE_LAYER else 'MISSED'}"
    )
    return share <= ONE_LAYER


def pushing(folder: Path, running: Hub, rounds: int) -> Tables:
    """A push of everything that is stored."""
    import actcache as ac

    store = make_store(folder, PROMPTS)
    made = folder / "made"
    ac.push_dataset(made, "benchmark", None, store=store)
    nbytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    candidates = {
        "push_dataset": lambda: push(store),
        "... stream=True": lambda: push(store, stream=True),
        "... in 10 MB": lambda: push(store, shard_max_bytes=10 << 20),
    }
    rows = compare(
        lambda: plain_upload(made), candidates, rounds, reference_name="upload_folder", warmup=1,
        before=lambda _: running.forget(),
    )  # fmt: skip
    title = f"push {PROMPTS} prompts x {LAYERS} layers x {WIDTH}, {nbytes / 1e6:.0f} MB"
    return [(title, rows, {"show": "speed", "nbytes": nbytes, "bounds": {"push_dataset": PUSH}})]


def peak_of(what: str, given: str, folder: Path, **options: Any) -> dict[str, int]:
    """Anonymous memory of a process that pushes a store, pulls or loads a dataset (`given`), in bytes: the most of it
    while it does, less what it had before."""
    ran = subprocess.run(
        [sys.executable, __file__, "--peak", what, given, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found


def pull(name: str, folder: Path, **options: Any) -> None:
    import actcache as ac

    with ac.Store(folder / "store", index_dir=folder / "index") as store:
        ac.pull_dataset(name, store=store, **options)


def load(name: str, folder: Path, **options: Any) -> None:
    import actcache as ac

    ac.load_activations(name, show_progress=False, **options)


def measure_peak(what: str, given: str, folder: Path, options: dict[str, Any]) -> None:
    """What `peak_of` runs: once with little, which warms up what is loaded once, and once looked at."""
    import actcache as ac
    from actcache.testing.memory import growth

    small = make_store(folder / "warm", 10)
    work: Any = {"pull": pull, "load": load}.get(what)
    if work is None:
        push(small)
    else:
        name = next(_names)
        ac.push_dataset(name, "benchmark", None, store=small)
        work(name, folder / "warmed", **options)
    with growth() as found:
        if work is None:
            push(Path(given), **options)
        else:
            work(given, folder, **options)
    print(json.dumps({"peak": found.most}))


def memory(folder: Path, running: Hub, sizes: tuple[int, int]) -> bool:
    """Peak memory of sharing two sizes; whether it is that of the smaller one."""
    import actcache as ac

    held, made = True, set[str]()
    print(f"\nmemory, anonymous, beyond what the process had before ({MEMORY_LAYERS} layers x {WIDTH})")
    stores = {size: make_store(folder / str(size), size, MEMORY_LAYERS) for size in sizes}
    pushed = {size: next(_names) for size in sizes}
    runs: list[tuple[str, str, dict[str, Any]]] = [
        ("push_dataset", "push", {}), ("... stream=True", "push", {"stream": True}), ("pull_dataset", "pull", {}),
        ("... materialize", "pull", {"materialize": True}), ("load, one layer", "load", {"layers": [1]}),
    ]  # fmt: skip
    for name, what, options in runs:
        peaks = {}
        for size, store in stores.items():
            if what == "push":
                running.forget()
            elif pushed[size] not in made:
                ac.push_dataset(pushed[size], "benchmark", None, store=store)
                made.add(pushed[size])
            target = folder / f"{what}{len(options)}-{size}"
            peaks[size] = peak_of(what, str(store) if what == "push" else pushed[size], target, **options)["peak"]
            # What is loaded is the caller's.
            peaks[size] -= size * WIDTH * 4 if what == "load" else 0
            shutil.rmtree(target)
        small, large = peaks.values()
        each = (large - small) / (sizes[1] - sizes[0])
        if name in AT_MOST:
            ok, bound = large <= AT_MOST[name] * 2**20, f"<= {AT_MOST[name]} MB"
        else:
            ok, bound = each <= PER_PROMPT, f"<= {PER_PROMPT} bytes"
        held &= ok
        told = ", ".join(f"{size:,} prompts {peak / 2**20:.0f} MB" for size, peak in peaks.items())
        data = sizes[1] * MEMORY_LAYERS * WIDTH * 4 / 2**20
        print(f"{name:16} {told} (data {data:.0f} MB): {each:,.0f} bytes a prompt  {bound} {'ok' if ok else 'MISSED'}")
    return held


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--peak", nargs=4, help="measure memory in this process")
    options = parser.parse_args()
    if options.peak:
        what, given, folder, how = options.peak
        measure_peak(what, given, Path(folder), json.loads(how))
        return 0
    rounds = 3 if options.quick else 15
    with reporting(options) as report, hub(report.folder) as running:
        report.add(pushing(report.folder / "push", running, rounds), show="speed")
        report.add(reading(report.folder / "read", rounds), show="speed")
        little = one_layer(report.folder / "layer", running)
        held = memory(report.folder / "memory", running, (20_000, 50_000) if options.quick else (50_000, 400_000))
    return 0 if report.held and little and held else 1


if __name__ == "__main__":
    sys.exit(main())
