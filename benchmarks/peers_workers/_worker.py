"""What the workers share: requests as lines of JSON on standard input, one line of JSON back for each.

    {"do": "open", "model": FOLDER}                                    the model is loaded
    {"do": TASK, "prompts": [...], "layer": L, "batch": B, "keep": true, "store": FOLDER, "out": FILE.npy}

``keep`` says that the work of both sides ends on disk. The first line is the worker's own: the library, its version,
and how long its import took. Answers are ``{"outcome": "ran", "seconds": s}`` with the values in ``FILE.npy``, or the
outcome ``refused``, ``crashed`` or ``not offered``, and why. Runs with nothing but numpy and what the library itself
brings: no worker but our own imports actcache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import numpy as np

# What a library raises to say that it does not do something; anything else is not meant.
REFUSALS = (ValueError, NotImplementedError)


class NotOfferedError(Exception):
    """The library has nothing that does this."""


class Peer:
    """One library at work: a worker is a subclass with `load`, and a method for each task that it offers.

    A task returns a function that does the work and returns the values; what stands outside that function
    (an empty store, options) is not timed.
    """

    distribution = ""

    @property
    def version(self) -> str:
        return version(self.distribution)

    def load(self, folder: str) -> None:
        raise NotImplementedError

    def last_tokens(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        """The last token of every prompt at every layer: ``[prompts, layers, width]``."""
        raise NotOfferedError

    def every_token(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        """All tokens of the prompts, one after the other, at one layer: ``[tokens, width]``."""
        raise NotOfferedError

    def read_back(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        """As `every_token`, out of what ``every_token`` left in ``store``."""
        raise NotOfferedError

    def perplexity(self, job: dict[str, Any]) -> Callable[[], np.ndarray]:
        """exp of the mean cross-entropy of each prompt's tokens but the first: ``[prompts]``."""
        raise NotOfferedError


def batches(prompts: list[str], size: int) -> list[list[str]]:
    """The prompts `size` at a time, in the order given."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def answer(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    try:
        if job["do"] == "open":
            started = time.perf_counter()
            peer.load(job["model"])
            return {"outcome": "ran", "seconds": time.perf_counter() - started}
        work = getattr(peer, job["do"])(job)
        started = time.perf_counter()
        values = work()
        seconds = time.perf_counter() - started
        np.save(job["out"], np.asarray(values))
    except NotOfferedError:
        return {"outcome": "not offered"}
    except REFUSALS as error:
        return {"outcome": "refused", "why": told(error)}
    except Exception as error:
        return {"outcome": "crashed", "why": told(error)}
    return {"outcome": "ran", "seconds": seconds}


def told(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def serve(make: Callable[[], Peer]) -> None:
    """Answer until standard input ends. `make` imports the library."""
    # Libraries print what they like; this descriptor is the protocol's alone.
    talk = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    started = time.perf_counter()
    try:
        peer = make()
        said = {"outcome": "ran", "library": peer.distribution, "version": peer.version}
    except Exception as error:
        print(json.dumps({"outcome": "crashed", "why": told(error)}), file=talk, flush=True)
        return
    print(json.dumps({**said, "seconds": time.perf_counter() - started}), file=talk, flush=True)
    with suppress(BrokenPipeError):
        for line in sys.stdin:
            print(json.dumps(answer(peer, json.loads(line))), file=talk, flush=True)
