"""Batches on their way onto a GPU, with the calls that torch is given written down in place of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.stream import device
from store_helpers import SITES, every_token, make_store

GPU = torch.device("cuda:0")


class Recorded:
    """What `torch.cuda` has of streams, and what tensors do on their way; `log` says in which stream, and of which
    batch (its first number)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.current = "default"
        self.pinned: set[int] = set()
        to = torch.Tensor.to

        def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            self.pinned.add(id(copy))
            self.note("pin", tensor)
            # As what is pinned is kept by torch until it has been copied.
            self.kept = [*getattr(self, "kept", []), copy]
            return copy

        def moved(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if not (args and isinstance(args[0], torch.device) and args[0].type == "cuda"):
                return to(tensor, *args, **options)
            assert id(tensor) in self.pinned
            assert options == {"non_blocking": True}
            self.note("copy", tensor)
            return tensor.clone()

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
        monkeypatch.setattr(torch.Tensor, "to", moved)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.note(f"use {stream}", tensor))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(self, "copying"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(device, "_streams", {})

    def note(self, what: str, tensor: Any = None) -> None:
        first = float(tensor.reshape(-1)[0]) if isinstance(tensor, torch.Tensor) else tensor
        self.log.append((self.current, what, first))

    @contextlib.contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, recorded: Recorded, name: str) -> None:
        self.recorded, self.name = recorded, name

    def __str__(self) -> str:
        return self.name

    def record_event(self) -> int:
        self.recorded.note("event", number := sum(what == "event" for _, what, _ in self.recorded.log))
        return number

    def wait_event(self, event: int) -> None:
        self.recorded.note("wait", event)


@pytest.mark.parametrize("sites", [SITES[0], SITES])
def test_batches_are_copied_beside_what_is_done_with_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: Any
) -> None:
    """Out of pinned memory, in a stream of their own, up to `prefetch` ahead; what comes after waits for just them."""
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    options: dict[str, Any] = {"space": space, "batch_size": 16, "normalize": "mean"}
    plain = list(ac.stream_activations(store, sites, **options))
    recorded = Recorded(monkeypatch)
    stream = ac.stream_activations(store, sites, device=GPU, prefetch=0, **options)
    assert stream._options.device == GPU
    got = list(stream)
    names = [sites] if isinstance(sites, str) else sites
    wanted: list[tuple[str, str, Any]] = []
    for number, batch in enumerate(plain):
        each = [batch] if isinstance(batch, torch.Tensor) else [batch[name] for name in names]
        firsts = [float(tensor.reshape(-1)[0]) for tensor in each]
        for first in firsts:
            wanted += [("copying", "pin", first), ("copying", "copy", first)]
        wanted += [("copying", "event", number), ("default", "wait", number)]
        wanted += [("default", "use default", first) for first in firsts]
    assert recorded.log == wanted
    for one, other in zip(got, plain, strict=True):
        for name in names:
            found, known = (one, other) if isinstance(sites, str) else (one[name], other[name])
            assert torch.equal(found, known)


def test_copies_are_made_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    recorded = Recorded(monkeypatch)
    batches = iter(ac.stream_activations(store, SITES[0], space=space, batch_size=8, device="cuda", prefetch=2))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    waits = [event for _, what, event in recorded.log if what == "wait"]
    assert waits == [0]
    assert all(where == "copying" for where, what, _ in recorded.log if what in ("pin", "copy", "event"))


def test_workers_do_not_copy_onto_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    Recorded(monkeypatch)
    stream = ac.stream_activations(store, SITES[0], space=space, device=GPU)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    with pytest.raises(ac.errors.OptionError, match="pin_memory=True"):
        next(iter(loader))
