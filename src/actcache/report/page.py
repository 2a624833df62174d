"""The page itself: one HTML file that asks nobody for anything and runs nothing but a lens, where it has one."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files

from actcache.capture.lens_html import script, shortened, visible
from actcache.report import charts
from actcache.report.contents import Contents, Layered, ReadEntry, Variant
from actcache.store.summaries import SiteSummary
from actcache.wording import age, count, size

_LONGEST = 200


def page(contents: Contents, *, now: float | None = None) -> str:
    """The whole document. Whatever prompts and names are made of, they are text in it."""
    now = time.time() if now is None else now
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    # A frame has the policy of the page around it, too: without that script there is no lens.
    allowed = f"; script-src 'sha256-{digest}'" if contents.lenses else ""
    title = _text(contents.title)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'{allowed}\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{files('actcache.report').joinpath('page.css').read_text(encoding='utf-8')}</style>",
        "</head>",
        "<body>",
        '<a class="skip" href="#main">Skip to the content</a>',
        f"<header><h1><bdi>{title}</bdi></h1><p><bdi>{_text(contents.place)}</bdi>, {when}</p></header>",
        _contents_list(contents),
        '<main id="main">',
        _facts(contents.facts),
        *(f'<p class="note">{_text(note)}</p>' for note in contents.notes),
        *(_variant(k, variant, now) for k, variant in enumerate(contents.variants)),
        *(_lens(k, *lens) for k, lens in enumerate(contents.lenses)),
        "</main>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(part for part in parts if part)


def _contents_list(contents: Contents) -> str:
    links = [
        (f"v{k}", f"{v.model_name} ({v.name})" if v.name else v.model_name) for k, v in enumerate(contents.variants)
    ]
    links += [(f"l{k}", f"Logit lens: {title}") for k, (title, _) in enumerate(contents.lenses)]
    if len(links) < 2:
        return ""
    items = "".join(f'<li><a href="#{place}"><bdi>{_text(title)}</bdi></a></li>' for place, title in links)
    return f'<nav aria-label="contents"><ul>{items}</ul></nav>'


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{_text(k)}</dt><dd><bdi>{_text(v)}</bdi></dd></div>" for k, v in facts.items())
    return f"<dl>{items}</dl>" if items else ""


def _variant(number: int, variant: Variant, now: float) -> str:
    name = f" <small>{_text(variant.name)}</small>" if variant.name else ""
    figures = []
    if variant.sizes:
        unit, by = _unit(max(max(line.values) for line in variant.sizes))
        scaled = [Layered(line.name, line.layers, [v / by for v in line.values]) for line in variant.sizes]
        figures.append(charts.by_layer("Size by layer", unit, scaled, _number))
    if variant.norms:
        figures.append(charts.by_layer("Mean norm by layer", "L2 norm of a row", variant.norms, _number))
    if variant.lengths:
        figures.append(charts.histogram("Tokens of a prompt", variant.lengths))
    parts = [
        f'<section id="v{number}" aria-labelledby="h{number}">',
        f'<h2 id="h{number}"><bdi>{_text(variant.model_name)}</bdi>{name}</h2>',
        _facts(variant.facts),
        f'<div class="figures">{"".join(figures)}</div>' if figures else "",
        "<h3>Sites</h3>" + _sites(variant.summaries) if variant.summaries else "",
        _reads("Read last", variant.hottest, now),
        _reads("Not read for longest: what goes first when room is needed", variant.coldest, now),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _sites(summaries: Sequence[SiteSummary]) -> str:
    rows = []
    for s in summaries:
        numbers = [f"{s.rows:,}", str(s.width), _number(s.mean_norm), _number(s.std), size(s.size_bytes)]
        first = [s.site, "every token" if s.layout == "tokens" else s.layout, *numbers]
        if not s.stored:
            rows.append([*first, "integers" if s.mean_norm is None else "", "", "", ""])
        for stored in s.stored:
            missing = 1 - stored.cosine
            errors = [f"{stored.error_max:.3g}", f"{stored.error_relative:.2g}"]
            errors.append("1" if missing <= 0 else f"1 - {missing:.1g}")
            # Of a dataset it is not known what storing has changed.
            rows.append([*first, stored.dtype, *(errors if math.isfinite(missing) else ("", "", ""))])
    heads = ["site", "layout", "rows", "width", "mean norm", "std", "size", "stored as"]
    heads += ["largest error", "relative error", "cosine"]
    return charts.table(heads, rows, words=2)


def _reads(title: str, entries: Sequence[ReadEntry], now: float) -> str:
    if not entries:
        return ""
    rows = [
        [
            shortened(e.prompt, _LONGEST),
            "" if e.num_tokens is None else f"{e.num_tokens:,}",
            age(now - e.at),
        ]
        for e in entries
    ]
    return f"<h3>{_text(title)}</h3>{charts.table(['prompt', 'tokens', 'last read or written'], rows)}"


def _lens(number: int, title: str, inside: str) -> str:
    return (
        f'<section id="l{number}" aria-labelledby="t{number}"><h2 id="t{number}">Logit lens: <bdi>{_text(title)}</bdi>'
        f'</h2><iframe title="logit lens of {_text(title)}" sandbox="allow-scripts" srcdoc="{html.escape(inside)}">'
        "</iframe></section>"
    )


def _unit(most: float) -> tuple[str, int]:
    by = max((b for b in (1, 2**10, 2**20, 2**30) if most >= b), default=1)
    return {1: "bytes", 2**10: "KB", 2**20: "MB", 2**30: "GB"}[by], by


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _text(value: str) -> str:
    return html.escape(visible(value))


def summary_of(contents: Contents) -> str:
    """What the page holds, in a line."""
    lens = f" and the lens of {count(len(contents.lenses), 'model')}" if contents.lenses else ""
    return f"{count(len(contents.variants), 'variant')}{lens}"
