"""Make docs/architectures.md: the selftest of a tiny model of every family, as a table.

    python scripts/make_architectures.py

Fails, and writes nothing, when a selftest finds anything wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import actcache as ac
from actcache.selftest.run import INSIDE, SITES, STREAM
from actcache.testing.tiny import FAMILIES, tiny_model

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
_WORDS = {"exact": "exact", "within tolerance": "within", "not applicable": "-", "refused": "refused", "wrong": "WRONG"}
_FORMS = {"sequential": "pre-norm"}
# What transformers' hidden states are, in few words and in a sentence.
_HIDDEN = {
    "before each block; the last after the final norm": "in, norm",
    "before each block; the last after the last block": "in, out",
    "before each block; the last is a projection": "in, other",
    "after each block; the last after the final norm": "out, norm",
    "not recorded": "none",
}
_TABLES = {
    "The residual stream": ("family", "block", *STREAM, "batching", "hidden_states"),
    "Inside attention and MLP": ("family", *INSIDE),
}
_HEAD = """\
# Architectures

What `actcache` reads, extracts and stores on each architecture, and whether it is what the model computes. Every row is
the selftest of a tiny model with random weights that `actcache.testing.tiny_model` builds from the family's
configuration, in float32 on a CPU. This page is made by `python scripts/make_architectures.py`, with transformers
{version}; a test holds it against a new run.

A cell sums up all blocks. Each value was compared, token by token, with the prompt run alone and read by plain torch
hooks: extracted alone, in unpadded and in padded batches of up to 8, captured with padding on either side, stored and
read again. It was also held against the identities of the residual stream, and against transformers' own hidden states
where they are the same value. What the heads add (`head_out`) was held against the output projection's own answer to
each head alone, and patterns against transformers' own attention probabilities (those of an eager pass) and against
what the heads hand on.

- **exact**: bit for bit in every comparison.
- **within**: every difference is at most 1e-5 of the row's largest value. Matrix products of another shape round
  otherwise, so which cells are exact depends on the machine.
- **-**: the architecture has no such value. Where some of its blocks have it, the cell is about those.
- **refused**: it could not be told from other values, so asking for it is an error; the note says why.

No cell is wrong: then this page could not be made. Other architectures work where the structure is found and the
identities hold. To see your own model on your own machine:

```sh
MODEL=$(actcache demo --model-path)     # yours: a folder or a Hugging Face id
actcache selftest "$MODEL"              # --dtype bfloat16, --device cuda, --attn-implementation eager, ...
```

`ac.selftest(model)` takes a loaded model too.
"""
_LEGEND = """\
- **block**: how the branches join the stream. *pre-norm*: attention, then MLP, each behind a norm of its own.
  *parallel*: both read the same stream. *post-norm*: a norm on the stream behind each. *mixer*: one branch.
- **batching**: which prompts share a batch. *any*: those of any length, padded. *equal*: those of one length.
  *alone*: none.
- **attn_in** to **head_out**: of self-attention. **mlp_act** is absent where there are experts, each of which has
  hidden activations of its own. **head_out** is what comes out of the output projection, before a dropout behind it:
  in training mode, where the model drops some of it, its sum is not what the attention module returns.
- **hidden_states**: what transformers gives for `output_hidden_states=True`. *in*: the input of every block under its
  number; *out*: the output of every block. The last entry is the output of the final *norm*, the last block's output
  (*out*), or *other*: no site. So the last block's output is often not among them; `resid_post` always is.
"""


@dataclass
class Row:
    """One line of the table; `notes` belong to columns."""

    name: str
    cells: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def rows_of(name: str, report: ac.SelftestReport) -> list[Row]:
    """The rows of one family: one, or one for each stack. Raises `SystemExit` when anything is wrong."""
    if not report.ok:
        raise SystemExit(f"{name}: {report.verdict}")
    rows = []
    for stack in report.blocks:
        row = Row(f"{name}, {stack}" if stack else name, {})
        row.cells["block"] = ", ".join(_FORMS.get(form, form) for form in report.forms[stack])
        for site in SITES:
            # Logits belong to both stacks, and come out of the decoder.
            prefix = f"{stack}." if stack and site != "logits" else ""
            found = [c for c in report.cells if re.fullmatch(rf"{re.escape(prefix + site)}(\.\d+)?", c.site)]
            if stack == "encoder" and site == "logits":
                found = []
            verdicts = [cell.verdict for cell in found]
            worst = max(verdicts, key=list(_WORDS).index, default="not applicable")
            row.cells[site] = _WORDS[worst]
            if worst == "refused":
                row.notes[site] = next(cell.why or "" for cell in found if cell.verdict == "refused")
        row.cells["batching"] = report.batching
        if report.batching != "any":
            row.notes["batching"] = report.batching_why
        row.cells["hidden_states"] = _HIDDEN.get(report.hidden_states[stack], report.hidden_states[stack])
        rows.append(row)
    return rows


def render(rows: Iterable[Row], transformers_version: str) -> str:
    """The whole document."""
    numbers: dict[str, int] = {}
    made = list(rows)
    parts = [_HEAD.format(version=transformers_version)]
    for title, headings in _TABLES.items():
        lines = []
        for row in made:
            shown = [f"`{row.name}`"]
            for column in headings[1:]:
                note = row.notes.get(column)
                number = "" if note is None else f" ({numbers.setdefault(note, len(numbers) + 1)})"
                shown.append(row.cells[column] + number)
            lines.append(shown)
        table = [list(headings), ["---"] * len(headings), *lines]
        parts += [f"## {title}", "", *(f"| {' | '.join(line)} |" for line in table), ""]
    notes = "\n".join(f"{number}. {note}" for note, number in numbers.items())
    return "\n".join([*parts, _LEGEND, "Notes:", "", notes, ""])


def parse(text: str) -> tuple[list[Row], str]:
    """The rows of a document that `render` made, and its version of transformers."""
    made_with = re.search(r"with transformers\s+([\w.+]+);", text)
    assert made_with is not None, "the document does not say what it was made with"
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    rows: dict[str, Row] = {}
    headings: tuple[str, ...] = ()
    for line in text.splitlines():
        if line.startswith("| family"):
            headings = tuple(part.strip() for part in line.strip("|").split("|"))
        if not line.startswith("| `"):
            continue
        name, *values = (part.strip() for part in line.strip("|").split("|"))
        row = rows.setdefault(name.strip("`"), Row(name.strip("`"), {}))
        for column, value in zip(headings[1:], values, strict=True):
            found = re.fullmatch(r"(.+?)(?: \((\d+)\))?", value)
            assert found is not None, value
            row.cells[column] = found[1]
            if found[2] is not None:
                row.notes[column] = notes[found[2]]
    return list(rows.values()), made_with[1]


def main() -> None:
    rows: list[Row] = []
    for name in FAMILIES:
        print(name, file=sys.stderr)
        rows += rows_of(name, ac.selftest(tiny_model(name)))
    DOCUMENT.write_text(render(rows, version("transformers")), encoding="utf-8")
    print(f"{DOCUMENT}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
