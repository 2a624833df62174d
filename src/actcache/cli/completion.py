"""What a shell is told when its user presses Tab: values that can be known without numpy, torch or a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from actcache import config

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_DEVICES = ("auto", "cpu", "cuda", "mps")
_ATTENTION = ("eager", "sdpa", "flash_attention_2")


def _spaces(ctx: click.Context) -> Iterator[tuple[str, str]]:
    """Id and model of every space of the store that the line names. What lies elsewhere is not asked."""
    place = ctx.params.get("store") or config.store_location().value
    if config.is_url(place):
        return
    # Read as text, and not through the store, which would import numpy: half a second on each Tab.
    for file in sorted(Path(place).expanduser().glob("v1/*/space.json")):
        try:
            name = json.loads(file.read_bytes())["label"]["model_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str):
            yield file.parent.name, name


def stored_models(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of models that are stored; files and folders where none begins so."""
    try:
        names = sorted({name for _, name in _spaces(ctx) if name.startswith(incomplete)})
    except Exception:
        # A shell has nowhere to show what is wrong; the verb itself will say it.
        names = []
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def stored_spaces(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of spaces, of the model that the line names where it names one."""
    model = ctx.params.get("model") or ctx.params.get("name")
    try:
        found = [(space, name) for space, name in _spaces(ctx) if space.startswith(incomplete)]
    except Exception:
        return []
    chosen = [(space, name) for space, name in found if model in (None, name)] or found
    return [CompletionItem(space, help=name) for space, name in chosen]


def folders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders of this machine."""
    return [CompletionItem(incomplete, type="dir")]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders of this machine."""
    return [CompletionItem(incomplete, type="file")]


def one_of(names: Callable[[], Sequence[str]]) -> Complete:
    """One of some names."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]

    return complete


def some_of(names: Callable[[], Sequence[str]]) -> Complete:
    """Some of the names, with commas between them: the last one is completed, by what is not there yet."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [
            CompletionItem(f"{before}{comma}{name}") for name in names() if name.startswith(last) and name not in given
        ]

    return complete


def poolings(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of poolings, and what a verb has beside them."""
    from actcache.model.sites import POOLINGS

    names = [*POOLINGS, *{"load": ["none"], "push": ["tokens"]}.get(ctx.info_name or "", [])]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def layers(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What layers may be called where they are not numbered: a dataset need not have those of the whole model."""
    names = ("all",) if ctx.info_name in ("load", "pull") else ("all", "last", "middle")
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _sites() -> Sequence[str]:
    from actcache.model.sites import SITE_NAMES

    return SITE_NAMES


def _dtypes() -> Sequence[str]:
    from actcache.model.options import DTYPES

    return DTYPES


BY_NAME: dict[str, Complete] = {
    "model": stored_models,
    "space": stored_spaces,
    "store": folders,
    "repo": files,
    "out": files,
    "html": files,
    "translators": folders,
    "pooling": poolings,
    "site": one_of(_sites),
    "sites": some_of(_sites),
    "tensors": some_of(lambda: ("hidden_layers", "logits_topk", "perplexity", "router_logits", *_sites())),
    "layers": layers,
    "dtype": one_of(_dtypes),
    "device": one_of(lambda: _DEVICES),
    "backend": one_of(lambda: ("local", "nnsight")),
    "attn_implementation": one_of(lambda: _ATTENTION),
}
"""By the name of the parameter, which means the same in every verb."""


def teach(command: click.Command) -> None:
    """Let the parameters of a verb complete their values, those that do not know them by their type."""
    for parameter in command.params:
        known: Any = BY_NAME.get(parameter.name or "")
        if known is not None and not isinstance(parameter.type, (click.Choice, click.Path)):
            parameter._custom_shell_complete = known
