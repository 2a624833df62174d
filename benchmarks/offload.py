"""A model on disk: batches block by block against accelerate's own way, which reads every weight for every batch.

    python benchmarks/offload.py [PART ...] [--more] [--prompts 256] [--rounds 3] [--threads 1] [--quick]

Parts: speed, memory; both when none is named.

The reference: accelerate's disk offload, the language model with ``output_hidden_states=True`` on batches of 8 in the
order given, the last token of every layer kept. Ours includes finding
the prompts missing, running them and storing the result in a fresh store, and a first run before the measurement.

Memory holds no weights between calls: the weights do not fit the limit that is printed (``--limit-mb``), so that the
pages of a file are given back to the system as soon as a weight was read from it, in all candidates alike. The part
"memory" says what anonymous memory ours took at most beyond what the process had, which must keep to the limit.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import actcache as ac
from _measure import arguments, compare, reporting
from actcache.testing.memory import growth

LAYERS, WIDTH, VOCABULARY = 12, 768, 8_192
BATCH = 8
SPEED = 3.0
OURS = "ours, last token of all layers"
PARTS = ("speed", "memory")


def prompts_of(n: int, seed: int = 0) -> list[list[int]]:
    """`n` prompts of log-normal length, 4 to 128 tokens (median about 20)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(20), 0.7, n).astype(int), 4, 128)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def save_model(folder: Path) -> int:
    """A random Llama shape as files of one block each; the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=WIDTH * 8 // 3, num_attention_heads=12,
        num_key_value_heads=12, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="14MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def on_disk(folder: Path, offload: Path) -> Any:
    names = ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(LAYERS))]
    placed: dict[str, str] = {**dict.fromkeys(names, "disk"), "model.rotary_emb": "cpu"}
    # accelerate wants something in memory; the angles are all that is.
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=placed, offload_folder=str(offload), dtype=torch.bfloat16
    )
    return model.eval()


@contextmanager
def forgetful() -> Iterator[None]:
    """Inside the block the system keeps no page of a file that a weight was read from."""
    plain = OffloadedWeightsLoader.__getitem__

    def read(self: Any, name: str) -> torch.Tensor:
        value = plain(self, name)
        file = (self.index.get(name) or {}).get("safetensors_file")
        if file is None:
            raise SystemExit(f"{name} is not read from the model's own files: this measures nothing")
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return value

    OffloadedWeightsLoader.__getitem__ = read
    try:
        yield
    finally:
        OffloadedWeightsLoader.__getitem__ = plain


@torch.no_grad()
def usual(model: Any, prompts: list[list[int]], *, in_order: bool) -> list[torch.Tensor]:
    """The last token of all layers, batch by batch."""
    order = range(len(prompts)) if in_order else sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    kept: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for start in range(0, len(prompts), BATCH):
        chosen = list(order)[start : start + BATCH]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
            mask[row, : len(prompts[i])] = 1
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        for row, i in enumerate(chosen):
            kept[i] = torch.stack([state[row, len(prompts[i]) - 1] for state in output.hidden_states[1:]])
    return kept


def ours(model: Any, prompts: list[list[int]], **options: Any) -> None:
    folder = tempfile.mkdtemp(prefix="actcache-bench-")
    try:
        with ac.Store(folder) as store:
            ac.UnifiedCache(model, compute_perplexity=False, store=store, **options).warmup(prompts)
    finally:
        shutil.rmtree(folder)


def most_memory(run: Callable[[], object]) -> int:
    """By how much anonymous memory grew at most while `run` ran."""
    gc.collect()
    # What earlier runs have freed goes back to the system, or it would serve again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    with growth(0.005) as found:
        run()
    return found.most


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them when none is named")
    parser.add_argument("--more", action="store_true", help="sorted batches of accelerate, and half of the depth")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=128, help="memory that is said to be there, for ours")
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}: expected some of {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    rounds = 1 if options.quick else options.rounds
    # Half of it for what waits between blocks; the rest holds a block, a pass through it, and what is being stored.
    os.environ["ACTCACHE_SWEEP_GB"] = str(options.limit_mb / 2 / 1024)
    with reporting(options) as report, forgetful():
        nbytes = save_model(report.folder / "model")
        prompts = prompts_of(options.prompts)
        print(
            f"{len(prompts)} prompts, {sum(map(len, prompts))} tokens; {LAYERS} x {WIDTH} in bfloat16, weights of "
            f"{nbytes / 2**20:.0f} MB on disk, memory limit {options.limit_mb} MB, {options.threads} thread(s), "
            f"accelerate {accelerate.__version__}"
        )
        if nbytes <= options.limit_mb * 2**20:
            raise SystemExit("the weights fit the limit: this measures nothing")
        model = on_disk(report.folder / "model", report.folder / "offload")
        reference = "accelerate, batches of 8"
        runs: dict[str, Callable[[], object]] = {
            reference: lambda: usual(model, prompts, in_order=True),
            OURS: lambda: ours(model, prompts),
        }
        # What is done once for a model: its blocks found and checked, one batch held against a pass of its own.
        ours(model, prompts[:16], max_batch_tokens=64)
        if options.more:
            ours(model, prompts[:16], max_batch_tokens=64, layers="middle")
            runs["the same, sorted by length"] = lambda: usual(model, prompts, in_order=False)
            runs["ours, one layer at half depth"] = lambda: ours(model, prompts, layers="middle")
        if "speed" in parts:
            plain = runs.pop(reference)
            rows = compare(plain, runs, rounds, reference_name=reference, warmup=0)
            report.add([("prompts that run, storing included in ours", rows, {"bounds": {OURS: SPEED}})], show="speed")
        if "memory" in parts:
            most = most_memory(lambda: ours(model, prompts)) / 2**20
            held = most <= options.limit_mb
            print(f"\n{OURS}: {most:.0f} MB of anonymous memory at most{'' if held else ', MISSED'}")
            report.held &= held
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
