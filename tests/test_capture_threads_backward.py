"""Backward passes beside the blocks of other threads: what is run again is run as for who called it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.backend_registration
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import tiny_model
from edit_helpers import moved
from thread_helpers import elsewhere, switching_often

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
H1 = "transformer.h.1"


@pytest.fixture
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    with switching_often():
        yield


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(ids, use_cache=False).logits.square().mean()
    return loss


def gradients(model: Any, work: Callable[[], None]) -> list[Tensor]:
    model.zero_grad()
    work()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_edits_hold_where_blocks_are_run_again(model: Any, reentrant: bool) -> None:
    edits = [{"resid_mid.1": moved}, ac.steer("attn_out.2", torch.ones(32), positions=[0, "last"])]

    def train() -> None:
        with ac.edit(model, edits[0]), ac.edit(model, edits[1]):
            loss_of(model, IDS).backward()

    expected = gradients(model, train)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = gradients(model, train)
    assert len(again) == len(expected)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_another_threads_backward_is_its_own(model: Any) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = gradients(model, lambda: loss_of(model, IDS).backward())
    loss = loss_of(model, IDS)
    with ac.edit(model, {"resid_mid.1": moved}), ac.capture(model, f"{H1}.attn") as cache:
        # The graph was made here, before the block; the blocks are run again there.
        theirs = gradients(model, lambda: elsewhere(loss.backward))
        mine = gradients(model, lambda: loss_of(model, IDS).backward())
    assert all(map(torch.equal, theirs, plain))
    assert not all(map(torch.equal, mine, plain))
    # One run, and the one in this thread's backward().
    assert len(cache[f"{H1}.attn"]) == 2


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no device without hardware, whose thread autograd would use",
)
def test_threads_of_autograd_work_for_the_thread_that_called_it() -> None:
    # In a process of its own: a device stays registered.
    script = Path(__file__).with_name("autograd_worker.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        # The main thread and the device's.
        "threads": 2,
        # Run in this thread's backward(), in another's, in this one's again, and after the block.
        "edited": [True, False, True, False],
        "plain": [False, True, False, True],
        "visits": 3,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, where autograd has threads of its own")
@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_run_again_on_cuda(model: Any, reentrant: bool) -> None:
    model.cuda()
    ids, ran_in = IDS.cuda(), set()
    handle = model.transformer.h[1].register_forward_hook(lambda *_: ran_in.add(threading.get_ident()))
    edits = [{"resid_mid.1": moved}, ac.steer("attn_out.2", torch.ones(32), positions=[0, "last"])]

    def train() -> None:
        with ac.edit(model, edits[0]), ac.edit(model, edits[1]):
            loss_of(model, ids).backward()

    expected = gradients(model, train)
    plain = gradients(model, lambda: loss_of(model, ids).backward())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ran_in.clear()
    again = gradients(model, train)
    assert len(ran_in) == 2
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other)
    # Meanwhile another thread's is plain, though the same thread of autograd works for both.
    loss = loss_of(model, ids)
    with ac.edit(model, edits[0]):
        theirs = gradients(model, lambda: elsewhere(loss.backward))
        loss_of(model, ids).backward()
    for one, other in zip(theirs, plain, strict=True):
        torch.testing.assert_close(one, other)
    handle.remove()
