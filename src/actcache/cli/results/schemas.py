"""JSON Schemas of what verbs print with `--json`, made of the types of it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from actcache.cli.app import VERBS
from actcache.cli.output import JSON_VERSION
from actcache.cli.results import datasets, models, store
from actcache.extract.plan import Plan
from actcache.extract.stats import WarmupStats
from actcache.selftest.report import SelftestReport
from actcache.share.change import Report
from actcache.store.eviction import EvictionReport
from actcache.store.reports import CacheInfo
from actcache.store.verification import VerifyReport

RESULTS: dict[str, Any] = {
    "demo": models.DemoResult | models.ModelPath,
    "warmup": Annotated[WarmupStats, models.WarmupResult],
    "plan": Annotated[Plan, models.OverLimit],
    "info": CacheInfo,
    "list": list[store.ListedVariant],
    "show": store.ShowResult,
    "lens": models.LensResult,
    "stats": list[store.StatsVariant],
    "import": store.ImportResult,
    "push": datasets.PushResult,
    "pull": datasets.PullResult,
    "load": datasets.LoadResult,
    "migrate": Annotated[Report, datasets.DryRun],
    "upgrade": Annotated[Report, datasets.DryRun],
    "dataset-info": datasets.DatasetInfo,
    "report": datasets.ReportResult,
    "sites": list[models.SiteRow],
    "selftest": SelftestReport,
    "verify": Annotated[VerifyReport, store.VerifySums],
    "evict": EvictionReport,
    "invalidate": store.Invalidated,
    "clear": store.Cleared,
    "config": store.ConfigResult,
    "version": models.Versions,
}
"""By verb. ``Annotated[A, B]`` has the fields of both, and where both have one, that of B."""

_LEAVES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    # JSON lacks infinity and NaN, which are printed as null.
    float: {"type": ["number", "null"]},
    str: {"type": "string"},
    Path: {"type": "string"},
    type(None): {"type": "null"},
    Any: {},
}


def schema(verb: str, *, strict: bool = False) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `verb` prints with `--json`; a `strict` one refuses fields that it does not
    name, which a later release may have added."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:actcache:json:{JSON_VERSION}:{verb}",
        "title": f"actcache {verb} --json",
        "description": VERBS[verb],
        **_of(RESULTS[verb], strict),
    }


def _of(kind: Any, strict: bool) -> dict[str, Any]:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _joined([_of(part, strict) for part in inside])
    if origin in (Union, types.UnionType):
        return _any_of([_of(part, strict) for part in inside])
    if origin is Literal:
        return {"enum": list(inside)}
    if origin in (dict, Mapping) or (inspect.isclass(origin) and issubclass(origin, Mapping)):
        return {"type": "object", "additionalProperties": _of(inside[1], strict)}
    if origin is not None and issubclass(origin, Sequence):
        return {"type": "array", "items": _of(inside[0], strict)}
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _object(kind, strict)
    return dict(_LEAVES[kind])


def _object(kind: Any, strict: bool) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else list(hints)
    optional: frozenset[str] = getattr(kind, "__optional_keys__", frozenset())
    said = _said(kind)
    properties = {
        name: _of(hints[name], strict) | ({"description": said[name]} if name in said else {}) for name in names
    }
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in names if name not in optional],
        **({"additionalProperties": False} if strict else {}),
    }


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One object with the fields of all."""
    properties = {name: value for part in parts for name, value in part["properties"].items()}
    required = dict.fromkeys(name for part in parts for name in part["required"])
    return {**parts[0], "properties": properties, "required": list(required)}


def _any_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if all(set(part) == {"type"} for part in parts):
        names = [name for part in parts for name in ([part["type"]] if isinstance(part["type"], str) else part["type"])]
        unique = list(dict.fromkeys(names))
        return {"type": unique if len(unique) > 1 else unique[0]}
    return {"anyOf": list(parts)}


def _said(kind: Any) -> dict[str, str]:
    """What the docstring of a class says of its attributes, and of those that it inherits."""
    found: dict[str, str] = {}
    bases = getattr(kind, "__orig_bases__", ()) or kind.__bases__
    for base in bases:
        if is_typeddict(base) or dataclasses.is_dataclass(base):
            found |= _said(base)
    _, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    for names, text in re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*): ((?:.*\n?)(?: {8}.*\n?)*)", listed, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
