"""What a tuned lens puts in front of the final norm: an affine map for each layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import FormatError, MissingFileError, OptionError
from actcache.model.sites import resolve_layers

Map = Callable[[Tensor], Tensor]

_CONFIG, _PARAMETERS = "config.json", "params.pt"


def read_translators(translators: Any, name: str, layers: list[int], depth: int, width: int) -> list[Map | None]:
    """For each of `layers` of the site `name` what its rows ``[n, D]`` are put through; None for nothing.

    Args:
        translators: None; by layer of the site ``(weight [D, D], bias [D] or None)``, a linear layer or a function,
            which are applied as they are (``h -> weight @ h + bias``); or the folder of a lens that the package
            tuned-lens saved, whose maps are added to the stream (``h -> h + weight @ h + bias``), and of which number
            ``i`` belongs to the input of block ``i``. What leaves the last block needs none.
        depth, width: the number of blocks, and `D`.

    Raises:
        OptionError: a layer without a map, or a map of another width.
        MissingFileError, FormatError: a folder that holds no such lens, or one for another model.
    """
    if translators is None:
        return [None] * len(layers)
    if isinstance(translators, (str, PathLike)):
        given, numbers = _folder(Path(translators).expanduser(), name, layers, depth, width)
        what = f"the lens in {str(translators)!r}"
    elif isinstance(translators, Mapping):
        given = {resolve_layers(int(layer), depth)[0]: value for layer, value in translators.items()}
        numbers = layers
        what = "translators"
    else:
        raise OptionError(
            f"translators is a {type(translators).__name__}: expected {{layer: (weight, bias)}}, linear layers or "
            "functions by layer, or the folder of a tuned lens"
        )
    found: list[Map | None] = []
    for layer, number in zip(layers, numbers, strict=True):
        if number in given:
            found.append(_checked(given[number], f"{name}.{layer}", width))
        elif name == "resid_post" and layer == depth - 1:
            found.append(None)
        else:
            has = ", ".join(map(str, sorted(given))) or "none"
            raise OptionError(f"{what} has no map for {name}.{layer} (it has {has}): add one, or choose layers=")
    return found


def _checked(value: Any, where: str, width: int) -> Map:
    if isinstance(value, nn.Linear):
        if (value.in_features, value.out_features) != (width, width):
            raise _other_width(where, f"takes {value.in_features} to {value.out_features} dimensions", width)
        return _Called(value, where, width)
    if isinstance(value, tuple) and len(value) == 2:
        weight = torch.as_tensor(value[0]).detach()
        bias = None if value[1] is None else torch.as_tensor(value[1]).detach()
        if weight.shape != (width, width):
            raise _other_width(where, f"has a weight {list(weight.shape)}", width)
        if bias is not None and bias.shape != (width,):
            raise _other_width(where, f"has a bias {list(bias.shape)}", width)
        return _Affine(weight, bias)
    if callable(value):
        return _Called(value, where, width)
    raise OptionError(
        f"the translator of {where} is a {type(value).__name__}: expected (weight, bias), a linear layer or a function"
    )


def _other_width(where: str, has: str, width: int) -> OptionError:
    return OptionError(f"the translator of {where} {has}, and the stream is {width} wide: it is of another model")


class _Affine:
    """``weight @ h + bias``, in float32 or wider; with `added` that on top of ``h``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, added: bool = False) -> None:
        self._weight, self._bias, self._added = weight, bias, added

    def __call__(self, rows: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(rows.dtype, self._weight.dtype), torch.float32)
        wide = rows.to(dtype)
        found = wide @ self._weight.to(wide).T
        if self._bias is not None:
            found = found + self._bias.to(wide)
        return found + wide if self._added else found


class _Called:
    """A function of the caller's, whose result is looked at."""

    def __init__(self, function: Callable[[Tensor], Any], where: str, width: int) -> None:
        self._function, self._where, self._width = function, where, width

    def __call__(self, rows: Tensor) -> Tensor:
        given = rows
        if isinstance(self._function, nn.Module):
            like = next((p for p in self._function.parameters() if p.is_floating_point()), rows)
            given = rows.to(like.device, like.dtype)
        found = self._function(given)
        if not isinstance(found, Tensor) or found.shape != rows.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise _other_width(self._where, f"makes {got} of {list(rows.shape)}", self._width)
        return found.detach().to(rows.device)


def _folder(folder: Path, name: str, layers: list[int], depth: int, width: int) -> tuple[dict[int, Map], list[int]]:
    """The maps in a folder of the package tuned-lens, by number, and the number that belongs to each of `layers`."""
    for file in (_CONFIG, _PARAMETERS):
        if not (folder / file).is_file():
            raise MissingFileError(
                f"{str(folder)!r} holds no {file}: a tuned lens is a folder with {_CONFIG} and {_PARAMETERS}"
            )
    if name == "resid_mid":
        raise OptionError(
            "a tuned lens has maps for the stream between blocks: choose site='resid_post' or 'resid_pre'"
        )
    try:
        config = json.loads((folder / _CONFIG).read_text())
        said = config["d_model"], config["num_hidden_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder / _CONFIG} is not the config of a tuned lens: {error!r}") from error
    if said != (width, depth):
        base = config.get("base_model_name_or_path")
        raise OptionError(
            f"the lens in {str(folder)!r} is for {said[1]} layers of width {said[0]} ({base}), and this model has "
            f"{depth} of width {width}"
        )
    try:
        held = torch.load(folder / _PARAMETERS, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(f"{folder / _PARAMETERS} cannot be read as weights alone: {type(error).__name__}") from error
    maps: dict[int, Map] = {}
    for number in range(depth):
        weight, bias = held.get(f"{number}.weight"), held.get(f"{number}.bias")
        if not isinstance(weight, Tensor) or weight.shape != (width, width):
            raise FormatError(f"{folder / _PARAMETERS} holds no tensor '{number}.weight' of [{width}, {width}]")
        if bias is not None and bias.shape != (width,):
            raise FormatError(f"{folder / _PARAMETERS} holds a '{number}.bias' that is not [{width}]")
        maps[number] = _Affine(weight, bias, added=True)
    # Number i belongs to hidden_states[i] of transformers, which enters block i.
    return maps, [layer + 1 if name == "resid_post" else layer for layer in layers]
