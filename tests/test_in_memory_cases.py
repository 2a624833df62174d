"""What a container of activations must do, whoever fills it: behaviours that no module's own tests hold by themselves.

| behaviour | where it is held |
|---|---|
| layers and positions, negative ones, those that are not there | here; test_cache.py; of one prompt test_residual.py |
| names of sites: read, printed, counted once, refused before the pass | here; test_sites.py |
| a mapping: copies, pickles, equality by content, nearest names | here; test_cache.py |
| moving to devices and dtypes, notes and metadata on the way | test_notes.py |
| batches joined: lengths in any order, labels | here; test_aggregation.py |
| batches joined: strategies, deferred mode | here; test_aggregation_strategies.py |
| what cannot be joined, and that nothing changed by it | test_aggregation.py |
| positions of every batch, finished caches and their metadata | here; test_aggregation_strategies.py |
| bytes written by joins, the bytes of views and shared memory | here; test_memory.py; times in benchmarks/joining.py |
| sizes in words, trees, groups of layers and heads | here; test_memory.py |
| files, found by what is said of them | here; test_saving.py |
| extraction, interventions, lenses, features, attention of a token | test_extraction_cases.py, with its own table |

Several of them are what other containers get wrong: sums of labels, lengths whose order decides the structure, time
that grows with the square of the number of batches, memory that is counted twice or not at all.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import actcache as ac
from actcache.errors import JoinError, LayerRangeError, UnknownKeyError, UnknownSiteError
from actcache.model.sites import PER_LAYER
from actcache.testing.tiny import tiny_model

IDS = torch.tensor([[5, 9, 100, 7, 3, 250]])


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


def of(**items: Any) -> ac.ActivationCache:
    return ac.ActivationCache(items)


def ten_positions() -> ac.ActivationCache:
    generator = torch.Generator().manual_seed(0)
    return ac.ActivationCache({f"resid_post.{i}": torch.randn(1, 10, 2304, generator=generator) for i in (0, 1)})


def test_layers_and_positions_of_what_was_put_in() -> None:
    empty = ac.ActivationCache()
    assert (len(empty), empty.n_layers, empty.is_empty(), "resid_post.0" in empty) == (0, 0, True, False)
    assert empty.get("resid_post.0") is None
    with pytest.raises(LayerRangeError, match="empty"):
        empty.seq_len()
    cache = ten_positions()
    assert (cache.n_layers, cache.seq_len(), cache.is_empty()) == (2, 10, False)
    assert cache.get_layer(1).shape == (1, 10, 2304)
    assert torch.equal(cache.get_position(0, 5), cache["resid_post.0"][:, 5])
    assert cache.get("resid_post.2") is None
    with pytest.raises(IndexError, match=r"position 10 of layer 0 is out of range.*10 tokens \(0 to 9\)"):
        cache.get_position(0, 10)
    with pytest.raises(IndexError, match="layer 5 of resid_post is not in the cache: it holds layers 0, 1"):
        cache.get_position(5, 0)


def test_layers_are_the_models_numbers(gpt2: Any) -> None:
    """Where only some were captured, a layer is still called by its place in the model, and -1 is the model's last."""
    cache = ac.run_with_cache(gpt2, IDS, sites="resid_post", layers=[1, 3])[1]
    assert cache.layer_numbers() == [1, 3]
    assert cache.get_layer(-1) is cache["resid_post.3"]
    assert cache.get_layer(-3) is cache["resid_post.1"]
    with pytest.raises(LayerRangeError, match="holds layers 1, 3"):
        cache.get_layer(0)
    by_hand = ac.ActivationCache({"resid_post.5": torch.ones(1, 2, 3), "resid_post.20": torch.zeros(1, 2, 3)})
    assert by_hand.layer_numbers() == [5, 20]
    assert by_hand.get_layer(-1) is by_hand["resid_post.20"]


def test_the_output_is_there_whatever_was_captured(gpt2: Any) -> None:
    expected = gpt2(IDS).logits
    for sites in ("resid_post.0", ["embed", "mlp_out"], "logits"):
        output, cache = ac.run_with_cache(gpt2, IDS, sites=sites)
        assert torch.equal(output.logits, expected)
        assert cache.get("attn_out.2") is None
        with pytest.raises(UnknownKeyError, match=r"'attn_out\.2' is not in the cache"):
            cache["attn_out.2"]


