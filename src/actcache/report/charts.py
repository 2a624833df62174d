"""Pictures of a page, as SVG that needs nothing else: lines and bars by layer, a histogram, each with its numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from actcache.report.contents import Histogram, Layered

# Drawn at about the size at which it is shown, so that its text is as large as other text.
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 34
_LINES = 8
"""Colours and marks there are; more lines than these in one picture are not told apart."""

Say = Callable[[float], str]


def by_layer(title: str, unit: str, lines: Sequence[Layered], say: Say) -> str:
    """Values by layer, a line for each site; pictures of up to eight lines."""
    parts = [lines[i : i + _LINES] for i in range(0, len(lines), _LINES)]
    return "\n".join(
        _by_layer(title if len(parts) == 1 else f"{title} ({k + 1} of {len(parts)})", unit, part, say)
        for k, part in enumerate(parts)
    )


def _by_layer(title: str, unit: str, lines: Sequence[Layered], say: Say) -> str:
    first, last = min(min(line.layers) for line in lines), max(max(line.layers) for line in lines)
    low, high, ticks = _ticks(max(max(line.values) for line in lines))
    x, y = _scale(first - 0.5, last + 0.5, _LEFT, _WIDTH - _RIGHT), _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    drawn = [_axes(x, y, _layer_ticks(first, last), ticks, say, "layer", unit)]
    for k, line in enumerate(lines):
        points = [(x(layer), y(value)) for layer, value in zip(line.layers, line.values, strict=True)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks = "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{_text(line.name)}, layer {layer}: {say(value)}</title>'
            "</circle>"
            for (a, b), layer, value in zip(points, line.layers, line.values, strict=True)
        )
        drawn.append(f'<g class="c{k}"><polyline points="{path}"/>{marks}</g>')
    legend = "".join(f'<li class="c{k}"><i></i>{_text(line.name)}</li>' for k, line in enumerate(lines))
    layers = sorted({layer for line in lines for layer in line.layers})
    known = [dict(zip(line.layers, line.values, strict=True)) for line in lines]
    rows = [[str(layer), *(say(values[layer]) if layer in values else "" for values in known)] for layer in layers]
    said = f"{title}, layers {first} to {last}: " + "; ".join(
        f"{line.name} from {say(min(line.values))} to {say(max(line.values))}" for line in lines
    )
    return _figure(title, said, drawn, table(["layer", *(line.name for line in lines)], rows), legend)


def histogram(title: str, counted: Histogram) -> str:
    """How many prompts have how many tokens."""
    edges = counted.edges
    low, high, ticks = _ticks(max(counted.counts), whole=True)
    x, y = _scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT), _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    rows, bars = [], []
    for start, stop, number in zip(edges, edges[1:], counted.counts, strict=False):
        span = f"{start:,}" if stop == start + 1 else f"{start:,} to {stop - 1:,}"
        rows.append([span, f"{number:,}"])
        if number:
            bars.append(
                f'<rect x="{x(start) + 0.5:.1f}" y="{y(number):.1f}" width="{max(1.0, x(stop) - x(start) - 1):.1f}" '
                f'height="{y(0) - y(number):.1f}"><title>{span} tokens: {number:,} prompts</title></rect>'
            )
    step = max(1, math.ceil(len(edges) / 6))
    marks = [(edge, f"{edge:,}") for edge in edges[::step]]
    drawn = [
        _axes(x, y, marks, ticks, lambda v: f"{v:,.0f}", "tokens", "prompts"),
        f'<g class="c0 bars">{"".join(bars)}</g>',
    ]
    said = (
        f"{sum(counted.counts):,} prompts, {counted.total:,} tokens; the median prompt has {counted.median:g}, "
        f"the longest {counted.longest:,}"
    )
    return _figure(title, f"{title}: {said}", drawn, table(["tokens", "prompts"], rows), caption=said)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table that scrolls in its own frame; its first `words` columns are text, the others numbers."""
    top = "".join(f'<th scope="col"{"" if k < words else NUMBER}>{_text(head)}</th>' for k, head in enumerate(heads))
    body = "\n".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{'' if k < words else NUMBER}>{_text(cell)}</td>" for k, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in rows
    )
    name = _text(f"table of {', '.join(heads[:4])}")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


NUMBER = ' class="n"'


def _figure(title: str, said: str, drawn: Sequence[str], numbers: str, legend: str = "", caption: str = "") -> str:
    return (
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(said)}">{"".join(drawn)}</svg>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + (f"<p>{_text(caption)}</p>" if caption else "")
        + f"<details><summary>numbers</summary>{numbers}</details></figure>"
    )


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    across: Sequence[tuple[float, str]],
    ticks: Sequence[float],
    say: Say,
    below: str,
    beside: str,
) -> str:
    drawn = []
    for value in ticks:
        drawn.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        drawn.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_text(say(value))}</text>')
    for place, text in across:
        drawn.append(f'<text x="{x(place):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_text(text)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    drawn.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{_text(below)}</text>')
    drawn.append(
        f'<text x="11" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 11 {middle:.0f})">'
        f"{_text(beside)}</text>"
    )
    return f'<g class="axes" aria-hidden="true">{"".join(drawn)}</g>'


def _layer_ticks(first: int, last: int) -> list[tuple[float, str]]:
    step = max(1, math.ceil((last - first + 1) / 12))
    return [(layer, str(layer)) for layer in range(first, last + 1, step)]


def _ticks(most: float, *, whole: bool = False) -> tuple[float, float, list[float]]:
    """From 0 to at least `most` in steps of 1, 2 or 5 times a power of ten."""
    if not most > 0:
        return 0.0, 1.0, [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if most / (step * factor) <= 5)
    step = max(step, 1.0) if whole else step
    count = math.ceil(most / step - 1e-9)
    return 0.0, step * count, [step * k for k in range(count + 1)]


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _text(value: str) -> str:
    return html.escape(value)
