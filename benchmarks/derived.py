"""Perplexity and logits: what they add to an extraction, what they cost from a store, how exact they are then.

    python benchmarks/derived.py [PART ...] [--prompts 256] [--rounds 5] [--threads 1]

Parts: extraction, storage, dtypes, lmprobe; all of them when none is named. The last one needs an environment with
lmprobe, whose interpreter ACTCACHE_LMPROBE_PYTHON names; both sides warm the same texts in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import actcache as ac
from _measure import Ratio, compare, print_table, run_parts
from actcache.demo import model_path

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257
PARTS = ("extraction", "storage", "dtypes", "lmprobe")
ADDED, FROM_STORAGE, FASTER, MEMORY = 1.8, 0.8, 2.0, 1 / 3


def log_normal_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """`n` prompts of log-normal length, 8 to 256 tokens (median about 51)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(51), 0.7, n).astype(int), 8, 256)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def gpt2_shape(layers: int = LAYERS) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=12, vocab_size=VOCABULARY, n_positions=1024)
    return GPT2LMHeadModel(config).eval()


def warmed(model: Any, prompts: Any, **options: Any) -> None:
    folder = tempfile.mkdtemp(prefix="actcache-bench-")
    try:
        ac.UnifiedCache(model, store=ac.Store(folder), batch_size=None, **options).warmup(prompts)
    finally:
        shutil.rmtree(folder)


def extraction(prompts: int, rounds: int) -> bool:
    """The head is a third of this model's arithmetic."""
    model, texts = gpt2_shape(), log_normal_prompts(prompts)
    return print_table(
        f"what results add to an extraction of {prompts} prompts, {sum(map(len, texts))} tokens",
        compare(
            lambda: warmed(model, texts, compute_perplexity=False),
            {
                "with perplexity": lambda: warmed(model, texts),
                "with perplexity and the last token's top 50": lambda: warmed(
                    model, texts, cache_logits=True, logit_top_k=50
                ),
            },
            rounds,
            reference_name="last token of all layers",
            warmup=1,
        ),
        bounds={"with perplexity": ADDED},
    )