def test_sites_are_counted_once_under_whatever_name(gpt2: Any) -> None:
    named = ["resid_post.1", "blocks.1.hook_resid_post", ac.Site("resid_post", 1), "resid_post.-3", "layer_1"]
    cache = ac.run_with_cache(gpt2, IDS, sites=[*named, "embed"])[1]
    assert list(cache) == ["resid_post.1", "embed"]
    assert "resid_out_1" in cache
    assert "resid_out_2" not in cache
    other = ac.run_with_cache(gpt2, IDS, sites="mlp_out.0")[1]
    assert list(cache | other) == ["resid_post.1", "embed", "mlp_out.0"]


@pytest.mark.parametrize("name", ["resid_psot.1", "blocks.1.hook_nothing", "custom", "h.1.out"])
def test_unknown_names_are_refused_before_the_pass(gpt2: Any, name: str) -> None:
    with pytest.raises(UnknownSiteError, match="expected one of") as caught:
        ac.capture(gpt2, sites=["embed", name])
    assert name in str(caught.value)


def test_a_copy_in_any_way_is_the_same_mapping() -> None:
    cache = ten_positions()
    cache["note"] = {"a": [1, torch.ones(2)]}
    for twin in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache | {}):
        assert twin == cache and cache == twin
        assert list(twin) == list(cache) and len(twin) == 3
        assert twin.pop("note") is not None and "note" in cache
        with pytest.raises(KeyError, match=r"holds 'resid_post\.0', 'resid_post\.1': add layer 11"):
            twin["resid_post.11"]


def test_joining_appends_rows() -> None:
    cache = of(x=torch.tensor([1, 2]))
    assert cache.cat(of(x=torch.tensor([3, 4])))["x"].tolist() == [1, 2, 3, 4]
    by_rule = of(x=torch.tensor([1, 2]), y=torch.tensor([1, 2]), z=torch.tensor([1, 2]))
    by_rule.register_aggregation("x", lambda old, new: new if old is None else torch.stack((old, new)))
    by_rule.register_aggregation("z", lambda old, new: new if old is None else old)
    batch = of(x=torch.tensor([3, 4]), y=torch.tensor([3, 4]), z=torch.tensor([3, 4]))
    late = copy.deepcopy(by_rule)
    with late.deferred_mode():
        late.cat(batch)
    assert by_rule.cat(batch) == late
    assert by_rule["x"].shape == (2, 2)
    assert by_rule["y"].tolist() == [1, 2, 3, 4]
    assert by_rule["z"].tolist() == [1, 2]


def test_two_shapes_are_two_items() -> None:
    one, other = torch.randn(2, 3), torch.randn(2, 2)
    both = of(x=one).cat(of(x=other))
    assert [row.tolist() for row in both.rows("x")] == [*one.tolist(), *other.tolist()]
    apart = of(x=one).cat(of(x=other), pad=False)
    assert [part.tolist() for part in apart["x"]] == [one.tolist(), other.tolist()]


def test_containers_and_notes_join() -> None:
    one = of(l=[1, 2], t=(1, 2), n=ac.ValueWithInfo(torch.tensor([1.0]), "why"))
    both = one.cat(of(l=[3, 4], t=(3, 4), n=ac.ValueWithInfo(torch.tensor([2.0]), "why")))
    assert both["l"] == [1, 2, 3, 4]
    assert both["t"] == [(1, 2), (3, 4)]
    assert both["n"].value().tolist() == [1, 2]
    assert both.info("n") == "why"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_labels_stay_labels(n: int) -> None:
    """Numbers are not added up, strings not strung together, arrays not added element by element."""
    both = ac.ActivationCache()
    for i in range(n):
        both.cat(of(i=i, s=f"ex{i}", a=np.array([i, i]), t=torch.tensor(i), b=True))
    assert both["i"] == list(range(n))
    assert both["s"] == [f"ex{i}" for i in range(n)]
    assert both["a"].tolist() == [i for i in range(n) for _ in range(2)]
    assert both["t"].tolist() == list(range(n))
    assert both["b"] == [True] * n


