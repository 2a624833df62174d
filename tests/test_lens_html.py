"""The page of a lens: every cell is in it, nothing outside is asked for, and tokens are text whatever they are."""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.capture.lens_html import page, visible
from actcache.testing.tiny import tiny_tokenizer

IDS = [[5, 200, 31, 7, 90], [9, 14, 77]]
EVIL = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script x",
    "<!--<script ",
    "<!--",
    "-->",
    "]]>",
    "</table></section></style>",
    "&lt;b&gt;",
    "\n",
    "\r\n\t",
    "\x00\x1b[31m",
    "\u202eabc",
    "\u2028\u2029",
    "שלום",
    "日本",
    "  two spaces ",
    "\\u003c",
    "javascript:alert(1)",
    "\ud800",
]


# A comment, the end of a script, control characters, a change of direction.
CHOSEN = [5, 0, 12, 13]


class Evil:
    """A tokenizer whose tokens are what nobody wants in a page."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return EVIL[ids[0] % len(EVIL)] + str(ids[0])

    def convert_ids_to_tokens(self, token: int) -> str:
        return "x"


class Parsed(HTMLParser):
    """Elements, their attributes and texts, as they are read by a parser that knows nothing of the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.heads: list[list[str]] = []
        self.labels: list[str] = []
        self.options: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tbody":
            self.tables.append([])
            self.heads.append([])
        if tag == "tr" and "tbody" in self.open:
            self.tables[-1].append([])
            self.heads[-1].append("")
        if tag == "td":
            self.tables[-1][-1].append("")
            self.labels.append(dict(attrs)["aria-label"] or "")
        if tag == "option":
            self.options.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-2:] == ["td", "bdi"]:
            self.tables[-1][-1][-1] += data
        elif self.open[-2:] == ["th", "bdi"]:
            self.heads[-1][-1] += data
        elif self.open[-1:] == ["option"]:
            self.options[-1] += data


def evil_lens(top_k: int = 3) -> ac.LogitLens:
    _, cache = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites="resid_post")
    return cache.logit_lens(top_k=top_k, tokens=CHOSEN, tokenizer=Evil())


