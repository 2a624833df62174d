"""The obvious way, which the tests of traps hold against this library's."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
PROMPTS = [[5, 9, 100], [8, 8, 4, 200, 31, 6, 77, 12, 13, 14], [7], [90, 91, 92, 93, 94]]
WRONG = 1e-3


def first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def path_of(model: nn.Module, site: str) -> str:
    return next(info.path for info in ac.sites(model) if str(info.site) == site)


def plain(model: nn.Module, paths: list[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What modules return, by ordinary hooks that copy the first tensor at once."""
    found: dict[str, Any] = {}
    handles = []
    for path in paths:

        def note(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found[path] = first(output).detach().clone()

        handles.append(model.get_submodule(path).register_forward_hook(note))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def spied(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the backbone, from now on."""
    calls: list[dict[str, Any]] = []
    kind = type(model.base_model)
    forward = kind.forward

    @functools.wraps(forward)
    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(forward).bind(self, *args, **kwargs).arguments)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", spy)
    return calls


def rows_of(model: Any, prompts: list[list[int]], **options: Any) -> dict[str, list[Tensor]]:
    extracted = ac.ActivationExtractor(model, **options).extract(prompts)
    return {site: list(extracted[site]) for site in extracted}