def test_spans_of_every_batch_can_be_addressed(gpt2: Any) -> None:
    spans = [(0, 2), (1, 4), (3, 5)]
    whole = ac.run_with_cache(gpt2, IDS, sites="resid_post.2")[1]["resid_post.2"][0]
    parts = [ac.run_with_cache(gpt2, IDS, sites="resid_post.2", positions={"subject": span})[1] for span in spans]
    both = ac.ActivationCache.concatenate(parts)
    for row, (start, stop) in zip(both.at("subject").rows("resid_post.2"), spans, strict=True):
        torch.testing.assert_close(row, whole[start:stop])


def test_a_finished_cache_takes_more_batches(gpt2: Any) -> None:
    parts = [ac.run_with_cache(gpt2, IDS, sites="resid_post.2")[1] for _ in range(3)]
    parts[0].add_metadata(model_name="tiny", run=1)
    finished = ac.ActivationCache.concatenate(parts[:2])
    assert finished.metadata["model_name"] == "tiny"
    assert finished.cat(parts[2])["resid_post.2"].shape == (3, 6, 32)
    assert finished.metadata["run"] == 1
    parts[2].add_metadata(model_name="other")
    with pytest.raises(JoinError, match="'tiny' and 'other'"):
        finished.cat(parts[2])
    assert finished.metadata["model_name"] == "tiny"


class _Written(TorchDispatchMode):
    """Counts the bytes that operations write."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.total += result.nbytes
        return result


@pytest.mark.parametrize("how", ["cat", "deferred", "concatenate"])
def test_bytes_written_grow_with_the_bytes_joined(how: str) -> None:
    """Each byte is copied at most twice, however many batches there are: once to be owned, once to be joined."""
    for n in (20, 500):
        batches = [of(x=torch.ones(2, 1, 16), y=torch.ones(2, 1, 16)) for _ in range(n)]
        with _Written() as written:
            both = ac.ActivationCache()
            if how == "concatenate":
                both = ac.ActivationCache.concatenate(batches)
            elif how == "deferred":
                with both.deferred_mode():
                    for batch in batches:
                        both.cat(batch)
            else:
                for batch in batches:
                    both.cat(batch)
            assert both["x"].shape == (2 * n, 1, 16)
        assert n * 256 <= written.total <= 2 * n * 256 + 4096, how


def test_bytes_are_counted_and_kept_once(tmp_path: Path) -> None:
    cache = of(x=torch.zeros(1000))
    assert cache.nbytes == 4000
    assert cache.memory_size("x") == "4.00 KB"
    assert of(x=torch.zeros(100)).memory_size() == "400 B"
    noted = of(x=ac.ValueWithInfo(torch.zeros(1000), "why"), t=(torch.zeros(10), [torch.zeros(10)]))
    assert noted.nbytes == 4080
    both = of(a=torch.zeros(100), b={"c": [torch.zeros(10_000)]})
    assert both.memory_size() == "40.40 KB"
    assert both.memory_tree() == {"a": "400 B", "b": {"c": ["40.00 KB"]}}
    view = of(x=torch.zeros(1000, 1000)[:, -1:])
    assert view.memory_size("x") == "4.00 KB (view of 4.00 MB)"
    path = view.save(tmp_path)
    assert path.stat().st_size < 6000
    assert torch.equal(ac.ActivationCache.load(path)["x"], view["x"])


def test_every_site_and_head_can_be_grouped() -> None:
    names = list(PER_LAYER)
    items = {f"{name}.{layer}": torch.zeros(10) for name in names for layer in (0, 1, 10, 11)}
    items |= {f"{name}.{layer}.{head}": torch.zeros(10) for name in ("pattern", "head_out") for layer in (0, 10)
              for head in (0, 12)}  # fmt: skip
    items |= {f"avg_attn_pattern_L{layer}H{head}": torch.zeros(10) for layer in (0, 10) for head in (0, 12)}
    cache = ac.ActivationCache({**items, "mapping_index": {"last": [1]}})
    tree = cache.memory_tree(grouped_tree=True, print_tree=True)
    expected = {f"{name} (4 items)": "160 B" for name in names}
    for name in ("pattern", "head_out"):
        del expected[f"{name} (4 items)"]
        expected[f"{name} (8 items)"] = "320 B"
    assert tree == {**expected, "avg_attn_pattern (4 items)": "160 B", "mapping_index": {"last": ["0 B"]}}
