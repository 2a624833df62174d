"""A lens as one HTML file that asks nobody for anything: a map of tokens and layers, with details of each cell."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import unicodedata
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.capture.lens import LogitLens

# Cells of a notebook's output; a file has them all.
_NOTEBOOK_CELLS = 20_000
# Above this share of the colour the text in a cell changes sides, where both have the contrast 4.5.
_STRONG = 0.66


def script() -> str:
    """The only script that is in a page."""
    return _file("lens.js")


def page(lens: LogitLens, prompts: Sequence[int] | None = None, *, title: str | None = None, note: str = "") -> str:
    """The whole document, of some `prompts` or (None) of all. Whatever tokens are made of, they are text in it."""
    numbers = range(len(lens.mask)) if prompts is None else prompts
    numbers = [i for i in numbers if lens.layers and bool(lens.mask[i].any())]
    heading = html.escape(visible(title) if title else f"Logit lens of {lens.site}")
    code = script() if numbers else ""
    # Nothing but this script runs, and nothing is fetched.
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    about = (
        f"Each row is a {'kept position, of those that were chosen' if lens.kept else 'position of the prompt'}"
        ", each column a layer. A cell has the token that the model would predict "
        "to follow if that layer were its last. Arrow keys move between cells."
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title>",
        f"<style>{_file('lens.css')}</style>",
        "</head>",
        "<body>",
        f"<h1><bdi>{heading}</bdi></h1>",
        f"<p>{html.escape(note)} {about}</p>" if numbers else "<p>Nothing was read: no layers, or no positions.</p>",
    ]
    if numbers:
        parts += [
            '<div class="bar">',
            _prompt_chooser(lens, numbers),
            _metric_chooser(lens),
            '<div class="legend"><span>0</span><i></i><span>1</span></div>',
            "</div>",
            '<div class="all"><main>',
            *(_section(lens, i) for i in numbers),
            "</main>",
            '<aside class="details" id="details" role="status" aria-live="polite" aria-label="details" hidden></aside>',
            "</div>",
            f'<script type="application/json" id="data">{_json(_data(lens, numbers))}</script>',
            f"<script>{code}</script>",
        ]
    return "\n".join([*(part for part in parts if part), "</body>", "</html>", ""])


def notebook(lens: LogitLens) -> str:
    """The same inside a frame of its own, which its styles and keys do not leave; the first prompts where there are
    many."""
    count, cells = 0, 0
    for real in lens.mask.sum(-1).tolist():
        cells += real * len(lens.layers)
        if count and cells > _NOTEBOOK_CELLS:
            break
        count += 1
    left = len(lens.mask) - count
    note = f"The first {count} of {len(lens.mask)} prompts; to_html(path) writes all." if left else ""
    rows = int(lens.mask[:count].sum(-1).max()) if count else 0
    height = min(680, 230 + 42 * rows)
    inside = html.escape(page(lens, range(count), note=note))
    return (
        f'<iframe title="logit lens" sandbox="allow-scripts" style="width:100%;height:{max(height, 420)}px;border:0" '
        f'srcdoc="{inside}"></iframe>'
    )


def shortened(text: str, most: int) -> str:
    """`text` made `visible`, of at most `most` characters."""
    shown = visible(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible: spaces at its ends as ``·``, line ends as ``↵``, and what
    has no form or changes the direction of others as an escape."""
    start, stop = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    shown = []
    for i, char in enumerate(text):
        if char == " ":
            shown.append("·" if i < start or i >= stop else char)
        elif char == "\n":
            shown.append("↵")
        elif unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp"):
            shown.append(ascii(char)[1:-1])
        else:
            shown.append(char)
    return "".join(shown)


