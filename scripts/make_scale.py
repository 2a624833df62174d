"""Compute the tables of docs/scale.md, and put them there.

    python scripts/make_scale.py

What is measured (`MEASURED`) says where; all else is arithmetic on the file format and on the shapes of the models.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from actcache.store.merging import TARGET

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- computed by scripts/make_scale.py -->", "<!-- end -->"

TOKENS, TEXT_BYTES, VALUE_BYTES = 64, 256, 2
# Names that one page of a bucket's listing holds, and reads that are under way at the same time.
PAGE, AT_ONCE = 1_000, 16
# Seconds that one request takes, said and not measured; bytes per second of a network and of a disk, likewise.
REQUEST_S, BYTES_PER_S = 0.03, 1e9
# Operations per second of a large card in bfloat16 as a forward pass reaches them, said and not measured.
OPERATIONS_PER_S = 400e12


@dataclass(frozen=True)
class Measured:
    """Figures of ``benchmarks/listing.py`` and ``benchmarks/lookups.py`` on the machine that docs/scale.md names.

    Seconds per segment: of a folder that this host sees first, or again; of a bucket's head that is brought here,
    beside the request itself. Of each prompt in the index: seconds that it takes to load, bytes of memory; and of each
    segment bytes of memory beside its prompts. Where few and many segments gave different figures it is those of many.
    """

    first_s: float = 0.713e-3
    again_s: float = 0.062e-3
    mirror_s: float = 1.25e-3
    prompt_s: float = 0.24e-6
    index_bytes: float = 83.0
    segment_bytes: float = 1_400.0


MEASURED = Measured()


@dataclass(frozen=True)
class Model:
    """The shape of a model; `weights` is their number."""

    name: str
    weights: float
    blocks: int
    width: int


MODELS = (Model("1B", 1.24e9, 16, 2048), Model("8B", 8.03e9, 32, 4096), Model("70B", 70.6e9, 80, 8192))
PROMPTS = (10_000, 10_000_000, 1_000_000_000)


@dataclass(frozen=True)
class Kept:
    """What is stored of each prompt: at so many sites one row, or one for each token."""

    name: str
    all_layers: bool
    every_token: bool

    def sites(self, model: Model) -> int:
        return model.blocks if self.all_layers else 1

    def rows(self) -> int:
        return TOKENS if self.every_token else 1


KEPT = (
    Kept("last token, one layer", False, False),
    Kept("last token, all layers", True, False),
    Kept("every token, one layer", False, True),
    Kept("every token, all layers", True, True),
)


def head_bytes(prompts: int, sites: int, width: int, data: int) -> int:
    """What precedes the rows of a segment: of each prompt its two keys, offsets, kind, token ids and text; of each site
    mean and spread of every column, and storage errors; a checksum for each block of data."""
    each = 2 * 16 + 3 * 8 + 1 + 4 * TOKENS + TEXT_BYTES
    each_site = 2 * 8 * width + 8 + 7 * 8 + 110
    return prompts * each + sites * each_site + 8 * math.ceil(data / (128 << 10))


@dataclass(frozen=True)
class Cost:
    """What it comes to. `data`: bytes of rows; `heads`: bytes in front of them, of all segments; `segments`: files of a
    folder, or objects, each put in one request; `pages`: requests that list them; `index`: bytes of memory; seconds:
    `run` of one card, `opened_s` of a host that sees the folder first, `again_s` later, `bucket_s` of one that sees the
    bucket first."""

    data: int
    heads: int
    segments: int
    pages: int
    index: float
    run_s: float
    opened_s: float
    again_s: float
    bucket_s: float


def cost(prompts: int, model: Model, kept: Kept) -> Cost:
    sites = kept.sites(model)
    data = prompts * kept.rows() * sites * model.width * VALUE_BYTES
    per_prompt = data / prompts + head_bytes(1, 0, 0, 0)
    segments = max(1, math.ceil(prompts * per_prompt / TARGET))
    in_one = math.ceil(prompts / segments)
    heads = segments * head_bytes(in_one, sites, model.width, data // segments)
    loaded = MEASURED.prompt_s * prompts
    bucket = loaded + max(REQUEST_S * segments / AT_ONCE, heads / BYTES_PER_S) + MEASURED.mirror_s * segments
    return Cost(
        data=data,
        heads=heads,
        segments=segments,
        pages=math.ceil(segments / PAGE),
        index=MEASURED.index_bytes * prompts + MEASURED.segment_bytes * segments,
        run_s=2 * model.weights * TOKENS * prompts / OPERATIONS_PER_S,
        opened_s=MEASURED.first_s * segments + heads / BYTES_PER_S + loaded,
        again_s=MEASURED.again_s * segments + loaded,
        bucket_s=bucket + REQUEST_S * math.ceil(segments / PAGE),
    )


def size(nbytes: float) -> str:
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    for factor, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def tables() -> str:
    """The tables, as Markdown."""
    lines: list[str] = []
    for prompts in PROMPTS:
        lines += [
            f"### {prompts:,} prompts",
            "",
            "| model | kept | rows | heads | segments | pages | index | run | first open | again | first, bucket |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for model in MODELS:
            for kept in KEPT:
                c = cost(prompts, model, kept)
                lines.append(
                    f"| {model.name} | {kept.name} | {size(c.data)} | {size(c.heads)} | {c.segments:,} | {c.pages:,} "
                    f"| {size(c.index)} | {duration(c.run_s)} | {duration(c.opened_s)} | {duration(c.again_s)} "
                    f"| {duration(c.bucket_s)} |"
                )
        lines.append("")
    return "\n".join(lines)


def inserted(document: str) -> str:
    """`document` with the tables between the two marks."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    if not pattern.search(document):
        raise SystemExit(f"{DOCUMENT} has no place for the tables: {BEGIN} ... {END}")
    return pattern.sub(lambda found: f"{found[1]}\n{tables()}\n{found[2]}", document)


def main() -> int:
    DOCUMENT.write_text(inserted(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
