"""What it costs to find the parts of a loaded model and to check its identities, beyond one forward pass.

    python benchmarks/anatomy.py [--rounds 31] [--json]

Every round runs the short pass that the check makes, bare, and then the whole: structure, search, check. The
difference is taken within a round.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from _measure import Ratio, in_rounds
from actcache.model.anatomy import Anatomy
from actcache.model.probe import probe_inputs
from actcache.model.structure import find_structure

BOUND = 0.050
SIZES: dict[str, dict[str, Any]] = {
    "gpt2 48 x 768": {"model_type": "gpt2", "n_embd": 768, "n_layer": 48, "n_head": 12},
    "llama 48 x 512": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 48,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "gemma2 48 x 256": {
        "model_type": "gemma2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
}  # fmt: skip


def build(values: dict[str, Any]) -> nn.Module:
    config = AutoConfig.for_model(**{**values, "vocab_size": 1000})
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def measure(model: nn.Module, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the bare pass and of the whole, by round."""
    bare, whole = [], []
    for turn in range(-1, rounds):
        anatomy = Anatomy(model, find_structure(model))
        inputs = probe_inputs(anatomy)
        start = time.perf_counter()
        with torch.no_grad():
            anatomy.backbone(**inputs)
        between = time.perf_counter()
        assert not Anatomy(model, find_structure(model)).findings.refused
        end = time.perf_counter()
        if turn >= 0:
            bare.append(between - start)
            whole.append(end - between)
    return bare, whole


def main() -> int:
    options = in_rounds(__doc__).parse_args()
    torch.set_num_threads(1)

    missed, rows = False, []
    for name, values in SIZES.items():
        bare, whole = measure(build(values), options.rounds)
        beyond = Ratio.of([w - b for w, b in zip(whole, bare, strict=True)])
        missed |= beyond.low > BOUND
        rows.append({"model": name, "pass_s": Ratio.of(bare).median, "beyond_s": beyond.median,
                     "beyond_95": [beyond.low, beyond.high], "bound_s": BOUND})  # fmt: skip
    if options.json:
        print(json.dumps({"rounds": options.rounds, "rows": rows}))
        return int(missed)
    print(
        f"{'model':18}{'one pass':>12}{'beyond it':>12}   95 %            bound ({options.rounds} rounds, one thread)"
    )
    for row in rows:
        low, high = row["beyond_95"]
        verdict = "MISSED" if low > BOUND else "ok"
        print(
            f"{row['model']:18}{1e3 * row['pass_s']:9.1f} ms{1e3 * row['beyond_s']:9.1f} ms   "
            f"{1e3 * low:.1f} to {1e3 * high:.1f} ms   {1e3 * BOUND:.0f} ms {verdict}"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
