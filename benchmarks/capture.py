"""What capturing costs over the bare forward pass.

    python benchmarks/capture.py [--rounds 61] [--small-only] [--json]

Two GPT-2-shaped models with random weights, one thread, no gradients: 4 blocks x 64 wide with 8 tokens (all overhead),
and 12 x 768 with 8 x 64 tokens (all memory traffic). The whole block counts: resolve, enter, forward, exit. Bounds
are the ratio a candidate may cost; plain torch hooks that keep references, without copies, run beside it. Then the
same for 64 new tokens of `generate`, for a block that another thread has open, and for the last position of each of 32
prompts, against hooks by hand that take it and copy that.
"""

from __future__ import annotations

import json
import os
import sys
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import actcache as ac
from _measure import Row, compare, in_rounds, print_table

BOUNDS = {
    "4 x 64": {"every block": 1.05, "every block, sites": 1.05, "every module": 1.45, "after 200 captures": 1.03},
    "12 x 768": {"every block": 1.03, "every block, sites": 1.03, "every module": 1.15},
    "generation": {"every block": 1.05, "every block, sites": 1.05},
    "positions": {"positions='last'": 1.03, "positions='last', sites": 1.03},
    "threads": {"every module, in another thread": 1.1},
}
NEW_TOKENS = 64


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


def in_another_thread(rounds: int) -> list[Row]:
    """A plain forward beside a block that another thread has open on the same model."""
    own, shared = gpt2(4, 64, 50257), gpt2(4, 64, 50257)
    ids = torch.arange(8)[None]
    block = ac.capture(shared, include_inputs=True)  # type: ignore[attr-defined]
    opener = threading.Thread(target=block.__enter__)
    opener.start()
    opener.join()
    with torch.no_grad():
        rows = compare(
            lambda: own(ids),
            {"every module, in another thread": lambda: shared(ids)},
            rounds,
            reference_name="bare forward",
            inner=10,
        )
    block.__exit__(ValueError, None, None)
    return rows


def generation(rounds: int) -> list[Row]:
    """The whole of a call of `generate`, with a visit of every block for each of its steps."""
    model = gpt2(12, 768, 5000)
    paths = [f"transformer.h.{i}" for i in range(12)]
    ids = torch.randint(1, 5000, (1, 16), generator=torch.Generator().manual_seed(0))

    def generate() -> torch.Tensor:
        made: torch.Tensor = model.generate(  # type: ignore[operator]
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return made

    def captured(**kwargs: object) -> None:
        with ac.capture(model, **kwargs) as cache:  # type: ignore[attr-defined]
            generate()
        if "sites" in kwargs:
            # Joined when it is read.
            assert cache["resid_post.11"].shape == (1, 15 + NEW_TOKENS, 768)
        else:
            assert len(cache[paths[-1]]) == NEW_TOKENS

    return compare(
        generate,
        {
            "every block": lambda: captured(modules=paths),
            "every block, sites": lambda: captured(sites="resid_post"),
        },
        rounds,
        reference_name="bare generate",
    )


def last_positions(rounds: int) -> list[Row]:
    """The last position of 32 prompts: time against hooks by hand, bytes against what is asked for."""
    model = gpt2(12, 256, 1000)
    ids = torch.randint(1, 1000, (32, 64), generator=torch.Generator().manual_seed(0))
    paths = [f"transformer.h.{i}" for i in range(12)]
    blocks = [model.get_submodule(path) for path in paths]

    def by_hand() -> None:
        kept: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, args: object, output: object) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
            kept.append(hidden[:, -1:].clone())

        handles = [block.register_forward_hook(keep) for block in blocks]
        model(ids)
        for handle in handles:
            handle.remove()

    def captured(**kwargs: object) -> None:
        with ac.capture(model, **kwargs) as cache:  # type: ignore[attr-defined]
            model(ids)
        positions = 1 if "positions" in kwargs else 64
        assert cache.nbytes == 12 * 32 * positions * 256 * 4

    with torch.no_grad():
        return compare(
            by_hand,
            {
                "positions='last'": lambda: captured(modules=paths, positions="last"),
                "positions='last', sites": lambda: captured(sites="resid_post", positions="last"),
                "every position": lambda: captured(modules=paths),
            },
            rounds,
            reference_name="hooks by hand",
        )


def main() -> int:
    parser = in_rounds(__doc__, 61)
    parser.add_argument("--small-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    tables = {"4 x 64": measure(4, 64, 50257, 1, 8, options.rounds, 5) + after_many(options.rounds)[1:]}
    tables["threads"] = in_another_thread(options.rounds)
    if not options.small_only:
        tables["12 x 768"] = measure(12, 768, 50257, 8, 64, max(7, options.rounds // 8), 1)
        tables["generation"] = generation(max(7, options.rounds // 8))
        tables["positions"] = last_positions(max(15, options.rounds // 2))
    if options.json:
        print(json.dumps({name: [row.as_dict() for row in rows] for name, rows in tables.items()}, indent=2))
        return 0
    titles = {
        "4 x 64": "4 blocks x 64 wide, 1 x 8 tokens",
        "threads": "4 blocks x 64 wide, while another thread captures",
        "12 x 768": "12 blocks x 768 wide, 8 x 64 tokens",
        "generation": f"12 blocks x 768 wide, {NEW_TOKENS} new tokens",
        "positions": "12 blocks x 256 wide, 32 x 64 tokens, the last token of each prompt (a 64th of the bytes)",
    }
    held = [print_table(titles[name], rows, bounds=BOUNDS[name]) for name, rows in tables.items()]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
