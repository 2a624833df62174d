"""`actcache report` and `ac.plot`: what they say is what is stored, whatever names and prompts are made of."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch

import actcache as ac
from actcache.capture import lens_html
from actcache.cli.app import run
from actcache.demo import model_path
from actcache.errors import DatasetNotFoundError, NotCachedError, OptionError
from actcache.report.contents import Contents, Histogram, variant_of
from actcache.report.of_dataset import dataset_contents
from actcache.report.page import page
from made_datasets import make

MODEL = str(model_path())
EVIL = ["</td><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\u202eb\x1b[31m", "&lt;b&gt;"]
PROMPTS = ["The Eiffel Tower is in the city of", "Snow is white.", *EVIL]


class Parsed(HTMLParser):
    """Elements and the texts of cells, as a parser reads them that knows nothing of the page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(
            name.startswith("on") or (name in ("href", "src") and value and value[0] != "#") for name, value in attrs
        )
        if tag in ("td", "th"):
            self._in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A store with every token of some prompts, and what was stored."""
    folder = tmp_path_factory.mktemp("filled") / "store"
    cache = ac.UnifiedCache(MODEL, cache_pooled=False, compute_perplexity=False, store=folder)
    cache.warmup(PROMPTS)
    space = cache.store.spaces()[0]
    return folder, [cache.store.read(space, PROMPTS, f"resid_post.{layer}") for layer in range(6)]


def report(*arguments: str, out: Path) -> str:
    assert run(["report", *arguments, "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_norms_sizes_and_lengths_are_those_of_what_is_stored(filled, tmp_path, capsys):
    folder, rows = filled
    store = ac.Store(folder)
    (space,) = store.spaces()
    found = variant_of(store, space, "float32")
    (norms,) = found.norms
    assert norms.name == "resid_post" and norms.layers == list(range(6))
    exact = [torch.cat(each).double().norm(dim=1).mean().item() for each in rows]
    np.testing.assert_allclose(norms.values, exact, rtol=1e-9)
    assert found.sizes[0].values == [sum(len(r) for r in each) * 128 * 4 for each in rows]
    lengths = sorted(len(r) for r in rows[0])
    assert found.lengths is not None
    assert (found.lengths.total, found.lengths.longest) == (sum(lengths), lengths[-1])
    assert sum(found.lengths.counts) == len(PROMPTS) and found.lengths.median == np.median(lengths)
    text = Parsed(report(MODEL, "--store", str(folder), out=tmp_path / "page.html"))
    assert f"{exact[5]:.4g}" in text.cells and f"{sum(lengths)}" in text.cells
    assert "wrote " in capsys.readouterr().out


def test_whatever_prompts_are_made_of_they_are_text(filled, tmp_path):
    parsed = Parsed(report(MODEL, "--store", str(filled[0]), out=tmp_path / "page.html"))
    assert not {"script", "img", "iframe", "link"} & set(parsed.tags)
    shown = " ".join(parsed.cells)
    for evil in EVIL:
        assert evil.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b") in shown


def test_what_was_read_last_comes_first(tmp_path):
    store = ac.Store(tmp_path / "store")
    space = ac.new_space("org/model", weights="abc")
    texts = [f"prompt {i}" for i in range(25)]
    rows = [torch.full((4,), float(i)) for i in range(25)]
    store.write(space, texts, {"resid_post.0": rows}, pooling="last_token")
    time.sleep(0.01)
    store.read(space, texts[7:9], "resid_post.0", pooling="last_token")
    (known,) = store.spaces()
    found = variant_of(store, known, "")
    assert {entry.prompt for entry in found.hottest[:2]} == {"prompt 7", "prompt 8"}
    assert len(found.hottest) == len(found.coldest) == 10
    assert not {"prompt 7", "prompt 8"} & {entry.prompt for entry in found.coldest}
    assert found.hottest[0].at > found.coldest[0].at
    places, times = store.last_reads(known)
    assert len(places) == len(times) == 25 and (np.sort(times)[-2:] > times.min()).all()
    # Another process of this host knows it too, and a prompt with two copies counts once, with the later time.
    store.write(space, texts[:3], {"resid_post.1": rows[:3]}, pooling="mean")
    store.close()
    again = ac.Store(tmp_path / "store")
    places, times = again.last_reads(known)
    order = np.argsort(times)[::-1]
    assert [places.prompt(int(i)).text_of(0) for i in sorted(order[:3])] == texts[:3]
    assert {places.prompt(int(i)).text_of(0) for i in order[3:5]} == {"prompt 7", "prompt 8"}


def test_a_lens_is_the_page_of_its_own_in_a_frame(filled, tmp_path):
    made = report(
        MODEL, "--store", str(filled[0]), "--prompt", PROMPTS[0], "--prompt", EVIL[0], out=tmp_path / "p.html"
    )
    parsed = Parsed(made)
    assert parsed.tags.count("iframe") == 1 and "script" not in parsed.tags
    assert 'sandbox="allow-scripts"' in made and "script-src 'sha256-" in made


def test_an_empty_store_and_one_of_several_models(tmp_path, capsys):
    (tmp_path / "none").mkdir()
    assert "Nothing is stored." in report("--store", str(tmp_path / "none"), out=tmp_path / "page.html")
    store = ac.Store(tmp_path / "store")
    for name in ("org/a", "org/b"):
        space = ac.new_space(name, weights=name)
        store.write(space, ["x"], {"resid_post.0": [torch.ones(4)]}, pooling="mean")
    assert "2 variants" in report_said(capsys, "--store", str(tmp_path / "store"), out=tmp_path / "page.html")
    assert "1 variant," in report_said(capsys, "org/b", "--store", str(tmp_path / "store"), out=tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text()
    assert "org/b" in written and "org/a" not in written


def report_said(capsys: pytest.CaptureFixture[str], *arguments: str, out: Path) -> str:
    capsys.readouterr()
    report(*arguments, out=out)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--out", "{}/none/page.html"], 2, "there is no folder"),
        (["--out", "{}"], 2, "is a folder"),
        (["--prompt", "x", "--out", "{}/p.html"], 2, "--prompt needs the MODEL"),
        (["--revision", "main", "--out", "{}/p.html"], 2, "--revision is of a dataset"),
        (["./nothing", "--out", "{}/p.html"], 1, "nothing"),
        (["org/none", "--prompt", "x", "--out", "{}/p.html"], 1, "nothing is stored"),
    ],
)
def test_misuse_is_told_in_a_line_and_writes_nothing(tmp_path, capsys, arguments, status, words):
    filled_in = [argument.format(tmp_path) for argument in arguments]
    (tmp_path / "store").mkdir()
    assert run(["report", *filled_in, "--store", str(tmp_path / "store")]) == status
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


def test_a_page_takes_the_place_of_another_whole_or_not_at_all(filled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    out.write_bytes(b"before")
    out.chmod(0o640)
    arguments = ["report", MODEL, "--store", str(filled[0]), "--out", str(out)]

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert run(arguments) == 1
        assert "cannot be written (No space left on device)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("actcache.report.page.page", lambda _: 1 / 0)
        assert run(arguments) == 1
    assert out.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    link = tmp_path / "link.html"
    link.symlink_to("page.html")
    report(MODEL, "--store", str(filled[0]), out=link)
    assert link.is_symlink() and out.read_bytes().startswith(b"<!doctype html>")
    assert stat.S_IMODE(out.stat().st_mode) == 0o640 and len(list(tmp_path.iterdir())) == 2


def test_a_page_goes_into_a_pipe_that_stays_one(filled, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_bytes)
        assert run(["report", MODEL, "--store", str(filled[0]), "--out", str(pipe)]) == 0
        assert read.result(60).endswith(b"</html>") and pipe.is_fifo()


def test_json_says_what_the_page_says(filled, tmp_path, capsys):
    capsys.readouterr()
    report(MODEL, "--store", str(filled[0]), "--json", out=tmp_path / "page.html")
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == (tmp_path / "page.html").stat().st_size
    assert said["contents"]["variants"][0]["norms"][0]["layers"] == list(range(6))


def test_of_a_dataset(filled, tmp_path):
    ac.push_dataset(tmp_path / "dataset", MODEL, PROMPTS, labels=[0, 1, 0, 1, 0, 1], **at_store(filled[0]))
    found = dataset_contents(tmp_path / "dataset")
    (variant,) = found.variants
    exact = [torch.cat(each).double().norm(dim=1).mean().item() for each in filled[1]]
    np.testing.assert_allclose(variant.norms[0].values, exact, rtol=1e-6)
    assert variant.sizes[0].values == [sum(len(r) for r in each) * 128 * 4 for each in filled[1]]
    assert found.facts["labels"] == "0, 1" and found.facts["prompts"] == "6"
    assert "Mean norm by layer" in report(str(tmp_path / "dataset"), out=tmp_path / "page.html")
    with pytest.raises(DatasetNotFoundError):
        dataset_contents(tmp_path / "other")


def test_of_a_dataset_whatever_it_has(tmp_path: Path) -> None:
    """Of every published form: sizes and norms as numpy has them, and lengths where it tells them."""
    for version in ("1.0 full", "1.2 pooled", "2.0 split"):
        made = make(tmp_path / version, version)
        (variant,) = dataset_contents(made.folder).variants
        pooled = "pooled" in version
        rows = np.stack(made.expected("last_token")) if pooled else np.concatenate(made.vectors)
        (norms,) = variant.norms
        assert (norms.name, norms.layers) == ("resid_post, last_token" if pooled else "resid_post", made.layers)
        np.testing.assert_allclose(norms.values, np.linalg.norm(rows.astype(np.float64), axis=2).mean(0), rtol=1e-3)
        by_site = {s.site: s for s in variant.summaries}
        assert (by_site["resid_post.0"].rows, by_site["resid_post.0"].width) == (len(rows), 6)
        logits = made.metadata["tensors"]["logits_topk"]
        assert (by_site["logits_topk"].rows, by_site["logits_topk"].width) == (11, logits["k"])
        if not pooled:
            assert variant.lengths is not None and variant.lengths.total == len(rows)
        text = report(str(made.folder), out=tmp_path / "page.html")
        assert "nan" not in Parsed(text).cells and "A dataset tells neither" in text


def test_a_lens_of_a_dataset_reads_the_vectors_of_the_dataset(filled, tmp_path, monkeypatch, capsys):
    ac.push_dataset(tmp_path / "dataset", MODEL, PROMPTS, **at_store(filled[0]))
    (tmp_path / "host").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "host"))
    arguments = [str(tmp_path / "dataset"), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]

    def none(*_: object) -> None:
        raise AssertionError("the model runs")

    monkeypatch.setattr("actcache.extract.backends.local.LocalSession.run", none)
    made = report(*arguments, "--model", MODEL, out=tmp_path / "page.html")
    assert Parsed(made).tags.count("iframe") == 1
    inside = re.search(r'srcdoc="([^"]*)"', made)
    assert inside is not None
    cache = ac.UnifiedCache(MODEL, cache_pooled=False, compute_perplexity=False, store=filled[0])
    assert html.unescape(inside[1]) == lens_html.page(cache.logit_lens(PROMPTS[:2]))
    assert not list((tmp_path / "host").iterdir()), "nothing is left behind"
    # A folder of that name is not here, and the Hub is not asked.
    assert run(["report", *arguments, "--out", str(tmp_path / "page.html")]) == 1
    assert run(["report", MODEL, "--store", str(filled[0]), "--model", "x", "--out", str(tmp_path / "p")]) == 2
    assert "--model is for --prompt with a dataset" in capsys.readouterr().err
    made = make(tmp_path / "nameless", "1.0 full")
    made.metadata["model"] = {}
    made.write()
    assert run(["report", str(made.folder), "--prompt", "x", "--out", str(tmp_path / "p")]) == 2
    assert "name the model" in capsys.readouterr().err


def at_store(folder: Path) -> dict[str, object]:
    return {"store": ac.Store(folder), "pooling": None}


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], list(range(1, 200)), [1, 100_000]])
def test_every_prompt_is_in_one_bar(lengths):
    made = Histogram.of(lengths)
    assert made is not None
    assert sum(made.counts) == len(lengths) and len(made.counts) <= 25
    for start, stop, number in zip(made.edges, made.edges[1:], made.counts, strict=False):
        assert number == sum(start <= n < stop for n in lengths)
    assert Histogram.of([]) is None


def test_a_page_without_anything_is_one_still():
    assert page(Contents("nothing", "nowhere", {}, []), now=0.0).startswith("<!doctype html>")


def test_norms_as_a_figure(filled):
    folder, rows = filled
    exact = [torch.cat(each).double().norm(dim=1).mean().item() for each in rows]
    store = ac.Store(folder)
    cache = ac.UnifiedCache(MODEL, cache_pooled=False, compute_perplexity=False, store=store)
    for figure in (ac.plot.norms(store, space=store.spaces()[0]), ac.plot.norms(cache)):
        assert isinstance(figure, matplotlib.figure.Figure)
        (line,) = figure.axes[0].get_lines()
        np.testing.assert_allclose(line.get_ydata(), exact, rtol=1e-9)
    values = torch.arange(24.0).reshape(2, 3, 4)
    held = ac.ActivationCache({"resid_post.0": values, "resid_post.3": 2 * values, "note": "x"})
    (line,) = ac.plot.norms(held).axes[0].get_lines()
    assert line.get_xdata().tolist() == [0, 3]
    one = values.double().norm(dim=-1).mean().item()
    np.testing.assert_allclose(line.get_ydata(), [one, 2 * one], rtol=1e-6)
    with pytest.raises(OptionError, match="space="):
        ac.plot.norms(store)
    with pytest.raises(OptionError, match="not list"):
        ac.plot.norms([1])
    with pytest.raises(NotCachedError):
        ac.plot.norms(ac.ActivationCache())


def test_a_lens_as_a_figure(filled):
    cache = ac.UnifiedCache(MODEL, cache_pooled=False, compute_perplexity=False, store=filled[0])
    lens = cache.logit_lens(PROMPTS[:2])
    for metric in ("probability", "entropy", "kl"):
        figure = ac.plot.lens(lens, 0, metric=metric)
        (image,) = figure.axes[0].get_images()
        real = lens.mask[0]
        exact = {
            "probability": lens.probabilities[:, 0, real, 0],
            "entropy": lens.entropy[:, 0, real],
            "kl": lens.kl[:, 0, real],
        }
        np.testing.assert_array_equal(image.get_array(), exact[metric].numpy())
        figure.canvas.draw()
        assert figure._repr_png_().startswith(b"\x89PNG")
    for wrong in ({"prompt": 2}, {"metric": "entrop"}):
        with pytest.raises(OptionError):
            ac.plot.lens(lens, **wrong)
    with pytest.raises(OptionError, match="logit_lens"):
        ac.plot.lens("x")