@torch.no_grad()
def bare(model: GPT2LMHeadModel, rows: list[torch.Tensor], ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norm, head and cross-entropy of rows in memory, 16 prompts at a time and their logits in parts of 160 rows."""
    losses = []
    for start in range(0, len(rows), 16):
        given = torch.cat([r[:-1] for r in rows[start : start + 16]])
        targets = torch.cat([i[1:] for i in ids[start : start + 16]])
        for part, target in zip(given.split(160), targets.split(160), strict=True):
            logits = model.lm_head(model.transformer.ln_f(part))
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return losses


def storage(prompts: int, rounds: int) -> bool:
    """From the stored rows of the last layer; how many blocks made them does not matter."""
    model, texts = gpt2_shape(1), log_normal_prompts(prompts)
    ids = [torch.tensor(t) for t in texts]
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        cache = ac.UnifiedCache(model, "last", False, cache_pooled=False, store=Path(folder) / "store")
        cache.warmup(texts)
        values, mask = cache.get_activations(texts)  # type: ignore[misc]
        rows = [v[m].clone() for v, m in zip(values, mask, strict=True)]  # type: ignore[arg-type]

        def forget(name: str) -> None:
            for space in cache.store.spaces():
                for path in (cache.store.root / space.space).glob("*.safetensors"):
                    if b'"token_nll"' in path.read_bytes()[:4096] or b'perplexity"' in path.read_bytes()[:4096]:
                        path.unlink()
            cache.store.refresh()

        def from_storage() -> None:
            assert cache.compute_perplexity_from_cache(texts) == len(texts)

        return print_table(
            f"perplexity of {prompts} prompts, {sum(map(len, texts))} tokens, from stored rows",
            compare(
                lambda: bare(model, rows, ids),
                {"compute_perplexity_from_cache": from_storage},
                rounds,
                reference_name="norm, head and cross-entropy of rows in memory",
                warmup=1,
                before=forget,
            ),
            show="speed",
            bounds={"compute_perplexity_from_cache": FROM_STORAGE},
        )


def dtypes(prompts: int) -> bool:
    """Of the small trained model: how far results from rows in a narrow dtype are from the model's own."""
    texts = [f"The landmark number {i} is in the city of the {i % 7}th hill." for i in range(prompts)]
    print(f"\nresults from stored rows, {prompts} prompts of the demo's model, against those of its own pass")
    print("stored as     logits: max |error| / max |logit|   same best token   perplexity: largest relative error")
    held = True
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        exact = ac.UnifiedCache(model_path(), -1, cache_logits=True, store=Path(folder) / "exact")
        logits, perplexity = exact.get_logits(texts).values, exact.get_perplexity(texts)
        for dtype in ("float32", "float16", "bfloat16", "int8", "float8_e4m3"):
            cache = ac.UnifiedCache(
                model_path(), -1, False, cache_pooled=False, store=ac.Store(Path(folder) / dtype, dtype=dtype)
            )
            cache.warmup(texts)
            cache.compute_logits_from_cache(texts)
            cache.compute_perplexity_from_cache(texts)
            found = cache.get_logits(texts).values
            error = float((found - logits).abs().max() / logits.abs().max())
            same = float((found.argmax(-1) == logits.argmax(-1)).float().mean())
            other = float(np.abs(cache.get_perplexity(texts) / perplexity - 1).max())
            held &= bool(torch.isfinite(found).all())
            print(f"{dtype:12}  {error:31.2g}  {same:16.1%}  {other:37.2g}")
    return held


_WORKER = """
import json, sys, threading, time
import torch
torch.set_num_threads(int(sys.argv[4]))
side, model, texts = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
folder = sys.argv[5]
if side == "lmprobe":
    import lmprobe
    lmprobe.set_cache_backend(folder)
    make = lambda: lmprobe.UnifiedCache(model, device="cpu")
else:
    import actcache as ac
    make = lambda: ac.UnifiedCache(model, device="cpu", store=folder)
cache = make()
cache.model
cache.warmup(texts[:2])
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) for l in f if l.startswith("RssAnon"))
before = peak = anonymous()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.01)
thread = threading.Thread(target=watch); thread.start()
start, cpu = time.perf_counter(), time.process_time()
stats = cache.warmup(texts[2:])
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
running = False; thread.join()
assert stats.activations_extracted == stats.perplexity_extracted == len(texts) - 2, stats
print(json.dumps({"wall": wall, "cpu": cpu, "added": (peak - before) / 1024}))
"""


def lmprobe(prompts: int, rounds: int, threads: int) -> bool:
    python = os.environ.get("ACTCACHE_LMPROBE_PYTHON")
    if python is None:
        print("\nlmprobe: left out, since ACTCACHE_LMPROBE_PYTHON names no interpreter that has it")
        return True
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        model = Path(folder) / "model"
        gpt2_shape().save_pretrained(model)
        words = {f"w{i}": i for i in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(model)
        texts = [" ".join(f"w{i}" for i in ids) for ids in log_normal_prompts(prompts + 2)]
        (Path(folder) / "texts.json").write_text(json.dumps(texts))
        found: dict[str, list[dict[str, float]]] = {"lmprobe": [], "actcache": []}
        for turn in range(rounds):
            for side, interpreter in (("lmprobe", python), ("actcache", sys.executable))[:: 1 if turn % 2 else -1]:
                store = Path(folder) / f"{side}-{turn}"
                run = subprocess.run(
                    [interpreter, "-c", _WORKER, side, model, Path(folder) / "texts.json", str(threads), store],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if run.returncode:
                    print(run.stderr[-2000:])
                    return False
                found[side].append(json.loads(run.stdout.splitlines()[-1]))
                shutil.rmtree(store, ignore_errors=True)
    pairs = list(zip(found["lmprobe"], found["actcache"], strict=True))
    speed = Ratio.of([a["wall"] / b["wall"] for a, b in pairs])
    cpu = Ratio.of([a["cpu"] / b["cpu"] for a, b in pairs])
    added = Ratio.of([b["added"] / a["added"] for a, b in pairs])
    held = speed.high >= FASTER and added.low <= MEMORY
    print(f"\ndefault warm-up of {prompts} prompts (activations of all layers and perplexity), {rounds} rounds")
    print(f"  speed {speed.median:.2f} x lmprobe's [{speed.low:.2f}, {speed.high:.2f}], by CPU time {cpu.median:.2f} x")
    print(f"  added peak memory {added.median:.3f} of lmprobe's [{added.low:.3f}, {added.high:.3f}]")
    print(f"  >= {FASTER:g} and <= {MEMORY:.2f}: {'ok' if held else 'MISSED'}")
    return held


def parts(options: argparse.Namespace) -> dict[str, Callable[[], bool]]:
    return {
        "extraction": lambda: extraction(options.prompts, options.rounds),
        "storage": lambda: storage(options.prompts, options.rounds),
        "dtypes": lambda: dtypes(min(64, options.prompts)),
        "lmprobe": lambda: lmprobe(options.prompts, options.rounds, options.threads),
    }


def main() -> int:
    return run_parts(__doc__, PARTS, parts)


if __name__ == "__main__":
    sys.exit(main())
