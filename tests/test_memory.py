"""Sizes: of values, groups and all, and how a cache is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache.capture.memory import readable, shared_name
from actcache.errors import UnknownKeyError
from actcache.testing.tiny import tiny_model


@pytest.fixture
def cache() -> ac.ActivationCache:
    items: dict[str, Any] = {f"resid_post.{i}": torch.zeros(1, 100) for i in range(12)}
    items |= {f"pattern.{layer}.{head}": torch.zeros(1, 10) for layer in (0, 10) for head in (0, 1)}
    items |= {f"avg_attn_pattern_L{layer}H3": torch.zeros(1, 10) for layer in (1, 12)}
    items |= {"projected_value_L0H1": torch.zeros(10), "logits": torch.zeros(1, 5), "note": "text"}
    items["head_out.0.1"] = ac.ValueWithInfo(torch.zeros(1000), "why")
    items["statistics"] = {"mean": torch.zeros(10), "logits": torch.zeros(2), "deep": {"size": torch.zeros(3)}}
    items["list"] = [torch.zeros(1), torch.zeros(2), np.zeros(3)]
    return ac.ActivationCache(items)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (400, "400 B"), (999, "999 B"), (1000, "1.00 KB"), (40_400, "40.40 KB"), (999_994, "999.99 KB"),
        (999_996, "1.00 MB"), (12_345_678, "12.35 MB"), (2_500_000_000, "2.50 GB"), (7 * 10**15, "7000.00 TB"),
    ],
)  # fmt: skip
def test_sizes_in_words(nbytes: int, text: str) -> None:
    assert readable(nbytes) == text


def test_every_value_has_its_size(cache: ac.ActivationCache) -> None:
    assert cache.memory_size("resid_post.3") == "400 B"
    assert cache.memory_size("resid_out_3") == "400 B"
    assert cache.memory_size("head_out.0.1") == "4.00 KB"
    assert cache.memory_size("statistics") == "60 B"
    assert cache.memory_size("list") == "36 B"
    assert cache.memory_size("note") == "0 B"
    total = 12 * 400 + 4 * 40 + 2 * 40 + 40 + 20 + 4000 + 60 + 36
    assert cache.nbytes == total
    assert cache.memory_size() == readable(total)
    with pytest.raises(UnknownKeyError, match=r"Did you mean 'resid_post\.\d+'"):
        cache.memory_size("resid_pots.3")


def test_the_tree(cache: ac.ActivationCache, capsys: pytest.CaptureFixture[str]) -> None:
    tree = cache.memory_tree()
    assert list(tree) == list(cache)
    # Not the size of the top-level value of that name.
    assert tree["statistics"] == {"mean": "40 B", "logits": "8 B", "deep": {"size": "12 B"}}
    assert tree["list"] == ["4 B", "8 B", "24 B"]
    assert tree["head_out.0.1"] == "4.00 KB"
    assert capsys.readouterr().out == ""
    cache.memory_tree(print_tree=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "total: 9.20 KB"
    at = lines.index("statistics: 60 B")
    assert lines[at + 1 : at + 5] == ["  mean: 40 B", "  logits: 8 B", "  deep: 12 B", "    size: 12 B"]
    assert len(lines) == 1 + len(cache) + 4 + 3


def test_the_grouped_tree(cache: ac.ActivationCache, capsys: pytest.CaptureFixture[str]) -> None:
    tree = cache.memory_tree(print_tree=True, grouped_tree=True)
    assert tree == {
        "resid_post (12 items)": "4.80 KB",
        "pattern (4 items)": "160 B",
        "avg_attn_pattern (2 items)": "80 B",
        "projected_value (1 item)": "40 B",
        "logits": "20 B",
        "note": "0 B",
        "head_out (1 item)": "4.00 KB",
        "statistics": {"mean": "40 B", "logits": "8 B", "deep": {"size": "12 B"}},
        "list": ["4 B", "8 B", "24 B"],
    }
    assert "resid_post (12 items): 4.80 KB" in capsys.readouterr().out
    small = ac.ActivationCache({"resid_post.0": torch.zeros(100), "resid_post.1": torch.zeros(10_000)})
    assert small.memory_tree(grouped_tree=True) == {"resid_post (2 items)": "40.40 KB"}
    many = ac.ActivationCache({f"resid_post.{i}": torch.zeros(251) for i in range(1000)})
    assert many.memory_tree(grouped_tree=True) == {"resid_post (1000 items)": "1.00 MB"}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("resid_post.10", "resid_post"), ("encoder.resid_post.3", "encoder.resid_post"), ("pattern.1.2", "pattern"),
        ("pattern_L10H11", "pattern"), ("values_L3", "values"), ("resid_out_12", "resid_out"),
        ("transformer.h.0.attn", "transformer.h.*.attn"), ("transformer.h.0", "transformer.h"), ("", ""), ("7", "*"),
        ("_3", "_3"), ("ln_1", "ln"), ("free text", "free text"),
        ("transformer.h.3.ln_1", "transformer.h.*.ln_1"),
    ],
)  # fmt: skip
def test_what_a_group_is_called(key: str, name: str) -> None:
    assert shared_name(key) == name


def test_shared_memory_counts_once() -> None:
    big = torch.zeros(1000, 1000)
    cache = ac.ActivationCache({"a": big, "b": big, "row": big[:1]})
    assert cache.nbytes == 4_000_000
    assert cache.memory_size("row") == "4.00 KB (view of 4.00 MB)"
    assert ac.ActivationCache({"a": big, "b": [big]}).memory_size() == "4.00 MB"
    array = np.zeros(100)
    assert ac.ActivationCache({"a": array, "b": array[:10]}).nbytes == 800
    assert ac.ActivationCache().memory_size() == "0 B"


def test_the_display_folds_layers(cache: ac.ActivationCache) -> None:
    text = repr(cache)
    assert "ActivationCache with 24 entries, 9.20 KB" in text
    assert "resid_post.0-11 (12 items)" in text
    assert "float32[1, 100]" in text
    assert "float32[1000] with info" in text
    modules = ac.run_with_cache(tiny_model("gpt2"), [[5, 6, 7]])[1]
    assert "transformer.h.0-3 (4 items)" in repr(modules)
    assert "transformer.h.0-3.ln_1 (4 items)" in repr(modules)
    assert "Entry(float32[1, 3, 32])" in repr(modules)
    assert len(repr(modules).splitlines()) == 2 + 16 - 1
    mixed = ac.ActivationCache({"resid_post.1": torch.zeros(1), "resid_post.7": torch.zeros(2), "<b>": 1})
    assert "resid_post.1..7 (2 items)" in repr(mixed)
    assert "and 1 other" in repr(mixed)
    page = mixed._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" in page
    assert "float32[1]" in page
    assert page.count("<tr>") == 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
def test_the_display_is_80_columns_wide(family: str) -> None:
    cache = ac.run_with_cache(tiny_model(family), [[5, 6, 7], [8, 9, 10, 11]], include_inputs=True)[1]
    cache.columns["label"] = ["a", "b"]
    cache["a text of mine " * 20] = np.ones((3, 4))
    cache["model.language_model.layers.3.self_attn.a_very_long_name_of_a_projection.of_something"] = [torch.ones(2)] * 5
    for shown in (repr(cache), repr(ac.ActivationCache(dict(list(cache.items())[-2:])))):
        lines = shown.splitlines()
        assert all(len(line) <= 80 for line in lines), shown
        assert lines[-1].endswith(("more", " B", " KB"))
    assert "2 prompts of up to 4 positions; columns: label" in repr(cache)
    assert "float64[3, 4]" in shown
    assert "list of 5 float32[2]" in shown
    assert "model.language" in shown and "something" in shown
    # Bytes stand below each other.
    assert len({len(line) for line in lines[1:]}) == 1


def test_the_whole_model_and_its_child_of_that_name() -> None:
    cache = ac.run_with_cache(tiny_model("llama"), [[5, 6, 7]], ["", "model", "model.layers.0"])[1]
    tree = cache.memory_tree()
    assert list(tree) == ["model", "model.model", "model.layers.0"]
    assert [cache.memory_size("") == tree["model"], cache["model.model"] is cache._data["model"]] == [True, True]
    assert [line.split()[0] for line in repr(cache).splitlines()[2:]] == list(tree)


def test_positions_and_prompts_are_told() -> None:
    cache = ac.run_with_cache(
        tiny_model("gpt2"), [[5, 6, 7]], sites="resid_post", positions={"subject": (0, 2), "last": -1}
    )[1]
    assert repr(cache).splitlines()[1] == "  1 prompt of 3 positions; positions: subject, last"
    assert "1 prompt of 3 positions" in cache._repr_html_()
    assert len(repr(ac.ActivationCache()).splitlines()) == 1
