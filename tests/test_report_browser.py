"""The page of `actcache report` in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import actcache as ac
from actcache.cli.app import run
from actcache.demo import model_path
from actcache.demo.prompts import statements
from browser import MISSING, Browser, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=f"{MISSING} is not installed (Debian: chromium, chromium-driver)"),
]
MODEL = str(model_path())
TAB = "\ue004"
CONTRASTS = """
const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (e) => { for (; e; e = e.parentElement) {
  const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); }
  return [255, 255, 255]; };
return [...document.querySelectorAll("h1, h2, p, dt, dd, th, td, a, summary, svg text, .legend li")].map((e) => {
  const style = getComputedStyle(e);
  const [a, b] = [light(numbers(e instanceof SVGElement ? style.fill : style.color).slice(0, 3)), light(behind(e))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    store = str(folder / "store")
    prompts = [*[s.text for s in statements()][:40], "<img src=x onerror=alert(1)>", "long " * 60]
    for options in (
        {"cache_pooled": False, "sites": ("resid_post", "attn_out")},
        {"pooling": "mean", "dtype": "bfloat16"},
    ):
        ac.UnifiedCache(MODEL, store=store, compute_perplexity=False, **options).warmup(prompts)
    out = folder / "page.html"
    assert run(["report", MODEL, "--store", store, "--prompt", prompts[0], "--prompt", "Snow", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_is_silent_and_can_be_read(page: Path, window: Browser, width: int, dark: bool) -> None:
    window.open(page, width=width, dark=dark)
    assert window.run("return innerWidth") == width
    assert window.run("document.querySelectorAll('details').forEach((d) => (d.open = true))") is None
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run("return [...document.querySelectorAll('svg, figure, table')].length") >= 8
    contrasts = window.run(CONTRASTS)
    assert len(contrasts) > 100 and min(contrasts) >= 4.5
    assert window.messages() == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_a_dataset_does_too(window: Browser, tmp_path: Path, dark: bool) -> None:
    cache = ac.UnifiedCache(MODEL, store=tmp_path / "store", compute_perplexity=False, cache_pooled=False)
    prompts = [s.text for s in statements()][:20]
    cache.warmup(prompts)
    ac.push_dataset(tmp_path / "dataset", MODEL, prompts, store=cache.store, pooling=None)
    out = tmp_path / "page.html"
    more = ["--prompt", prompts[0], "--model", MODEL, "--out", str(out)]
    assert run(["report", str(tmp_path / "dataset"), *more]) == 0
    for width in (390, 1280):
        window.open(out, width=width, dark=dark)
        window.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert window.run("return document.documentElement.scrollWidth") <= width
        assert window.run("return document.querySelectorAll('figure, iframe').length") == 4
        contrasts = window.run(CONTRASTS)
        assert len(contrasts) > 50 and min(contrasts) >= 4.5
    assert window.messages() == []


def test_the_browser_says_what_goes_wrong(window: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><p style='width:3000px'>wide</p><script>nothing.there()</script>")
    window.open(broken, width=390)
    assert "nothing is not defined" in " ".join(window.messages())
    assert window.run("return document.documentElement.scrollWidth") > 390


def test_everything_is_reached_with_the_keyboard(page: Path, window: Browser) -> None:
    window.open(page, width=1280)
    wanted = window.run("return document.querySelectorAll('a, summary, [tabindex=\"0\"], iframe').length")
    hidden = window.run("return document.querySelectorAll('details:not([open]) [tabindex=\"0\"]').length")
    window.run("window.reached = new Set()")
    # The frame of the lens has places of its own.
    for _ in range(wanted - hidden + 10):
        window.press(TAB)
        window.run("reached.add(document.activeElement)")
    reached = window.run("return [...reached].map((e) => e.localName + '.' + e.className)")
    assert reached[0] == "a.skip"
    assert len([one for one in reached if one != "body."]) == wanted - hidden
    assert "iframe." in reached


def test_the_lens_runs_inside_its_frame(page: Path, window: Browser) -> None:
    window.open(page, width=1280)
    frame = window.ask("POST", "/element", {"using": "css selector", "value": "iframe"})
    window.ask("POST", "/frame", {"id": frame})
    try:
        # Its script has run, which fills in the details of the cell that is chosen.
        assert window.run("return document.getElementById('details').hidden") is False
        assert window.run("return document.querySelectorAll('#details li').length") == 5
        assert window.run("return document.querySelectorAll('#prompt option').length") == 2
    finally:
        window.ask("POST", "/frame", {"id": None})
    assert window.messages() == []
