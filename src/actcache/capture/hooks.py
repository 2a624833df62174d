"""Read values of a running model: `capture` and `run_with_cache` into a cache, `observe` inline and without copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from actcache.capture.inputs import Inputs, prepare
from actcache.capture.positions import check_named, each_prompt, resolve_positions
from actcache.capture.recording import OnInput, Recording, StopForward
from actcache.capture.requests import Modules, every_module, resolve_modules
from actcache.capture.taps import Taps
from actcache.capture.values import read_device, read_dtype
from actcache.errors import OptionError, SiteUnavailableError
from actcache.model.anatomy import Anatomy, ReadPoint, describe, original
from actcache.model.modes import evaluating
from actcache.model.sites import Site

if TYPE_CHECKING:
    from actcache.capture.cache import ActivationCache

__all__ = ["Observation", "StopForward", "capture", "observe", "run_with_cache"]

K = TypeVar("K", bound=Hashable)


def capture(
    model: nn.Module,
    modules: Modules | None = None,
    *,
    sites: str | Site | Sequence[str | Site] | None = None,
    layers: Any = None,
    include_output: bool = True,
    include_inputs: bool = False,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    detach: bool = True,
    copy: bool = True,
    positions: Any = "all",
    stop_after_last: bool = False,
) -> Recording:
    """Record what modules of `model` return (and are given) while the block is open.

        with ac.capture(model, ["transformer.h.0", "transformer.h.*.attn"], sites=["resid_post"]) as cache:
            model(**inputs)
        cache["transformer.h.0"].output, cache["resid_post.3"]

    `modules`: paths, patterns (``*`` within one name, ``**`` across) or module objects; None with no `sites` means
    every module that runs. `sites` (with `layers`) are names that mean the same on every architecture. What is kept is
    after all hooks, detached (`detach`), on `device` (None: where it is), floating tensors in `dtype`, copied
    (`copy`; modules that hand the same tensor on share one copy). `positions` counts real tokens of each pass and cuts
    before the copy; a dict names them, ``{"subject": (3, 6), "last": -1}``, for ``cache.at`` and ``cache.map_to_dict``
    (a list of lists is one list per prompt). `stop_after_last` ends each pass once everything asked for has run; the
    call then returns None.

    Over `model.generate` the steps of a site are joined along positions, and rows follow the sequences it returns, with
    beams too; where that cannot be told, reading the site is a `SiteUnavailableError` (modules hold one visit a step).
    Passes of a model with offloaded weights always run to their end, which is where the weights leave memory again.

    Raises, before any pass, `UnknownModuleError`, `UnknownSiteError`, `SiteUnavailableError`, `AdditivityError`,
    `LayerRangeError` or `OptionError`; and `MissedModuleError` when the block closes and something asked for never
    ran (also listed in ``cache.missed``).
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"capture needs a torch.nn.Module, not {type(model).__name__}")
    if not include_output and not include_inputs and (sites is None or modules is not None):
        raise OptionError("include_output and include_inputs are both off: there would be nothing to record")
    if layers is not None and sites is None:
        raise OptionError("layers chooses among sites: name some, such as sites='resid_post'")
    check_named(positions)
    model = original(model)
    named: dict[str, nn.Module] = {}
    points: dict[Site, ReadPoint] = {}
    anatomy: Anatomy | None = None
    if sites is not None:
        anatomy = describe(model)
        points = anatomy.points(sites, layers)
    elif stop_after_last or positions not in (None, "all"):
        anatomy = _anatomy_if_any(model)
    if modules is not None:
        named = resolve_modules(model, modules)
    elif sites is None:
        named = every_module(model)
        if stop_after_last:
            raise OptionError("stop_after_last needs to know what is last: name modules or sites")
    return Recording(
        model,
        named,
        points,
        anatomy=anatomy,
        required=[*(named if modules is not None else ()), *map(str, points)],
        include_output=include_output,
        include_inputs=include_inputs,
        keep={"device": read_device(device), "dtype": read_dtype(dtype), "detach": detach, "copy": copy},
        positions="all" if positions is None else positions,
        stop_after_last=stop_after_last,
    )


