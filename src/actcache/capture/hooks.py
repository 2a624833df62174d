"""Read values of a running model: `capture` and `run_with_cache` into a cache, `observe` inline and without copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from actcache.capture.attempts import StopForward
from actcache.capture.cache import ActivationCache
from actcache.capture.inputs import Inputs, Prepared, Prompts, prepare
from actcache.capture.media import on_model
from actcache.capture.names import check_names
from actcache.capture.nodes import Node
from actcache.capture.positions import check_named, each_prompt, resolve_positions
from actcache.capture.readers import OnInput, OnReturn
from actcache.capture.recording import Recording
from actcache.capture.requests import Modules, every_module, resolve_modules, resolve_sites
from actcache.capture.spans import needs_prompts, told_by_prompts
from actcache.capture.values import read_device, read_dtype
from actcache.errors import GradientError, OptionError, SiteUnavailableError
from actcache.model.anatomy import Anatomy, ReadPoint, describe, original
from actcache.model.modes import evaluating
from actcache.model.sites import Site
from actcache.model.structure import require_module
from actcache.model.taps import Taps

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
    include_grads: bool = False,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    detach: bool = True,
    copy: bool = True,
    positions: Any = "all",
    stop_after_last: bool = False,
    names: Mapping[str, str] | None = None,
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
    (a list of lists is one list per prompt, `ac.tokens_of` finds those of images and of text). `stop_after_last` ends
    each pass once everything asked for has run; the call then returns None. ``detach=False`` is for losses that are
    made of what is captured; to differentiate by it, leave out the copy too, which is no part of what follows, or see
    `include_grads`.

    The block is for passes of the thread that opens it (and of autograd's threads that work for its ``backward()``):
    what other threads run meanwhile is left alone, and they may have blocks of their own on the same model. It may be
    closed in any thread.

    `include_grads` adds gradients: after ``loss.backward()``, in the block or behind it, ``entry.grad`` is that of each
    captured output as the model went on with it, after edits, and ``cache.grad("resid_post.5")`` that of a site (what
    an `edit` of it by a small step would do to the loss), in the form, dtype and place of the value; several backward
    passes add up. Where weights are frozen the graph begins at what is captured. Detached values leave the graph as it
    is, and nothing here keeps it alive. Runs that a backward pass repeats (gradient checkpointing) are no visits; where
    what is captured joins the graph (``detach=False``, and the gradient of a `pattern`), call ``backward()`` in the
    block then.

    `names` are your own for modules, in lookups of what was captured: from a module's path, or the last parts of it, to
    one name, ``{"h.0": "first_layer", "mlp": "my_mlp"}``, which may stand in place of those parts or of the last,
    wherever they are: ``cache["transformer.first_layer"]``, ``cache.transformer.h["first_layer"].my_mlp``. Keys, and
    `modules`, are paths as they are. Copies and files keep names; of caches that are joined, the receiver's hold.

    Over `model.generate` the steps of a site are joined along positions, and rows follow the sequences it returns, with
    beams too; where that cannot be told, reading the site is a `SiteUnavailableError` (modules hold one visit a step).
    By hand, a pass goes on from the one that left the KV cache it is given; with a copy of a cache, or one from outside
    the block, its tokens are rows of their own. A cache that is cut back takes its values back too.
    A pass that an exception ended counts for nothing at sites once another ran, so that it may be tried again in the
    same block; where passes do not all reach a site, its rows are those of the passes that did.
    Passes of a model with offloaded weights always run to their end, which is where the weights leave memory again.

    Raises, before any pass, `UnknownModuleError`, `UnknownSiteError`, `SiteUnavailableError`, `AdditivityError`,
    `LayerRangeError` or `OptionError`; and `MissedModuleError` when the block closes and something asked for never
    ran (also listed in ``cache.missed``). With `include_grads`, `GradientError` where the model runs without a graph,
    or nothing that was captured can have a gradient.
    """
    require_module(model, "capture")
    if not include_output and not include_inputs and (sites is None or modules is not None):
        raise OptionError("include_output and include_inputs are both off: there would be nothing to record")
    if layers is not None and sites is None:
        raise OptionError("layers chooses among sites: name some, such as sites='resid_post'")
    if include_grads and not include_output and modules is not None:
        raise OptionError("include_grads is about outputs, and include_output is off")
    if include_grads and stop_after_last and detach:
        raise OptionError(
            "with stop_after_last the pass ends before there is a loss, and detached values make none: leave one of "
            "them out, or pass detach=False and make the loss of captured values"
        )
    model = original(model)
    everywhere = positions is None or (isinstance(positions, str) and positions == "all")
    if not everywhere:
        check_named(positions, ids=True)
        positions = on_model(positions, model)
    called = None
    if names is not None:
        empty = ActivationCache()
        called = check_names(model, names, {*dir(empty), *dir(Node(empty, "", None))})
    named: dict[str, nn.Module] = {}
    points: dict[Site, ReadPoint] = {}
    anatomy: Anatomy | None = None
    if sites is not None:
        anatomy = describe(model)
        points = resolve_sites(model, anatomy, sites, layers)
    elif stop_after_last or not everywhere:
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
        include_grads=include_grads,
        keep={"device": read_device(device), "dtype": read_dtype(dtype), "detach": detach, "copy": copy},
        positions="all" if everywhere else positions,
        stop_after_last=stop_after_last,
        names=called,
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
    include_grads: bool = False,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype | None = None,
    detach: bool = True,
    copy: bool = True,
    positions: Any = "all",
    stop_after_last: bool = False,
    names: Mapping[str, str] | None = None,
) -> tuple[Any, ActivationCache]:
    """Run one forward pass in evaluation mode and return ``(output, cache)``.

    `inputs`: a text, a list of texts, a chat (a list of messages) or a list of chats, token ids (one list, a list of
    lists, or a tensor), or a dict of tensors. Prompts are padded on the right behind a mask made from their lengths:
    each one's values are those it has alone. `tokenizer` is found by the model's name when it is needed and not given.
    A dict goes to the model as it is (images too: what a processor returns), with position ids where padding stands in
    front of tokens and the model would count it, or a `PromptError` where the model takes none. The other arguments are
    those of `capture`, and `positions` of chats may be `ac.tokens_of` a role; with ``detach=False`` or `include_grads`
    the pass keeps its graph. ``cache.input_ids``, ``attention_mask`` and ``tokens`` say what each position is,
    ``cache.rows(key)`` leaves the padding out.

    Raises what `capture` does; `PromptError` and `PromptTypeError` for inputs, `TokenizerError` where a tokenizer is
    needed and none is found, `GradientError` for `include_grads` where gradients are turned off.
    """
    if include_grads and not torch.is_grad_enabled():
        raise GradientError("include_grads needs gradients enabled, and torch.no_grad or inference mode turns them off")
    require_module(model, "run_with_cache")
    check_named(positions, chats=True, ids=True)
    positions = on_model(positions, original(model))
    prepared: Prepared | None = None
    if needs_prompts(positions):
        prepared = prepare(original(model), inputs, tokenizer)
        positions = told_by_prompts(positions, prepared.prompts)
    block = capture(
        model,
        modules,
        sites=sites,
        layers=layers,
        include_output=include_output,
        include_inputs=include_inputs,
        include_grads=include_grads,
        device=device,
        dtype=dtype,
        detach=detach,
        copy=copy,
        positions=positions,
        stop_after_last=stop_after_last,
        names=names,
    )
    if prepared is None:
        prepared = prepare(original(model), inputs, tokenizer)
    block.track_tokens()
    graph = (include_grads or not detach) and torch.is_grad_enabled()
    with evaluating(model), torch.set_grad_enabled(graph), block as cache:
        output = model(**prepared.kwargs)
    cache.tokens = kept_tokens(positions, prepared.prompts)
    return output, cache


def kept_tokens(positions: Any, prompts: Prompts | None) -> list[list[str]] | None:
    """The strings of the tokens at `positions`; None where they are not known."""
    if prompts is None or prompts.tokens is None:
        return None
    at = _per_prompt(positions, prompts.tokens)
    return [[row[p] for p in here] for row, here in zip(prompts.tokens, at, strict=True)]


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
    which whoever called the model catches. As with `capture`, only passes of this thread are seen.
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
    listeners: list[tuple[nn.Module, Any]] = []
    guards: list[tuple[nn.Module, Any]] = []
    for key, point in points.items():
        listeners += [(module, OnInput(note)) for module, note in point.around]
        if point.guards:
            guards += point.guards
            listeners.append((point.module, OnReturn(reader(key, point))))
        elif point.side == "output":
            outputs.append((point.module, reader(key, point)))
        else:
            listeners.append((point.module, OnInput(reader(key, point), early=point.early)))
    taps = Taps()
    try:
        taps.add(outputs, listeners, guards)
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
