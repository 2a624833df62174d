"""Extraction against the usual script, what storing adds, memory, and warm reads.

    python benchmarks/extract.py [PART ...] [--prompts 256] [--rounds 5] [--threads 1]

Parts: warm, overhead, memory, speed, bfloat16; all of them when none is named.

The usual script: batches of 8 in the order given, the whole language model with full logits and
``output_hidden_states=True``, in float32. Every candidate includes finding the prompts missing, running
them and storing the result in a fresh store.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import actcache as ac
from _measure import Ratio, compare, print_table, run_parts
from actcache.extract.extractor import ActivationExtractor
from actcache.store.prompts import PromptTable
from actcache.store.records import Records

LAYERS, WIDTH, VOCABULARY = 12, 768, 50_257
MIDDLE = LAYERS // 2 - 1
PARTS = ("warm", "overhead", "memory", "speed", "bfloat16")
SPEED = {
    "one layer at half depth, every token": 5.5,
    "last token of all layers": 2.3,
    "one layer at half depth, bfloat16": 8.0,
}
OVERHEAD, MEMORY, WARM = 1.08, 1.10, 0.4


def log_normal_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """`n` prompts of log-normal length, 8 to 256 tokens (median about 51)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(51), 0.7, n).astype(int), 8, 256)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def gpt2_shape(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=12, vocab_size=VOCABULARY, n_positions=1024)
    return GPT2LMHeadModel(config).to(dtype).eval()


@torch.no_grad()
def usual_script(model: GPT2LMHeadModel, prompts: list[list[int]], layer: int | None) -> list[torch.Tensor]:
    """Batches of 8 as given; returns what was wanted, so that both sides keep something."""
    kept = []
    for start in range(0, len(prompts), 8):
        batch = prompts[start : start + 8]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        chosen = states[1:] if layer is None else (states[layer + 1],)
        for row, prompt in enumerate(batch):
            kept.append(torch.stack([s[row, len(prompt) - 1].clone() for s in chosen]))
    return kept


def matrix_products(dtype: torch.dtype) -> Callable[[], object]:
    """The four products of a GPT-2 block on 512 tokens: the bound on any gain from a dtype."""
    shapes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
    pairs = [(torch.ones(512, rows, dtype=dtype), torch.ones(rows, columns, dtype=dtype)) for rows, columns in shapes]
    return lambda: [a @ b for a, b in pairs]


def cached_run(model: Any, prompts: list[list[int]], **options: Any) -> None:
    folder = tempfile.mkdtemp(prefix="actcache-bench-")
    try:
        store = ac.Store(folder)
        ac.UnifiedCache(model, compute_perplexity=False, store=store, batch_size=None, **options).warmup(prompts)
        store.close()
    finally:
        shutil.rmtree(folder)


def speed(prompts: int, rounds: int) -> bool:
    texts = log_normal_prompts(prompts)
    print(
        f"\n{prompts} prompts, {sum(map(len, texts))} tokens, GPT-2 shape {LAYERS} x {WIDTH}, vocabulary {VOCABULARY}"
    )
    model = gpt2_shape()
    return print_table(
        "extraction, storing included",
        compare(
            lambda: usual_script(model, texts, MIDDLE),
            {
                "one layer at half depth, every token": lambda: cached_run(
                    model, texts, layers=MIDDLE, cache_pooled=False
                ),
                "one layer at half depth, last token": lambda: cached_run(model, texts, layers=MIDDLE),
                "last token of all layers": lambda: cached_run(model, texts),
            },
            rounds,
            reference_name="the usual script, float32",
            warmup=0,
        ),
        show="speed",
        bounds=SPEED,
    )


