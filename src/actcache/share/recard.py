"""The card of a dataset after a change: what it says of the layout is new, and what people wrote stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from actcache.share import card
from actcache.share.format import HIDDEN, LOGITS, VERSION

MAX_CARD = 1 << 20

_HEADING = re.compile(r"##\s+(.*?)\s*#*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_REPLACED = {
    "contents",
    "load with lmprobe",
    "load without lmprobe (standalone)",
    "load with actcache",
    "load with pyarrow and safetensors",
}
_PROVENANCE = "provenance"
_CONFIGS = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: index/train-*.parquet\n"


def updated(
    text: str | None,
    *,
    repo_id: str,
    model: str,
    described: Mapping[str, Any],
    columns: list[str],
    count: int,
    note: str,
) -> str:
    """The text of a card, made from the one that was there.

    Front matter stays, with the index as what the Hub shows where nothing is said of that; sections of the published
    cards that say where things are and how to load them are replaced; all else stays.

    Args:
        text: the card before; None where there was none.
        described: the tensors, as the metadata says.
        columns: those of the index.
        note: one line of provenance.
    """
    tensors = {name: _told(name, told) for name, told in described.items()}
    named = ", ".join(f"`{card.plain(name)}`" for name in columns)
    new = "\n\n".join(
        [
            "## Contents",
            card.contents(tensors),
            f"- **Prompts:** {count:,}\n- **Format version:** {VERSION}",
            f"`index/` has one row per prompt: {named}.",
            "## Load with actcache",
            card.with_actcache(repo_id, tensors),
            "## Load with pyarrow and safetensors",
            card.with_nothing_but(repo_id, tensors),
        ]
    )
    front, body = _front_matter(text or f"# Activations of {card.plain(model)}\n")
    kept: list[str] = []
    at: int | None = None
    noted = False
    for heading, section in _sections(body):
        if heading in _REPLACED:
            at = len(kept) if at is None else at
            continue
        if heading == _PROVENANCE and not noted:
            section, noted = f"{section.rstrip()}\n- {note}", True
        kept.append(section.strip("\n"))
    if at is None:
        at = next((i for i, section in enumerate(kept) if _heading(section) == _PROVENANCE), len(kept))
    kept.insert(at, new)
    if not noted:
        kept.append(f"## Provenance\n\n- {note}")
    return front + "\n\n".join(part for part in kept if part) + "\n"


def _told(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What cards say of tensors, also where older releases did not say it."""
    width = told.get("dim", told.get("num_experts", "?"))
    site = {HIDDEN: "resid_post", LOGITS: "logits"}.get(name, name)
    return {"site": site, "dim": width, "k": "?", "dtype": "?", "layers": [], "pooling": "last_token", **told}


def _front_matter(text: str) -> tuple[str, str]:
    text = text.replace("\r\n", "\n")
    end = re.search(r"\n---[ \t]*(\n|$)", text) if text.startswith("---\n") else None
    if end is None:
        return f"---\n{_CONFIGS}---\n\n", text
    lines = text[: end.start() + 1]
    if not re.search(r"^configs\s*:", lines, re.MULTILINE):
        lines += _CONFIGS
    return f"{lines}---\n\n", text[end.end() :]


def _sections(body: str) -> list[tuple[str, str]]:
    """Heading, in small letters, and text of each section; what looks like a heading inside code is none."""
    found: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in body.split("\n"):
        mark = _FENCE.match(line)
        if mark is not None and not fence:
            fence = mark[1]
        elif mark is not None and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
        elif not fence and _heading(line) is not None:
            found.append((_heading(line) or "", []))
        found[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in found]


def _heading(text: str) -> str | None:
    match = _HEADING.fullmatch(text.partition("\n")[0])
    return None if match is None else match[1].lower()
