"""What capturing costs over the bare forward pass.

    python benchmarks/capture.py [--rounds 61] [--small-only] [--json]

Two GPT-2-shaped models with random weights, one thread, no gradients: 4 blocks x 64 wide with 8 tokens (all overhead),
and 12 x 768 with 8 x 64 tokens (all memory traffic). The whole block counts: resolve, enter, forward, exit. Bounds
are the ratio a candidate may cost; plain torch hooks that keep references, without copies, run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import actcache as ac
from _measure import Row, compare, print_table

BOUNDS = {
    "4 x 64": {"every block": 1.05, "every block, sites": 1.05, "every module": 1.45, "after 200 captures": 1.03},
    "12 x 768": {"every block": 1.03, "every block, sites": 1.03, "every module": 1.15},
}


def gpt2(layers: int, width: int, vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 16, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def candidates(model: GPT2LMHeadModel, ids: torch.Tensor) -> dict[str, object]:
    paths = [f"transformer.h.{i}" for i in range(model.config.n_layer)]
    blocks = [model.get_submodule(path) for path in paths]

    def hooked(modules: list[torch.nn.Module]) -> dict[int, object]:
        kept: dict[int, object] = {}

        def keep(module: torch.nn.Module, args: object, output: object) -> None:
            kept[id(module)] = output

        handles = [module.register_forward_hook(keep) for module in modules]
        model(ids)
        for handle in handles:
            handle.remove()
        return kept

    def captured(*args: object, **kwargs: object) -> object:
        with ac.capture(model, *args, **kwargs) as cache:  # type: ignore[attr-defined]
            model(ids)
        return cache

    return {
        "plain hooks, blocks, no copies": lambda: hooked(blocks),
        "every block": lambda: captured(paths),
        "every block, pattern": lambda: captured("transformer.h.*"),
        "every block, no copies": lambda: captured(paths, copy=False),
        "every block, sites": lambda: captured(sites="resid_post"),
        "plain hooks, all modules, no copies": lambda: hooked(list(model.modules())),
        "every module": lambda: captured(),
        "every module, no copies": lambda: captured(copy=False),
        "every module, inputs too": lambda: captured(include_inputs=True),
    }


def measure(layers: int, width: int, vocabulary: int, batch: int, tokens: int, rounds: int, inner: int) -> list[Row]:
    model = gpt2(layers, width, vocabulary)
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return compare(
            lambda: model(ids),
            candidates(model, ids),  # type: ignore[arg-type]
            rounds,
            reference_name="bare forward",
            inner=inner,
        )


def after_many(rounds: int) -> list[Row]:
    """A plain forward of a model captured 200 times, against one of a twin that never was."""
    fresh, used = gpt2(4, 64, 50257), gpt2(4, 64, 50257)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for i in range(200):
            with ac.capture(used, include_inputs=i % 2 == 0):  # type: ignore[attr-defined]
                used(ids)
        return compare(
            lambda: fresh(ids),
            {"after 200 captures": lambda: used(ids)},
            rounds,
            reference_name="never captured",
            inner=10,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--small-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    tables = {"4 x 64": measure(4, 64, 50257, 1, 8, options.rounds, 5) + after_many(options.rounds)[1:]}
    if not options.small_only:
        tables["12 x 768"] = measure(12, 768, 50257, 8, 64, max(7, options.rounds // 8), 1)
    if options.json:
        print(json.dumps({name: [row.as_dict() for row in rows] for name, rows in tables.items()}, indent=2))
        return 0
    titles = {"4 x 64": "4 blocks x 64 wide, 1 x 8 tokens", "12 x 768": "12 blocks x 768 wide, 8 x 64 tokens"}
    held = [print_table(titles[name], rows, bounds=BOUNDS[name]) for name, rows in tables.items()]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
