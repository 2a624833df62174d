"""Warm up at a server, in a process that may be killed: MODEL HOST STORE. Prints when it is ready to begin."""

from __future__ import annotations

import sys

import actcache as ac

if __name__ == "__main__":
    model, host, store = sys.argv[1:]
    cache = ac.UnifiedCache(
        model, backend="nnsight", remote=host, store=store, batch_size=1, compute_perplexity=False, layers=[0, -1]
    )
    print("begins", flush=True)
    cache.warmup([[3 + i, 7, 11] for i in range(12)])
    print("done", flush=True)
