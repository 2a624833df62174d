"""The other side of every comparison: one prompt run by itself, read by plain torch hooks.

Nothing of capture or extraction takes part. The modules that are hooked are those that the anatomy names; that these
are the right ones is what identities and transformers' own hidden states are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import MissedModuleError
from actcache.model.anatomy import ReadPoint


@dataclass
class Alone:
    """What one prompt of `T` tokens gives by itself.

    Attributes:
        values: by site, ``[T, D]`` on the CPU, in the dtype it has in the model.
        hidden_states: transformers' own, by stack (``""`` for the only one), each ``[T, D]``; absent when the model
            returns none.
        choices: by path of a router, what it chose for each token, ``[T, k]``.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    hidden_states: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def run_alone(
    model: nn.Module,
    inputs: Mapping[str, Any],
    points: Mapping[str, ReadPoint],
    routers: Mapping[str, ReadPoint],
) -> Alone:
    """One pass of `model` over one prompt, ``inputs["input_ids"]`` being ``[1, T]``.

    Raises `MissedModuleError` when a module that is to be read does not run.
    """
    found = Alone()
    handles = []

    def keep(site: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            if site in found.values:
                raise RuntimeError(f"{site} was computed twice in one pass")
            # A copy: some architectures go on to work in place on what a module returned.
            found.values[site] = value[0].detach().to("cpu", copy=True)

        return read

    def choose(path: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            found.choices[path] = value.cpu()

        return read

    try:
        for site, point in points.items():
            if point.around is not None:
                handles.append(_on_input(point.around[0], point.around[1]))
            handles.append(_hook(point, keep(site)))
        for path, point in routers.items():
            handles.append(_hook(point, choose(path)))
        output = _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    missed = [site for site in points if site not in found.values]
    if missed:
        raise MissedModuleError(f"{', '.join(missed)} did not run when the model did: ask for other layers.")
    for stack, name in {
        "": "hidden_states",
        "encoder": "encoder_hidden_states",
        "decoder": "decoder_hidden_states",
    }.items():
        states = getattr(output, name, None)
        if isinstance(states, Sequence) and all(isinstance(state, Tensor) for state in states):
            found.hidden_states[stack] = [state[0].to("cpu", copy=True) for state in states]
    return found


def _call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return model(**inputs, output_hidden_states=True)
    except TypeError as error:
        if "output_hidden_states" not in str(error):
            raise
        return model(**inputs)


def _hook(point: ReadPoint, read: Callable[[Tensor], None]) -> Any:
    if point.side == "input":
        return _on_input(point.module, lambda call: read(point.extract(call)))

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        read(point.extract(output))

    return point.module.register_forward_hook(on_output)


def _on_input(module: nn.Module, read: Callable[[Any], None]) -> Any:
    def on_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
        read((args, kwargs))

    return module.register_forward_pre_hook(on_input, with_kwargs=True)
