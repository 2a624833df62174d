"""Values with heads through a capture: patterns with two axes of positions, and [B, S, H, ...] beside them.

Reference: every prompt, or every returned sequence without its last token, run alone on the bare model with eager
attention, which returns its probabilities.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import actcache as ac
from actcache.capture.entry import hidden_of
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import Anatomy, ReadPoint
from actcache.model.sites import Site
from actcache.testing.tiny import PAD, tiny_model
from reference import relative_error

PROMPTS = [[5, 9, 100], [8, 8, 4, 200, 31], [7], [90, 91, 92, 93, 94, 95]]
SITES = ["pattern.1", "pattern.1.2", "z.1", "resid_post.1"]
ENDS = list(range(11, 31))
LAYER = 1


@pytest.fixture(scope="module", params=[("gpt2", "sdpa"), ("llama", "sdpa"), ("llama", "eager")], ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    family, attention = request.param
    found = tiny_model(family)
    found.set_attn_implementation(attention)
    return found


@functools.cache
def eager(family: str) -> Any:
    """The same model with the attention that returns its probabilities."""
    found = tiny_model(family)
    found.set_attn_implementation("eager")
    return found


def padded(prompts: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    rows = [([PAD] * (width - len(p)), p, [0] * (width - len(p)), [1] * len(p)) for p in prompts]
    ids = [fill + p if side == "left" else p + fill for fill, p, _, _ in rows]
    mask = [out + here if side == "left" else here + out for _, _, out, here in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def alone(model: Any, ids: list[int]) -> dict[str, Tensor]:
    model = eager(model.config.model_type)
    seen: list[Tensor] = []
    block = (model.transformer.h if hasattr(model, "transformer") else model.model.layers)[LAYER]
    last = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].clone()))
    out = model(torch.tensor([ids]), output_attentions=True)
    handle.remove()
    pattern = out.attentions[LAYER][0]
    assert torch.allclose(pattern.sum(-1), torch.ones(4, len(ids)), atol=1e-5)
    return {"pattern.1": pattern, "pattern.1.2": pattern[2], "z.1": seen[0].view(len(ids), 4, 8)}


def hold(cache: ac.ActivationCache, model: Any, rows: list[list[int]]) -> None:
    for key in ("pattern.1", "pattern.1.2", "z.1"):
        found = cache.rows(key)
        assert len(found) == len(rows)
        for got, ids in zip(found, rows, strict=True):
            assert relative_error(got, alone(model, ids)[key]) < 1e-5, key


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_have_no_padding_on_either_axis(model: Any, side: str) -> None:
    given = padded(PROMPTS, side)
    if side == "left":
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    cache = ac.run_with_cache(model, given, sites=SITES)[1]
    assert cache["pattern.1"].shape == (4, 4, 6, 6)
    hold(cache, model, PROMPTS)
    # Of a pattern a position is a query, with the keys as they are held.
    last = cache.get_position(LAYER, -1, "pattern")
    real = given["attention_mask"].bool()
    assert last.shape == (4, 4, 6)
    for row, ids in enumerate(PROMPTS):
        assert relative_error(last[row][:, real[row]], alone(model, ids)["pattern.1"][:, -1]) < 1e-5
    assert cache.get_position(LAYER, 0, "z").shape == (4, 4, 8)
    with pytest.raises(IndexError, match="prompt 0 has 3 tokens"):
        cache.get_position(LAYER, 3, "pattern")
    assert cache.seq_len() == 6
    assert cache.stack("pattern").shape == (1, 4, 4, 6, 6)
    picked = cache.select(prompts=[2, 0], sites=["pattern", "pattern.1.2"])
    assert list(picked) == ["pattern.1", "pattern.1.2"]
    assert [tuple(row.shape) for row in picked.rows("pattern.1")] == [(4, 1, 1), (4, 3, 3)]


@pytest.mark.parametrize("how", ["cat", "concatenate", "deferred"])
def test_batches_of_different_widths_join(model: Any, how: str) -> None:
    parts = [ac.run_with_cache(model, PROMPTS[i : i + 1], sites=SITES)[1] for i in range(4)]
    if how == "concatenate":
        both = ac.ActivationCache.concatenate(parts)
    else:
        both = ac.ActivationCache()
        if how == "deferred":
            with both.deferred_mode():
                for part in parts:
                    both.cat(part)
        else:
            for part in parts:
                both.cat(part)
    assert both["pattern.1"].shape == (4, 4, 6, 6)
    hold(both, model, PROMPTS)
    lists = ac.ActivationCache.concatenate(parts, pad=False)
    hold(lists, model, PROMPTS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_choose_queries(model: Any, side: str) -> None:
    """Heads are as many as tokens here, so that an axis taken for another would not be noticed by its size."""
    prompts = [[5, 9, 100, 4], [8, 8], [7, 7, 7]]
    given = padded(prompts, side)
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    names = {"subject": [[(0, 2)], [0], [(1, 3)]], "last": -1}
    cache = ac.run_with_cache(model, given, sites=SITES, positions=names)[1]
    assert cache["pattern.1"].shape == (3, 4, 3, 4)
    assert cache["pattern.1.2"].shape == (3, 3, 4)
    asked = [[0, 1, 3], [0, 1], [1, 2, 2]]
    for row, (ids, at) in enumerate(zip(prompts, asked, strict=True)):
        one = alone(model, ids)
        assert relative_error(cache.rows("pattern.1")[row], one["pattern.1"][:, at]) < 1e-5
        assert relative_error(cache.rows("pattern.1.2")[row], one["pattern.1.2"][at]) < 1e-5
        assert relative_error(cache.rows("z.1")[row], one["z.1"][at]) < 1e-5
    parts = cache.map_to_dict("pattern.1")
    assert parts["subject"].shape == (3, 4, 2, 4)
    assert parts["last"].shape == (3, 4, 4)
    assert cache.map_to_dict("pattern.1.2")["last"].shape == (3, 4)
    assert cache.map_to_dict("z.1")["subject"].shape == (3, 2, 4, 8)
    subject = cache.at("subject")
    both = ac.ActivationCache.concatenate([subject, subject.select(prompts=[1])])
    for row, (ids, at) in enumerate(zip([*prompts, prompts[1]], [[0, 1], [0], [1, 2], [0]], strict=True)):
        assert relative_error(both.rows("pattern.1")[row], alone(model, ids)["pattern.1"][:, at]) < 1e-5
    # Caches of other widths: queries and keys are padded each by itself.
    other = ac.run_with_cache(model, [PROMPTS[3]], sites=SITES, positions=names | {"subject": [0]})[1]
    wide = ac.ActivationCache.concatenate([cache, other, cache])
    assert wide["pattern.1"].shape == (7, 4, 3, 6)
    for row, (ids, at) in enumerate(zip([*prompts, PROMPTS[3], *prompts], [*asked, [0, 5], *asked], strict=True)):
        assert relative_error(wide.rows("pattern.1")[row], alone(model, ids)["pattern.1"][:, at]) < 1e-5
    union = wide.select(sites="pattern") | other.select(sites="z")
    assert [row.shape[-1] for row in union.rows("pattern.1")] == [4, 2, 3, 6, 4, 2, 3]


def generated(model: Any, sequences: Tensor, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    """The tokens of each returned sequence that went through the model."""
    width, per_prompt = max(map(len, prompts)), len(sequences) // len(prompts)
    found = []
    for row, sequence in enumerate(sequences.tolist()):
        made = sequence[width:]
        n_made = next((i + 1 for i, token in enumerate(made) if token in ends), len(made))
        found.append([*prompts[row // per_prompt], *made[:n_made]][:-1])
    return found


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -1.0}])
@torch.no_grad()
def test_steps_of_generation_join_along_queries(model: Any, use_cache: bool, options: dict[str, Any]) -> None:
    ends = ENDS if options else []
    with ac.capture(model, sites=SITES) as cache:
        sequences = model.generate(
            **padded(PROMPTS, "left"), max_new_tokens=7, do_sample=False, use_cache=use_cache, pad_token_id=PAD,
            eos_token_id=ends or None, **options,
        )  # fmt: skip
    steps = sequences.shape[1] - 1
    assert cache["pattern.1"].shape == (len(sequences), 4, steps, steps)
    assert cache["pattern.1.2"].shape == (len(sequences), steps, steps)
    assert cache["z.1"].shape == (len(sequences), steps, 4, 8)
    rows = generated(model, sequences, PROMPTS, ends)
    hold(cache, model, rows)
    if options:
        assert len({len(row) for row in rows}) > 3
    # What comes later is no key, and zero.
    assert not cache["pattern.1"].triu(1)[cache.attention_mask[:, None].expand(-1, 4, -1)].any()


@torch.no_grad()
def test_generation_keeps_the_queries_that_were_asked_for(model: Any) -> None:
    with ac.capture(model, sites=SITES, positions={"last": -1}) as cache:
        sequences = model.generate(**padded(PROMPTS, "left"), max_new_tokens=5, do_sample=False, pad_token_id=PAD)
    assert cache["pattern.1"].shape == (4, 4, 5, 10)
    for row, ids in enumerate(generated(model, sequences, PROMPTS, [])):
        assert relative_error(cache.rows("pattern.1")[row], alone(model, ids)["pattern.1"][:, -5:]) < 1e-5
        assert relative_error(cache.rows("z.1")[row], alone(model, ids)["z.1"][-5:]) < 1e-5
    assert cache.map_to_dict("pattern.1")["last"].shape == (4, 4, 5, 10)


@torch.no_grad()
def test_what_follows_the_end_of_a_row_is_neither_query_nor_key(model: Any) -> None:
    for positions in ("all", "last"):
        with ac.capture(model, sites=SITES, positions=positions) as cache:
            sequences = model.generate(
                **padded(PROMPTS, "left"), max_new_tokens=12, do_sample=True, pad_token_id=PAD, eos_token_id=ENDS,
                num_return_sequences=3,
            )  # fmt: skip
        rows = generated(model, sequences, [p for p in PROMPTS for _ in range(3)], ENDS)
        for row, ids in enumerate(rows):
            # A row's own end was fed once more when others went on.
            got, prompt = cache.rows("pattern.1")[row], len(PROMPTS[row // 3])
            reference = alone(model, ids)["pattern.1"]
            n = len(ids) if positions == "all" else len(ids) - prompt + 1
            assert n <= got.shape[1] <= n + 1
            assert got.shape[2] == got.shape[1] + (0 if positions == "all" else prompt - 1)
            assert relative_error(got[:, :n, : len(ids)], reference[:, -n:]) < 1e-5


@pytest.mark.parametrize("room", [10, 20])
@torch.no_grad()
def test_a_cache_of_fixed_size_has_no_keys_behind_the_end(model: Any, room: int) -> None:
    fixed = StaticCache(config=model.config, max_cache_len=room)
    with ac.capture(model, sites=SITES) as cache:
        sequences = model.generate(
            **padded(PROMPTS, "left"), max_new_tokens=5, do_sample=False, pad_token_id=PAD, past_key_values=fixed
        )
    assert cache["pattern.1"].shape == (4, 4, 10, 10)
    hold(cache, model, generated(model, sequences, PROMPTS, []))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_sliding_windows_keep_the_place_of_their_keys(kind: str) -> None:
    """The cache of a sliding window no longer has the first positions: its first key is another one every step."""
    windowed = tiny_model("mistral")
    prompts = [list(range(40, 50)), [9, 8, 7, 6]]
    with ac.capture(windowed, sites=SITES) as cache:
        sequences = windowed.generate(
            **padded(prompts, "left"), max_new_tokens=9, do_sample=False, pad_token_id=PAD, cache_implementation=kind
        )
    assert cache["pattern.1"].shape == (2, 4, 18, 18)
    hold(cache, windowed, generated(windowed, sequences, prompts, []))


@torch.no_grad()
def test_keys_in_another_order_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Anatomy.points

    def turned(read: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        # As a ring buffer would hold them: one key too many, and the newest at the front.
        return lambda out: torch.nn.functional.pad(read(out), (0, 1)).roll(1, -1)

    def points(self: Anatomy, sites: Any, layers: Any = None) -> dict[Site, ReadPoint]:
        found = before(self, sites, layers)
        return {s: replace(p, extract=turned(p.extract)) if s.name == "pattern" else p for s, p in found.items()}

    monkeypatch.setattr(Anatomy, "points", points)
    with ac.capture(model, sites=SITES) as cache:
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(SiteUnavailableError, match=r"'pattern\.1' cannot be joined.*another order"):
        cache["pattern.1"]
    assert cache["z.1"].shape == (1, 3, 4, 8)


@torch.no_grad()
def test_a_pass_behind_an_earlier_one_has_its_keys(model: Any) -> None:
    given = padded(PROMPTS, "left")
    at = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(given["input_ids"][:, :4], attention_mask=given["attention_mask"][:, :4], position_ids=at[:, :4])
    rest = {"position_ids": at[:, 4:], "past_key_values": out.past_key_values}
    with ac.capture(model, sites=SITES) as cache:
        model(given["input_ids"][:, 4:], attention_mask=given["attention_mask"], **rest)
    assert cache["pattern.1"].shape == (4, 4, 2, 6)
    for row, ids in enumerate(PROMPTS):
        reference = alone(model, ids)["pattern.1"][:, -2:]
        assert relative_error(cache.rows("pattern.1")[row], reference) < 1e-5
    assert hidden_of(cache["resid_post.1"]).shape == (4, 2, 32)


def test_what_a_cache_goes_through(model: Any, tmp_path: Path) -> None:
    """Files, pickles and copies, moving, sizes: values with heads are values like others, and keep their keys' mask."""
    names = {"subject": [[(0, 2)], [0], [0], [(1, 3)]], "last": -1}
    cache = ac.run_with_cache(model, PROMPTS, sites=SITES, positions=names)[1]
    joined = ac.ActivationCache.concatenate([cache, ac.ActivationCache(dict(cache))])
    joined.save(tmp_path / "c")
    cache.save(tmp_path / "named")
    for twin in (ac.ActivationCache.load(tmp_path / "c"), pickle.loads(pickle.dumps(joined)), copy.deepcopy(joined)):
        assert twin == joined
        for key in joined:
            for got, expected in zip(twin.rows(key), joined.rows(key), strict=True):
                assert torch.equal(got, expected)
    loaded = ac.ActivationCache.load(tmp_path / "named")
    assert torch.equal(loaded.map_to_dict("pattern.1")["subject"], cache.map_to_dict("pattern.1")["subject"])
    assert [row.shape for row in loaded.at("last").rows("pattern.1")] == [(4, 1, n) for n in (3, 5, 1, 6)]
    assert loaded.to(torch.float64)["pattern.1"].dtype == loaded["z.1"].dtype == torch.float64
    assert [row.shape for row in loaded.rows("pattern.1")] == [row.shape for row in cache.rows("pattern.1")]
    assert cache.memory_tree()["pattern.1"] == "1.15 KB"
    assert cache.nbytes == sum(value.nbytes for value in cache.values())