def bfloat16(prompts: int, rounds: int) -> bool:
    """The same in bfloat16, with what the processor allows: no script gains more than its matrix products do."""
    products = {dtype: matrix_products(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print_table(
        "the matrix products of one block, 512 tokens",
        compare(products[torch.float32], {"bfloat16": products[torch.bfloat16]}, 31, reference_name="float32"),
        show="speed",
    )
    texts = log_normal_prompts(prompts)
    model, half = gpt2_shape(), gpt2_shape(torch.bfloat16)
    return print_table(
        f"extraction in bfloat16, {prompts} prompts, storing included",
        compare(
            lambda: usual_script(model, texts, MIDDLE),
            {
                "one layer at half depth, bfloat16": lambda: cached_run(half, texts, layers=MIDDLE, cache_pooled=False),
                "the usual script in bfloat16": lambda: usual_script(half, texts, MIDDLE),
            },
            rounds,
            reference_name="the usual script, float32",
            warmup=0,
        ),
        show="speed",
        bounds=SPEED,
    )


def overhead(prompts: int, rounds: int) -> bool:
    texts = log_normal_prompts(prompts)
    ids = [np.asarray(t, np.int32) for t in texts]
    model = gpt2_shape()

    def forward_only(layers: Any, pooling: str | None) -> None:
        extractor = ActivationExtractor(model, layers=layers, pooling=pooling)
        for _ in extractor.batches(ids, extractor.sites):
            pass

    held = True
    for name, layers, pooled in (
        ("one layer, every token", MIDDLE, False),
        ("all layers, every token", "all", False),
        ("all layers, last token", "all", True),
    ):
        pooling = "last_token" if pooled else None
        held &= print_table(
            f"what keying and storing add: {name}",
            compare(
                lambda layers=layers, pooling=pooling: forward_only(layers, pooling),
                {
                    "with store": lambda layers=layers, pooled=pooled: cached_run(
                        model, texts, layers=layers, cache_pooled=pooled
                    )
                },
                rounds,
                reference_name="the same forward passes",
                warmup=1,
            ),
            bounds={"with store": OVERHEAD},
        )
    return held


_MEMORY = """
import sys, torch
torch.set_num_threads(1)
import actcache as ac
from transformers import GPT2Config, GPT2LMHeadModel
import numpy as np
from actcache.testing.memory import anonymous, growth
n, folder = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=1000, n_positions=256)).eval()
rng = np.random.default_rng(0)
lengths = np.clip(rng.lognormal(np.log(30), 0.7, n), 4, 200).astype(int)
prompts = [rng.integers(0, 1000, k).astype(np.int32) for k in lengths]
before = anonymous()
with growth(0.01) as found:
    ac.UnifiedCache(model, compute_perplexity=False, store=folder, batch_size=None, cache_pooled=False).warmup(prompts)
print((before + found.most) // 1024)
"""


def memory(rounds: int) -> bool:
    print("\nanonymous memory of a warm-up (peak RssAnon, its own process each)")
    ratios = []
    for _ in range(rounds):
        peaks = {}
        for n in (1_000, 10_000):
            with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
                run = subprocess.run(
                    [sys.executable, "-c", _MEMORY, str(n), folder], capture_output=True, text=True, check=True
                )
                peaks[n] = int(run.stdout.split()[-1]) / 1024
        ratios.append(peaks[10_000] / peaks[1_000])
        print(
            f"  1,000 prompts {peaks[1_000]:.1f} MiB   10,000 prompts {peaks[10_000]:.1f} MiB   ratio {ratios[-1]:.3f}"
        )
    ratio = Ratio.of(ratios)
    held = ratio.low <= MEMORY
    print(f"  median ratio {ratio.median:.3f}   <= {MEMORY:g} {'ok' if held else 'MISSED'}")
    return held


def warm(rounds: int) -> bool:
    """2,000 pooled text prompts x 12 layers x 768 float32, against a copy of the same bytes from one mapped file."""
    with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
        model = _named_model(Path(folder) / "model")
        texts = [f"The {i}th landmark of the list is in the city of number {i * 7919 % 1000}." for i in range(2_000)]
        store = ac.Store(Path(folder) / "store")
        cache = ac.UnifiedCache(model, compute_perplexity=False, store=store, tokenizer=str(model))
        _fill(cache, texts)
        flat = Path(folder) / "flat.bin"
        rng = np.random.default_rng(0)
        rng.standard_normal((len(texts), LAYERS * WIDTH), dtype=np.float32).tofile(flat)
        mapped = np.memmap(flat, np.float32, "r", shape=(len(texts), LAYERS * WIDTH))
        shuffled = [texts[i] for i in rng.permutation(len(texts))]
        held = print_table(
            "warm get_activations, 2,000 pooled text prompts x 12 x 768",
            compare(
                lambda: np.array(mapped),
                {
                    "get_activations, stored order": lambda: cache.get_activations(texts),
                    "get_activations, shuffled": lambda: cache.get_activations(shuffled),
                },
                max(31, rounds),
                reference_name="copy of the same bytes",
            ),
            show="speed",
            bounds={"get_activations, stored order": WARM, "get_activations, shuffled": WARM},
        )
        assert not cache.model_loaded
        return held


def _named_model(folder: Path) -> Path:
    """A folder that identifies a 12 x 768 model with a tokenizer; its weights are never read into a model."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=12).save_pretrained(folder)
    save_file({"weight": np.arange(1024, dtype=np.float32)}, folder / "model.safetensors")
    words = ["<unk>", "The", "landmark", "of", "the", "list", "is", "in", "city", "number", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def _fill(cache: ac.UnifiedCache, texts: list[str]) -> None:
    extractor = cache.cached
    request = extractor.request(texts, cache.sites)
    identity = cache.extractor.source.identity()
    space = cache.store.open_space(identity.values, identity.label)
    rng = np.random.default_rng(1)
    data = {name: rng.standard_normal((len(texts), WIDTH), dtype=np.float32) for name in cache.sites}
    ids = [np.array([1, i], np.int32) for i in range(len(texts))]
    table = PromptTable.build(ids, texts, text_context=request.text_context)
    cache.store.append(space, Records(table, extractor.layout, np.arange(len(texts) + 1, dtype=np.int64), data))


def parts(options: argparse.Namespace) -> dict[str, Callable[[], bool]]:
    return {
        "warm": lambda: warm(options.rounds),
        "overhead": lambda: overhead(min(64, options.prompts), options.rounds),
        "memory": lambda: memory(min(3, options.rounds)),
        "speed": lambda: speed(options.prompts, options.rounds),
        "bfloat16": lambda: bfloat16(min(64, options.prompts), options.rounds),
    }


def main() -> int:
    return run_parts(__doc__, PARTS, parts)


if __name__ == "__main__":
    sys.exit(main())
