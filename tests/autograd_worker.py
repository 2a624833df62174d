"""Run a model again in autograd's own thread of a device, and say what that thread met there.

The device is torch's placeholder for devices of others, which needs no hardware. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

import actcache as ac
from actcache.testing.tiny import tiny_model
from edit_helpers import moved

IDS = torch.tensor([[5, 9, 100, 7], [8, 3, 4, 50]])
device_types: Any = torch._C._autograd.DeviceType  # type: ignore[attr-defined]
accelerator: Any = torch._C._acc  # type: ignore[attr-defined]


class Guard(accelerator.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return device_types.PrivateUse1


def on_device(tensor: Tensor) -> Tensor:
    made: Tensor = accelerator.create_empty_tensor(tuple(tensor.shape), tensor.dtype)
    return made


class ToDevice(torch.autograd.Function):
    """Goes to the device; its backward, which is run in the device's thread, calls what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, again: Callable[[], None]) -> Tensor:  # type: ignore[override]
        ctx.again = again
        return on_device(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.again()
        return torch.ones(2), None


class ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ones(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return on_device(gradient)


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend("other", device_guard=Guard())  # type: ignore[attr-defined]
    model = tiny_model("gpt2")
    seen: list[Tensor] = []
    threads: set[int] = set()

    def again() -> None:
        threads.add(threading.get_ident())
        seen.append(model(IDS).logits)

    def backward() -> None:
        x = torch.ones(2, requires_grad=True)
        ToCpu.apply(ToDevice.apply(x, again)).sum().backward()  # type: ignore[no-untyped-call]

    with torch.no_grad():
        plain = model(IDS).logits
    at_last = ac.steer("resid_post.1", torch.ones(32), positions="last")
    with ac.edit(model, {"resid_post.1": moved}), ac.edit(model, at_last), ac.capture(model, "lm_head") as cache:
        expected = model(IDS).logits
        backward()
        # Another thread's, for which the same thread of the device works.
        other = threading.Thread(target=backward)
        other.start()
        other.join()
        backward()
    backward()
    result = {
        "threads": len(threads | {threading.get_ident()}),
        "edited": [bool(torch.equal(logits, expected)) for logits in seen],
        "plain": [bool(torch.equal(logits, plain)) for logits in seen],
        "visits": len(cache["lm_head"]),
    }
    print(json.dumps(result), flush=True)
    # The placeholder's thread outlives the interpreter's end now and then, and aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