def test_layers_and_heads_are_folded() -> None:
    items = {f"pattern.{layer}": torch.zeros(2, 4, 6, 6) for layer in range(12)}
    items |= {f"head_out.{layer}.{head}": torch.zeros(2, 6, 32) for layer in range(3) for head in range(4)}
    items |= {f"q.{layer}": torch.zeros(2, 6, 4, 8) for layer in (0, 5)}
    cache = ac.ActivationCache(items)
    assert cache.memory_tree(grouped_tree=True) == {
        "pattern (12 items)": "13.82 KB", "head_out (12 items)": "18.43 KB", "q (2 items)": "3.07 KB",
    }  # fmt: skip
    lines = repr(cache).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["pattern.0-11", "head_out.0-2.0-3", "q.0..5"]
    assert all(len(line) <= 80 for line in lines)
    assert "float32[2, 4, 6, 6]" in lines[1]
    assert cache._repr_html_().count("<tr>") == 4


def test_one_head_is_a_view_of_all(model: Any) -> None:
    parts = [ac.run_with_cache(model, PROMPTS[i : i + 2], sites=SITES)[1] for i in (0, 2)]
    for cache in (parts[0], ac.ActivationCache.concatenate(parts), ac.ActivationCache.concatenate(parts, pad=False)):
        for name in ("pattern.1.3", "pattern_L1H3", "pattern.-3.3"):
            assert name in cache
            for got, whole in zip(cache.rows(name), cache.rows("pattern.1"), strict=True):
                assert torch.equal(got, whole[3])
        assert list(cache) == list(parts[0])
        assert "pattern.1.4" not in cache and "pattern.0.1" not in cache and "z.1.1" not in cache
        with pytest.raises(KeyError, match=r"'pattern\.1\.4' is not in the cache"):
            cache["pattern.1.4"]
        with pytest.raises(KeyError):
            del cache["pattern.1.3"]
    assert parts[0]["pattern.1.3"].data_ptr() == parts[0]["pattern.1"][:, 3].data_ptr()
    mine = ac.ActivationCache({"blocks.0.attn.hook_result": torch.arange(24.0).view(1, 2, 3, 4)})
    assert mine["head_out_L0H1"].tolist() == [[[4, 5, 6, 7], [16, 17, 18, 19]]]
    # Masks of their own: by the mask of all heads.
    bare = ac.ActivationCache.concatenate([ac.ActivationCache(dict(part)) for part in parts])
    assert [row.shape for row in bare.rows("pattern.1.0")] == [(5, 5), (5, 5), (6, 6), (6, 6)]