def run_with_cache(
    model: nn.Module,
    inputs: Inputs,
    modules: Modules | None = None,
    *,
    tokenizer: Any = None,
    sites: str | Site | Sequence[str | Site] | None = None,
    layers: Any = None,
    include_output: bool = True,
    include_inputs: bool = False,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    detach: bool = True,
    copy: bool = True,
    positions: Any = "all",
    stop_after_last: bool = False,
) -> tuple[Any, ActivationCache]:
    """Run one forward pass in evaluation mode and return ``(output, cache)``.

    `inputs`: a text, a list of texts, token ids (one list, a list of lists, or a tensor), or a dict of tensors. Texts
    and ids are padded on the right behind a mask made from their lengths: each prompt's values are those it has alone.
    `tokenizer` is found by the model's name when it is needed and not given. The other arguments are those of
    `capture`; with ``detach=False`` the pass keeps its graph. ``cache.input_ids``, ``attention_mask`` and ``tokens``
    say what each position is, ``cache.rows(key)`` leaves the padding out.
    """
    block = capture(
        model,
        modules,
        sites=sites,
        layers=layers,
        include_output=include_output,
        include_inputs=include_inputs,
        device=device,
        dtype=dtype,
        detach=detach,
        copy=copy,
        positions=positions,
        stop_after_last=stop_after_last,
    )
    prepared = prepare(original(model), inputs, tokenizer)
    block.track_tokens()
    with evaluating(model), torch.set_grad_enabled(not detach and torch.is_grad_enabled()), block as cache:
        output = model(**prepared.kwargs)
    if prepared.tokens is not None:
        cache.tokens = [
            [row[p] for p in at]
            for row, at in zip(prepared.tokens, _per_prompt(positions, prepared.tokens), strict=True)
        ]
    return output, cache


class Observation:
    """What `observe` yields: `reset()` starts a new pass when the last one did not reach every point."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen: set[Any] = set()

    def reset(self) -> None:
        self._seen.clear()

    def complete(self, key: Any) -> bool:
        """Count `key`; True (and a fresh start) once every point has been seen."""
        self._seen.add(key)
        if len(self._seen) < self._total:
            return False
        self._seen.clear()
        return True


@contextmanager
def observe(
    points: Mapping[K, ReadPoint], on_value: Callable[[K, Tensor], None], *, stop_after_last: bool = False
) -> Iterator[Observation]:
    """Inside the block, every run of a point's module calls ``on_value(key, tensor)`` inline.

    The tensor is the live one, on the model's device, after all hooks: not a copy and not detached. With
    `stop_after_last`, once every point has been seen in the current forward pass, that pass is ended by `StopForward`,
    which whoever called the model catches.
    """
    observation = Observation(len(points))

    def reader(key: K, point: ReadPoint) -> Callable[[Any], None]:
        extract = point.extract

        def read(value: Any) -> None:
            on_value(key, extract(value))
            if stop_after_last and observation.complete(key):
                raise StopForward

        return read

    outputs: list[tuple[nn.Module, Callable[[Any], None]]] = []
    inputs: list[tuple[nn.Module, OnInput]] = []
    for key, point in points.items():
        if point.around is not None:
            inputs.append((point.around[0], OnInput(point.around[1])))
        if point.side == "output":
            outputs.append((point.module, reader(key, point)))
        else:
            inputs.append((point.module, OnInput(reader(key, point))))
    taps = Taps()
    try:
        taps.add(outputs, inputs)
        yield observation
    finally:
        taps.remove()


def _per_prompt(positions: Any, tokens: list[list[str]]) -> list[list[int]]:
    named = positions.values() if isinstance(positions, dict) else [positions]
    choices = zip(*(each_prompt(choice, len(tokens)) for choice in named), strict=True)
    return [
        [p for choice in mine for p in resolve_positions(choice, len(row))]
        for mine, row in zip(choices, tokens, strict=True)
    ]


def _anatomy_if_any(model: nn.Module) -> Anatomy | None:
    try:
        return describe(model)
    except SiteUnavailableError:
        return None
