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
        values: by site, ``[T, D]`` on the CPU, in the dtype it has in the model; heads lie side by side.
        hidden_states: transformers' own, by stack (``""`` for the only one), each ``[T, D]``; absent when the model
            returns none.
        choices: by path of a router, what it chose for each token, ``[T, k]``.
        attentions: transformers' own attention probabilities, by stack, each ``[H, T, T]``; only when asked for.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    hidden_states: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    attentions: dict[str, list[Tensor]] = field(default_factory=dict)


@torch.no_grad()
def run_alone(
    model: nn.Module,
    inputs: Mapping[str, Any],
    points: Mapping[str, ReadPoint],
    routers: Mapping[str, ReadPoint],
    *,
    attentions: bool = False,
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
            found.values[site] = value[0].detach().flatten(1).to("cpu", copy=True)

        return read

    def choose(path: str) -> Callable[[Tensor], None]:
        def read(value: Tensor) -> None:
            found.choices[path] = value.cpu()

        return read

    try:
        for site, point in points.items():
            handles += [_on_input(module, note) for module, note in point.around]
            handles.append(_hook(point, keep(site)))
        for path, point in routers.items():
            handles.append(_hook(point, choose(path)))
        output = _call(model, inputs, attentions)
    finally:
        for handle in handles:
            handle.remove()
    missed = [site for site in points if site not in found.values]
    if missed:
        raise MissedModuleError(f"{', '.join(missed)} did not run when the model did: ask for other layers.")
    for stack in ("", "encoder", "decoder"):
        prefix = f"{stack}_" if stack else ""
        states = getattr(output, f"{prefix}hidden_states", None)
        if isinstance(states, Sequence) and all(isinstance(state, Tensor) for state in states):
            found.hidden_states[stack] = [state[0].to("cpu", copy=True) for state in states]
        made = getattr(output, f"{prefix}attentions", None)
        if attentions and isinstance(made, Sequence):
            found.attentions[stack] = [one[0].to("cpu", copy=True) for one in made if isinstance(one, Tensor)]
    return found


def _call(model: nn.Module, inputs: Mapping[str, Any], attentions: bool) -> Any:
    asked = {"output_attentions": True} if attentions else {"output_hidden_states": True}
    try:
        return model(**inputs, **asked)
    except TypeError as error:
        if "output_" not in str(error):
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
