"""Extraction on a GPU against the bare forward pass of the backbone: tokens per second, on models of 1B and 8B shape.

    python benchmarks/gpu.py [--shape 1b|8b|tiny] [--device cuda] [--attention sdpa] [--tokens 200000] [--rounds 5]

The weights are random, made on the device in bfloat16; nothing is downloaded. The reference runs the backbone (no head,
no cache) over the same prompts in the batches that the extraction makes, and keeps nothing. The candidates run and
hand over, without storing: one layer, half depth, all layers pooled, all layers every token.

Every row is a forward pass of all blocks, or of half of them where half the depth is asked for; its own reference is
the backbone cut to as many. ``--device cpu --shape tiny`` runs anywhere and shows only that the script works.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import actcache as ac
from _measure import Row, arguments, compare, reporting
from actcache.extract.batching import Batch, make_batches, token_budget

VOCABULARY = 32_000
# Of 1B and 8B as Llama 3 has them, but for the vocabulary, which no row here multiplies by.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
FEW_LAYERS = 0.9


def prompts_of(tokens: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Prompts of log-normal length, 16 to 1,024 tokens (median about 150), `tokens` in all."""
    rng = np.random.default_rng(seed)
    prompts: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    while tokens > 0:
        length = int(min(tokens, np.clip(rng.lognormal(np.log(150), 0.8), 16, 1024)))
        prompts.append(rng.integers(0, VOCABULARY, length, np.int32))
        tokens -= length
    return prompts


def random_model(shape: str, device: torch.device, attention: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True)
    config._attn_implementation = attention
    config.dtype = dtype
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        # Made where they stay: an 8B model need not pass through the memory of the host.
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@torch.no_grad()
def forward_only(
    model: LlamaForCausalLM, prompts: list[np.ndarray[Any, np.dtype[np.int32]]], todo: list[Batch], depth: int
) -> None:
    """The first `depth` blocks of the backbone over every batch, on the device alone."""
    backbone, blocks = model.model, model.model.layers
    backbone.layers = nn.ModuleList(list(blocks)[:depth])
    layers, backbone.config.num_hidden_layers = backbone.config.num_hidden_layers, depth
    try:
        for batch in todo:
            padded = np.zeros((len(batch.indices), batch.length), np.int64)
            real = np.zeros_like(padded)
            for row, i in enumerate(batch.indices):
                padded[row, : len(prompts[i])] = prompts[i]
                real[row, : len(prompts[i])] = 1
            ids = torch.from_numpy(padded).to(model.device)
            mask = torch.from_numpy(real).to(model.device) if batch.ragged else None
            backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        wait(model.device)
    finally:
        backbone.layers = blocks
        backbone.config.num_hidden_layers = layers


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extraction(
    model: LlamaForCausalLM, prompts: list[np.ndarray[Any, np.dtype[np.int32]]], budget: int, **options: Any
) -> Callable[[], None]:
    """Runs the prompts and takes what comes, as a writer would, without writing."""
    extractor = ac.ActivationExtractor(model, max_batch_tokens=budget, **options)

    def run() -> None:
        taken = 0
        for batch, _ in extractor.batches(prompts, extractor.sites):
            taken += len(batch.indices)
        assert taken == len(prompts)
        wait(model.device)

    return run


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="sdpa", help="sdpa, flash_attention_2, eager")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--budget", type=int, help="padded tokens per batch (default: the extraction's own)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here: run this on a machine that has one, or see that the script works with "
            "--device cpu --shape tiny"
        )
    if device.type == "cpu" and options.shape != "tiny":
        parser.error(f"--shape {options.shape} on a CPU would take hours and say nothing of a GPU: use --shape tiny")
    model = random_model(options.shape, device, options.attention, getattr(torch, options.dtype))
    prompts = prompts_of(min(options.tokens, 4_000) if options.shape == "tiny" else options.tokens)
    tokens = sum(map(len, prompts))
    depth = SHAPES[options.shape]["num_hidden_layers"]
    half = depth // 2
    budget = options.budget or token_budget(str(device))
    todo = make_batches([len(p) for p in prompts], max_tokens=budget)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: {options.shape} shape, {options.dtype}, "
        f"{options.attention}, {len(prompts)} prompts, {tokens} tokens in {len(todo)} batches of up to {budget}"
    )
    last = [depth - 1]
    with reporting(options) as report:
        for title, blocks, candidates in [
            (
                f"all {depth} blocks run", depth,
                {
                    "one layer, last token": {"layers": last, "pooling": "last_token"},
                    "one layer, every token": {"layers": last},
                    "4 layers, every token": {"layers": [i * depth // 4 + depth // 4 - 1 for i in range(4)]},
                    "all layers, last token": {"layers": "all", "pooling": "last_token"},
                    "all layers, mean": {"layers": "all", "pooling": "mean"},
                    "all layers, every token": {"layers": "all"},
                },
            ),
            (f"{half} of {depth} blocks run", half, {"half depth, every token": {"layers": [half - 1]}}),
        ]:  # fmt: skip
            runs = {name: extraction(model, prompts, budget, **wanted) for name, wanted in candidates.items()}
            rows = compare(
                lambda blocks=blocks: forward_only(model, prompts, todo, blocks),  # type: ignore[misc]
                runs,
                2 if options.quick else options.rounds,
                reference_name="backbone alone",
                warmup=1,
            )
            few = {name: FEW_LAYERS for name in candidates if not name.startswith("all")}
            # Bounds are of a card; a small model on a CPU is all overhead.
            bounds = few if device.type == "cuda" else {}
            report.add([(title, rows, {"bounds": bounds})], show="speed")
            print_rates(rows, tokens)
    return 0 if report.held else 1


def print_rates(rows: list[Row], tokens: int) -> None:
    for row in rows:
        print(f"{row.name:26} {tokens / row.wall:14,.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
