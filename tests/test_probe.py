"""The short passes in which a model is looked at: they leave alone what other threads and other blocks do with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import actcache as ac
from actcache.model.anatomy import Anatomy, describe
from actcache.model.probe import undisturbed
from actcache.model.structure import find_structure
from actcache.testing.tiny import tiny_model

IDS = torch.arange(3, 9)[None]


@contextmanager
def looked_at(model: nn.Module) -> Iterator[list[BaseException]]:
    """Another thread looks at the model, over and over, while the block is open."""
    stop, errors = threading.Event(), []

    def look() -> None:
        try:
            while not stop.is_set():
                anatomy = Anatomy(model, find_structure(model))
                assert anatomy.findings.refused == {}
                assert len(anatomy.sites()) > 20
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()


def test_a_probe_takes_nothing_from_blocks_and_hooks_of_other_threads() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    layer = model.get_submodule("model.layers.1")
    seen: list[int] = []
    handle = layer.register_forward_hook(lambda *call: seen.append(threading.get_ident()))
    with looked_at(model) as errors:
        for _ in range(4):
            with ac.capture(model, ["model.layers.1", "model.layers.3"]) as cache, torch.no_grad():
                output = model(input_ids=IDS).logits
            torch.testing.assert_close(output, plain)
            assert [len(cache[f"model.layers.{number}"]) for number in (1, 3)] == [1, 1]
    assert errors == []
    # Its own passes met no hook of the caller's.
    assert seen == [threading.get_ident()] * 4
    handle.remove()
    assert not layer._forward_hooks
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


def test_a_probe_meets_no_edit_and_no_capture_of_its_own_thread() -> None:
    model = tiny_model("llama")
    honest = describe(model).identities
    with (
        ac.capture(model, "model.layers.1") as cache,
        ac.edit(model, {"model.layers.2": lambda value: value * 0}),
        torch.no_grad(),
    ):
        anatomy = Anatomy(model, find_structure(model))
        assert anatomy.identities == honest
        assert "model.layers.1" not in cache
        model(input_ids=IDS)
    assert len(cache["model.layers.1"]) == 1


@pytest.mark.parametrize("where", ["_forward_hooks", "_forward_pre_hooks"])
def test_a_hook_that_is_removed_during_a_probe_stays_removed(where: str) -> None:
    model = tiny_model("gpt2")
    layer = model.get_submodule("transformer.h.1")
    register = layer.register_forward_hook if where == "_forward_hooks" else layer.register_forward_pre_hook
    kept, gone = register(lambda *call: None), register(lambda *call: None)
    hooks: dict[int, Any] = getattr(layer, where)
    mine = hooks[kept.id]
    with undisturbed(model):
        gone.remove()
    assert dict(hooks) == {kept.id: mine}