def _prompt_chooser(lens: LogitLens, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return ""
    options = []
    for place, i in enumerate(numbers):
        ids = lens.input_ids[i][lens.mask[i]].tolist()
        text = visible(lens.text([id_ for id_ in ids[:40] if id_ >= 0]).strip(" "))
        text = text if len(text) <= 60 else text[:59] + "…"
        options.append(f'<option value="{place}">{i}: {html.escape(text)}</option>')
    return f'<label>Prompt <select id="prompt" autocomplete="off">{"".join(options)}</select></label>'


def _metric_chooser(lens: LogitLens) -> str:
    options = [("probability", "probability of the best token"), ("entropy", "entropy")]
    if lens.has_kl:
        options.append(("kl", "KL from the final prediction"))
    for place, token in enumerate(lens.chosen):
        said = visible(lens.text(token))
        options += [(f"rank {place}", f"rank of {said}"), (f"chance {place}", f"probability of {said}")]
    made = "".join(f'<option value="{value}">{html.escape(said)}</option>' for value, said in options)
    return f'<label>Colour <select id="metric" autocomplete="off">{made}</select></label>'


def _section(lens: LogitLens, prompt: int) -> str:
    """The table of one prompt: what the script starts from, and what is there without it."""
    heads = "".join(f'<th scope="col">{layer}</th>' for layer in lens.layers)
    real = lens.mask[prompt].nonzero()[:, 0].tolist()
    rows = []
    for at in real:
        cells = []
        for place, layer in enumerate(lens.layers):
            text = html.escape(visible(lens.text(int(lens.tokens[place, prompt, at, 0]))))
            chance = float(lens.probabilities[place, prompt, at, 0])
            start = at == real[-1] and place == len(lens.layers) - 1
            strong = ' class="s"' if chance > _STRONG else ""
            cells.append(
                f'<td{strong} tabindex="{0 if start else -1}" style="--v:{_share(chance)}" '
                f'aria-label="layer {layer}: {text}, probability {chance:.3f}"><bdi>{text}</bdi>'
                f"<small>{chance:.3f}</small></td>"
            )
        token = int(lens.input_ids[prompt, at])
        said = "" if token < 0 else html.escape(visible(lens.text(token)))
        number = int(lens.positions[prompt, at])
        rows.append(f'<tr><th scope="row"><small>{number}</small><bdi>{said}</bdi></th>{"".join(cells)}</tr>')
    return (
        f'<section aria-label="prompt {prompt}"><div class="scroll"><table role="grid" '
        f'aria-label="best token by position and layer, prompt {prompt}"><thead><tr><th scope="col">token \\ layer</th>'
        f"{heads}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table></div></section>"
    )


def _share(value: float) -> str:
    return f"{min(1.0, max(0.0, value)):.3f}" if math.isfinite(value) else "0"


def _data(lens: LogitLens, numbers: list[int]) -> dict[str, Any]:
    """What the script shows: by prompt ``[positions][layers]``."""
    prompts, used = [], set(lens.chosen)
    for i in numbers:
        real = lens.mask[i]
        best = lens.tokens[:, i, real].transpose(0, 1)
        tokens = lens.input_ids[i][real].tolist()
        used.update(best.flatten().tolist(), (token for token in tokens if token >= 0))
        prompts.append(
            {
                "positions": lens.positions[i][real].tolist(),
                "tokens": tokens,
                "best": best.tolist(),
                "probabilities": _rounded(lens.probabilities[:, i, real].transpose(0, 1).tolist()),
                "entropy": _rounded(lens.entropy[:, i, real].T.tolist()),
                "kl": _rounded(lens.kl[:, i, real].T.tolist()) if lens.has_kl else None,
                "ranks": lens.chosen_ranks[:, i, real].transpose(0, 1).tolist(),
                "chances": _rounded(lens.chosen_probabilities[:, i, real].transpose(0, 1).tolist()),
            }
        )
    return {
        "layers": lens.layers,
        "counted": lens.counted,
        "vocabulary": lens.vocab_size,
        "chosen": lens.chosen,
        "texts": {str(token): visible(lens.text(token)) for token in sorted(used)},
        "most": {
            "entropy": max((_largest(prompt["entropy"]) for prompt in prompts), default=0.0),
            "kl": max((_largest(prompt["kl"]) for prompt in prompts if prompt["kl"]), default=0.0),
        },
        "prompts": prompts,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    # JSON has no numbers that are not finite.
    return round(value, 5) if math.isfinite(value) else None


def _largest(value: Any) -> float:
    if isinstance(value, list):
        return max(map(_largest, value), default=0.0)
    return 0.0 if value is None else float(value)


def _json(value: Any) -> str:
    """JSON that ends no element, whatever strings are in it."""
    made = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return made.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return files("actcache.capture").joinpath(name).read_text(encoding="utf-8")