@pytest.fixture
def lens(tmp_path: Path) -> ac.LogitLens:
    cache = ac.UnifiedCache(zoo.model_of("gpt2"), tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    return cache.logit_lens(["Hello.", "naïve 日本", "b"], 3, tokens=["a"])


def test_every_cell_is_in_the_page(lens: ac.LogitLens, tmp_path: Path) -> None:
    place = lens.to_html(tmp_path / "lens.html", title="Of <b> & co")
    assert place == tmp_path / "lens.html"
    text = place.read_text(encoding="utf-8")
    found = Parsed(text)
    assert len(found.tables) == 3
    labels = iter(found.labels)
    for i, (rows, heads) in enumerate(zip(found.tables, found.heads, strict=True)):
        real = lens.mask[i].nonzero()[:, 0].tolist()
        assert heads == [visible(lens.text(int(lens.input_ids[i, at]))) for at in real]
        for at, row in zip(real, rows, strict=True):
            best = [visible(lens.text(int(lens.tokens[place, i, at, 0]))) for place in range(len(lens.layers))]
            assert row == best
            for number, layer in enumerate(lens.layers):
                chance = float(lens.probabilities[number, i, at, 0])
                assert next(labels) == f"layer {layer}: {best[number]}, probability {chance:.3f}"
    assert "<title>Of &lt;b&gt; &amp; co</title>" in text
    data = json.loads(found.scripts[0])
    assert data["layers"] == lens.layers
    assert data["vocabulary"] == 259
    for i, prompt in enumerate(data["prompts"]):
        real = lens.mask[i]
        assert prompt["best"] == lens.tokens[:, i, real].transpose(0, 1).tolist()
        assert prompt["ranks"] == lens.chosen_ranks[:, i, real].transpose(0, 1).tolist()
        for name, values in (("entropy", lens.entropy), ("kl", lens.kl)):
            assert torch.allclose(torch.tensor(prompt[name]), values[:, i, real].T, atol=1e-5)
    assert data["most"]["kl"] == pytest.approx(float(lens.kl[:, lens.mask].max()), abs=1e-5)
    assert found.options[0] == "0: <bos>Hello."
    assert found.options[1].startswith("1: <bos>na")
    assert found.options[2] == "2: <bos>b"
    assert found.options[3:] == [
        "probability of the best token",
        "entropy",
        "KL from the final prediction",
        "rank of a",
        "probability of a",
    ]


def test_a_title_is_text_whatever_it_is(lens: ac.LogitLens, tmp_path: Path) -> None:
    # As of a folder whose name is no UTF-8.
    place = lens.to_html(tmp_path / "lens.html", title="Logit lens of \udcff <b>")
    assert "<title>Logit lens of \\udcff &lt;b&gt;</title>" in place.read_text(encoding="utf-8")


def test_a_page_is_written_whole_or_not_at_all(
    lens: ac.LogitLens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "lens.html"
    place.write_text("what was there")
    link = tmp_path / "link.html"
    link.symlink_to(place)
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            lens.to_html(link)
    assert place.read_text() == "what was there"
    assert sorted(tmp_path.glob("*lens*")) == [place] and not list(tmp_path.glob(".*"))
    assert lens.to_html(link) == link
    assert link.is_symlink() and place.read_text().startswith("<!doctype html>")
    with pytest.raises(errors.MissingFileError, match=r"no folder .*absent"):
        lens.to_html(tmp_path / "absent" / "lens.html")


def test_the_page_asks_nobody(lens: ac.LogitLens) -> None:
    text = page(lens)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<link|fetch\(|XMLHttp|import\(", text)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    script = Parsed(text).scripts[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # Text of tokens goes into the page as text only.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert "prefers-color-scheme: dark" in text


def test_tokens_are_text_whatever_they_are() -> None:
    lens = evil_lens(60)
    text = page(lens)
    text.encode("utf-8")
    found = Parsed(text)
    assert not found.open
    assert set(found.tags) == {
        "html", "head", "meta", "title", "style", "body", "h1", "bdi", "p", "div", "label", "select", "option", "span",
        "i", "main", "section", "table", "thead", "tbody", "tr", "th", "td", "small", "aside", "script",
    }  # fmt: skip
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    cells = {name for tag, name, _ in found.attributes if tag == "td"}
    assert cells - {"class"} == {"tabindex", "style", "aria-label"}
    assert all(re.fullmatch(r"--v:[01]\.\d{3}", value or "") for _, name, value in found.attributes if name == "style")
    assert len(found.scripts) == 2
    assert not set("<>&") & set(found.scripts[0])
    data = json.loads(found.scripts[0])
    assert found.options[-8::2] == [f"rank of {visible(Evil().decode([token]))}" for token in CHOSEN]
    used = {int(i) for i in lens.tokens[lens.tokens >= 0]} | set(CHOSEN) | {i for ids in IDS for i in ids}
    assert {int(i) for i in data["texts"]} == used
    assert len({i % len(EVIL) for i in used}) == len(EVIL)
    for token, said in data["texts"].items():
        assert said == visible(Evil().decode([int(token)]))
    assert not re.search("[\x00-\x09\x0b-\x1f\u2028\u2029\u202a-\u202e\ud800-\udfff]", text)
    for rows, ids in zip(found.heads, IDS, strict=True):
        assert rows == [visible(Evil().decode([i])) for i in ids]


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible(" the") == "·the"
    assert visible("   ") == "···"
    assert visible("a b ") == "a b·"
    assert visible("\n\n") == "↵↵"
    assert visible("\t\x00\u202e\u2028\u200b") == "\\t\\x00\\u202e\\u2028\\u200b"
    assert visible("\ud800") == "\\ud800"
    assert visible("שלום<b>日本") == "שלום<b>日本"


def test_a_lens_without_divergences_names_or_layers() -> None:
    _, cache = ac.run_with_cache(zoo.model_of("gpt2"), IDS, sites="resid_post", layers=[1, 2])
    found = Parsed(page(cache.logit_lens()))
    assert [[len(row) for row in rows] for rows in found.tables] == [[2] * 5, [2] * 3]
    assert json.loads(found.scripts[0])["prompts"][0]["kl"] is None
    assert not [option for option in found.options if "KL" in option]
    empty = cache.logit_lens(layers=[])
    assert "Nothing was read" in page(empty)
    assert not Parsed(page(empty)).scripts
    assert "Nothing was read" in empty._repr_html_()


def test_numbers_that_are_not_finite_are_no_numbers_in_json() -> None:
    lens = evil_lens()
    lens.entropy[0, 0, 1] = math.nan
    lens.kl[0, 0, 1] = math.inf
    data = json.loads(Parsed(page(lens)).scripts[0])
    assert data["prompts"][0]["entropy"][1][0] is None
    assert data["prompts"][0]["kl"][1][0] is None
    assert math.isfinite(data["most"]["kl"])


def test_a_notebook_shows_the_page_in_a_frame(lens: ac.LogitLens, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = lens._repr_html_()
    found = Parsed(shown)
    assert found.tags == ["iframe"]
    attributes = {name: value for _, name, value in found.attributes}
    # Neither the notebook nor its cookies are in reach.
    assert attributes["sandbox"] == "allow-scripts"
    assert len(Parsed(attributes["srcdoc"] or "").tables) == 3
    monkeypatch.setattr("actcache.capture.lens_html._NOTEBOOK_CELLS", 30)
    inside = html.unescape(re.findall('srcdoc="([^"]*)"', lens._repr_html_())[0])
    assert len(Parsed(inside).tables) == 1
    assert "The first 1 of 3 prompts; to_html(path) writes all." in inside


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Presses keys and chooses colours as a reader would, and notes what the page says then.
DRIVER = """
const frame = document.querySelector("iframe"), said = [];
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const focused = () => page.querySelector("section:not([hidden]) td[tabindex='0']");
  const note = (what) => said.push([what, page.getElementById("details").innerText, focused().innerText,
    focused().parentElement.sectionRowIndex, focused().cellIndex - 1, focused().style.getPropertyValue("--v")]);
  const press = (key, more) => focused().dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
  const choose = (id, value) => {
    const select = page.getElementById(id);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  note("start");
  press("ArrowLeft"); note("left");
  press("ArrowUp"); note("up");
  press("Home", {ctrlKey: true}); note("first");
  press("ArrowLeft"); note("stays");
  press("End"); note("end of row");
  choose("metric", "rank 0"); note("rank");
  choose("metric", "kl"); note("kl");
  choose("prompt", "1"); note("second prompt");
  page.querySelector("section:not([hidden]) td").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  note("hover");
  page.querySelector("section:not([hidden]) td").click(); note("click");
  said.push(["hidden", page.querySelectorAll("section[hidden]").length, "", 0, 0, ""]);
  document.getElementById("said").textContent = JSON.stringify(said);
});
frame.srcdoc = JSON.parse(document.getElementById("page").textContent);
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    lens = evil_lens()
    inside = json.dumps(page(lens)).replace("<", "\\u003c")
    outside = (
        f'<!doctype html><meta charset="utf-8"><iframe width=900 height=700></iframe><pre id="said"></pre>'
        f'<script type="application/json" id="page">{inside}</script><script>{DRIVER}</script>'
    )
    (tmp_path / "drive.html").write_text(outside, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    ran = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "drive.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (text,) = re.findall(r'<pre id="said">(.*?)</pre>', ran.stdout, re.DOTALL)
    said = {what: rest for what, *rest in json.loads(html.unescape(text))}

    def at(what: str, prompt: int, row: int, layer: int) -> None:
        details, cell, r, number, _ = said[what]
        assert (r, number) == (row, layer), what
        best = visible(lens.text(int(lens.tokens[layer, prompt, row, 0])))
        assert cell.split("\n")[0] == best, what
        lines = [" ".join(line.split()) for line in details.split("\n")]
        assert lines[0].startswith(f"layer {layer}, position {row}, behind "), what
        assert f"{float(lens.entropy[layer, prompt, row]):.3f}" in lines, what
        assert f"{float(lens.kl[layer, prompt, row]):.3f}" in lines, what

    at("start", 0, 4, 3)
    at("left", 0, 4, 2)
    at("up", 0, 3, 2)
    at("first", 0, 0, 0)
    at("stays", 0, 0, 0)
    at("end of row", 0, 0, 3)
    rank = int(lens.chosen_ranks[3, 0, 0, 0])
    assert said["rank"][1].split("\n")[1] == f"#{rank}"
    assert float(said["rank"][4]) == pytest.approx(1 - math.log1p(rank) / math.log(259), abs=2e-3)
    assert said["kl"][1].split("\n")[1] == "0.000"
    at("second prompt", 1, 2, 3)
    # The pointer shows another cell; keys go on from where they were.
    assert said["hover"][0].startswith("layer 0, position 0")
    assert said["hover"][2:4] == [2, 3]
    at("click", 1, 0, 0)
    assert said["hidden"][0] == 1
