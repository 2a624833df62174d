"""One of two ranks: `stream_rank.py RANK FILE STORE INDEX SPACE SITE OUT` writes the tokens that it was given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import actcache as ac


def main() -> None:
    rank, meeting, place, index, space, site, out = sys.argv[1:]
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
    store = ac.Store(place, index_dir=Path(index))
    stream = ac.stream_activations(store, site, space=space, batch_size=16, with_tokens=True)
    # Workers that start anew know nothing of the group.
    loader = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    found = [
        (p, q) for _, tokens in loader for p, q in zip(tokens.prompt.tolist(), tokens.position.tolist(), strict=True)
    ]
    Path(out).write_text(json.dumps([found, len(stream)]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
