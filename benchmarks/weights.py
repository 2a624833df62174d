"""What it costs to see whether the weights of a model in memory have changed, against reading them once.

    python benchmarks/weights.py [--rounds 31] [--json]

A model of GPT-2's shape with 12 blocks of width 768, 343 MB in float32, one thread. Each call of a cache that was made
of a loaded model looks at all weights, since writes through ``.data`` or NumPy leave no other trace. The reference is
`torch.sum` of the same bytes as 64-bit integers: no checksum can be faster than a pass over the memory. The second row
shares the same sums among two threads: where it is no faster, the memory is the limit.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from _measure import compare, in_rounds, print_table
from actcache.model.in_memory import live_weights_digest

# Of the pass over the memory: the digest is to be bound by it.
BOUND = 1.6


def main() -> int:
    options = in_rounds(__doc__).parse_args()
    torch.set_num_threads(1)
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_layer=12, n_embd=768, n_head=12, vocab_size=260, n_positions=512, bos_token_id=0, eos_token_id=0)
    )
    parts = [p.detach().reshape(-1) for p in model.parameters()]
    integers = [part[: part.numel() // 2 * 2].view(torch.int64) for part in parts]
    before = live_weights_digest(model)
    with torch.no_grad():
        parts[-1][-1] += 1
        assert live_weights_digest(model) != before
        parts[-1][-1] -= 1

    def summed() -> None:
        for part in integers:
            part.sum()

    halves = [part for whole in integers for part in whole.split(max(1, -(-whole.numel() // 2)))]
    with ThreadPoolExecutor(2) as pool:
        rows = compare(
            summed,
            {
                "the same in two threads": lambda: list(pool.map(torch.sum, halves)),
                "digest of the weights": lambda: live_weights_digest(model),
            },
            options.rounds,
            reference_name="sum of the same bytes",
        )
    if options.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
        return 0
    nbytes = sum(part.nbytes for part in parts)
    held = print_table(f"weights of {nbytes / 1e6:.0f} MB", rows, bounds={rows[-1].name: BOUND}, nbytes=nbytes)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
