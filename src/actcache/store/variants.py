"""Variants of a model in a store: what tells one space from another of the same name, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actcache.store.spaces import SpaceInfo

# Told in words of their own, or the same for everything that a version writes.
_TOLD = {
    "identity",
    "dtype",
    "attn_implementation",
    "edits",
    "quantization",
    "model_name",
    "revision",
    "source",
    "generate",
    "pulled",
}
_SHORT = 12


def variant_names(spaces: Sequence[SpaceInfo]) -> dict[str, str]:
    """A name for each of `spaces`, by space id: what is always said of a variant, and whatever tells it from the others
    of its model ("float32", "bfloat16, eager attention", "float32, edited: ablate resid_post.0").
    """
    names: dict[str, str] = {}
    for model in {s.model_name for s in spaces}:
        alike = [s for s in spaces if s.model_name == model]
        facets = {s.space: _facets(s) for s in alike}
        differing = {key for one in facets.values() for key in one if len({f.get(key) for f in facets.values()}) > 1}
        differing |= {"dtype", "edits", "generate", "imported", "pulled"}
        told = {
            space: ", ".join(text for key, text in own.items() if key in differing and text)
            for space, own in facets.items()
        }
        for space, name in told.items():
            # Edits with other vectors, an identity with something this version knows nothing of.
            same = sum(other == name for other in told.values()) > 1
            names[space] = ", ".join(filter(None, [name, f"space {space[:8]}" if same or not name else ""]))
    return names


def _facets(space: SpaceInfo) -> dict[str, str]:
    """What could be said of a variant, in the order in which it is said."""
    identity = space.identity
    found = {
        "dtype": space.dtype or "",
        "revision": f"revision {space.revision[:_SHORT]}" if space.revision else "no revision",
        "attention": f"{space.attn_implementation} attention" if space.attn_implementation else "",
        "quantization": _said("quantised", identity.get("quantization"), "not quantised"),
    }
    for key in sorted(identity.keys() - _TOLD):
        found[key] = _said(key.replace("_", " "), identity[key], f"no {key.replace('_', ' ')}")
    found["generate"] = generation_text(identity["generate"]) if identity.get("generate") else ""
    found["edits"] = f"edited: {'; '.join(map(edit_text, space.edits))}" if space.edits else ""
    found["imported"] = f"imported from {space.imported}" if space.imported else ""
    if space.pulled:
        dataset, _, commit = space.pulled.rpartition("@")
        found["pulled"] = f"pulled from {dataset}@{commit[:_SHORT]}"
    return found


def _said(what: str, value: Any, otherwise: str) -> str:
    if value in (None, "", [], {}):
        return otherwise
    if isinstance(value, Mapping) and "quant_method" in value:
        value = value["quant_method"]
    # Of a digest with a prefix that says of what, the first digits tell enough.
    text = str(value).rpartition(":")[2] if isinstance(value, str) else str(value)
    return f"{what} {text[:_SHORT]}"


def generation_text(settings: Mapping[str, Any]) -> str:
    """The settings of a generation in words: "with 20 tokens generated, do_sample True, seed 3"."""
    told = [f"{key} {value}" for key, value in settings.items() if key not in ("max_new_tokens", "eos_token_id")]
    return ", ".join([f"with {settings.get('max_new_tokens')} tokens generated", *told])


def edit_text(edit: Mapping[str, Any]) -> str:
    """A ready-made edit in words: "steer resid_post.5 at last x 2.0"."""
    words = [str(edit.get("kind", "edit")), str(edit.get("site") or edit.get("module") or "")]
    if edit.get("heads"):
        words.append(f"heads {edit['heads']}")
    if edit.get("positions", "all") not in ("all", None):
        words.append(f"at {edit['positions']}")
    if edit.get("scale", 1.0) != 1.0:
        words.append(f"x {edit['scale']}")
    return " ".join(filter(None, words))


def by_preference(spaces: Sequence[SpaceInfo]) -> list[SpaceInfo]:
    """Variants in the order in which one is taken for all: run as the model is, then pulled, then imported, then edited
    or with prompts it continued; of these the newest first."""
    newest = sorted(spaces, key=lambda s: (s.created_ns, s.space), reverse=True)
    return sorted(newest, key=lambda s: (bool(s.edits or s.identity.get("generate")), bool(s.imported), bool(s.pulled)))
