"""What an extraction of activations must get right, as users of other libraries know it, and what those get wrong.

| behaviour | where it is held |
|---|---|
| parts of a prompt: shapes and values of every kind of site | `TestParts`, here |
| groups of positions averaged, over tokens and over examples | `test_averages_of_groups`; test_averages.py |
| projections and heads: shapes, grouped keys and values, sums | `TestHeads`, here; every architecture in test_zoo.py |
| parts that add up to wholes, norms behind branches included | `test_parts_add_up`, here; test_zoo.py |
| stored ids are the prompt's | `TestParts`, here; test_extract_batches.py |
| patterns, their blocks, means of patterns | test_attention_blocks.py; test_averages.py |
| loaders: generators, batch sizes, lengths, padding | test_extract_batches.py; `test_loader...`, here |
| extra fields of a loader's batches | test_extract_batches_columns.py |
| gradient of one logit | `test_gradient_of_a_logit`, here; test_capture_sites.py |
| "last" under padding, spans to the end, duplicates, one token, none | `TestPositions`, here; test_positions.py |
| an exception in a pass leaves nothing behind | `test_after_an_exception`, here; test_capture_lifetime.py |
| attention only, recurrent by steps, a recurrent state | test_extraction_cases_models.py; test_capture.py |
| everything captured; nothing changed by it | `test_everything_and_nothing`, here; test_capture.py |
| attention from and to a token, and what it attends to most | `TestAttentionOfAToken`, here |
| edges of attention cut; scaled or set, and renormalised | test_knockout.py; test_attention_steering.py |
| columns at 0, projections and heads replaced, seen by captures | test_head_edits.py |
| features of a vector, sorted; the wrong place or width refused; put back at one position | test_encode.py |
| predictions of each layer, the first that has a token | `test_a_lens...`, here; test_analysis_lens.py |
| characters of a text and their tokens | test_text_positions.py; of a chat test_tokens_of.py |
| positions of images and of text, sites of models that read images | test_media_positions.py; test_media.py |
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import zoo
from actcache.errors import ActCacheError, LayerRangeError, OptionError
from actcache.testing.tiny import tiny_model
from extract_batches_helpers import close

IDS = [101, 102, 103, 104, 105, 106]
S, D, VOCABULARY = len(IDS), 32, 259
FIRST, SECOND = (0, 4), (4, S)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


class TestParts:
    SITES = ("resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_out")

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
    def test_of_a_prompt(self, family: str) -> None:
        model = tiny_model(family)
        named = {"first": FIRST, "second": SECOND}
        cache = ac.extract_batches(model, [[IDS]], sites=self.SITES, positions=named)
        for site in (f"{name}.{layer}" for name in self.SITES for layer in range(4)):
            parts = cache.map_to_dict(site)
            assert parts["first"].shape == (1, 4, D)
            assert parts["second"].shape == (1, S - 4, D)
            if not site.startswith("attn_in"):
                whole = zoo.reference(family, 0, tuple(IDS))[site]
                assert zoo.relative_error(parts["first"][0], whole[:4]) < 2e-6
                assert zoo.relative_error(parts["second"][0], whole[4:]) < 2e-6
        assert cache.input_ids.tolist() == [IDS]
        span = ac.extract_batches(model, [[IDS]], sites=["resid_post.1"], positions=(0, 4))
        assert torch.equal(span["resid_post.1"], cache.map_to_dict("resid_post.1")["first"])

    def test_under_the_names_of_others(self, llama: Any) -> None:
        cache = ac.run_with_cache(llama, IDS, sites=["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])[1]
        for theirs, ours in (
            ("resid_in_1", "resid_pre.1"),
            ("resid_mid_1", "resid_mid.1"),
            ("resid_out_1", "resid_post.1"),
            ("attn_out_1", "attn_out.1"),
            ("mlp_out_1", "mlp_out.1"),
        ):
            assert cache[theirs] is cache[ours]


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-350m", "gptj"])
def test_parts_add_up(family: str) -> None:
    """In the middle of a block is the stream, not what the next norm makes of it; and with norms behind the branches
    what is added is what comes out of them."""
    form = {"opt-350m": "post", "gptj": "parallel"}.get(family, "pre")
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post", *(["resid_mid"] if form != "parallel" else [])]
    cache = ac.extract_batches(tiny_model(family), [[IDS, IDS[:3]]], sites=names)
    for layer in range(4):
        pre, attention, mlp, post = (cache[f"{name}.{layer}"] for name in names[:4])
        if form == "pre":
            close(cache[f"resid_mid.{layer}"], pre + attention)
            close(post, cache[f"resid_mid.{layer}"] + mlp)
        elif form == "parallel":
            close(post, pre + attention + mlp)
        else:
            block = tiny_model(family).model.decoder.layers[layer]
            close(cache[f"resid_mid.{layer}"], block.self_attn_layer_norm(pre + attention).detach())
            close(post, block.final_layer_norm(cache[f"resid_mid.{layer}"] + mlp).detach())


def test_averages_of_groups(llama: Any) -> None:
    """Two groups of tokens, one column each: of every prompt, and over examples."""
    groups = {"a": (0, 4), "b": [4, 5]}
    cache = ac.extract_batches(llama, [[IDS]], sites=["resid_post.1"], positions=groups)
    parts = cache.map_to_dict("resid_post.1")
    averages = torch.stack([part.mean(1) for part in parts.values()], 1)
    whole = zoo.reference("llama", 0, tuple(IDS))["resid_post.1"]
    assert averages.shape == (1, 2, D)
    close(averages[0], torch.stack([whole[:4].mean(0), whole[4:].mean(0)]))
    # Of no fixed number, a group is averaged first, so that there is one value for it.
    listed = {name: [[*range(*group)] if isinstance(group, tuple) else group] for name, group in groups.items()}
    means = ac.extract_batches(llama, [[IDS], [IDS]], sites=["resid_post.1"], positions=listed, reduce="mean")
    close(torch.stack(list(means["resid_post.1"].values())), averages[0])
    # What is averaged is all that is there: no column of what was not.
    assert list(means) == ["resid_post.1"]


def test_loader_of_two_batches_at_the_last_token(gpt2: Any) -> None:
    """Logits, statistics of the final norm, the map of positions, and a field of the loader's own."""
    batches = [
        {"input_ids": torch.tensor([IDS]), "name": ["one"]},
        {"input_ids": torch.tensor([IDS[:4]]), "name": ["two"]},
    ]
    cache = ac.extract_batches(
        gpt2, iter(batches), sites=["logits", "resid_post.0", "resid_post.3"], positions={"last": -1}, columns=["name"]
    )
    assert cache["logits"].shape == (2, 1, VOCABULARY)
    assert cache["resid_out_0"].shape == (2, 1, D)
    assert cache.columns["name"] == ["one", "two"]
    with torch.no_grad():
        expected = torch.stack([gpt2(torch.tensor([ids])).logits[0, -1] for ids in (IDS, IDS[:4])])
    close(cache.map_to_dict("logits")["last"], expected)
    # What the final norm is given is there, so that its statistics are.
    given = cache.map_to_dict("resid_post.3")["last"]
    with ac.capture(gpt2, "transformer.ln_f", include_inputs=True) as norm:
        gpt2(torch.tensor([IDS]))
    close(given[0].mean(), norm["transformer.ln_f"].input[0, -1].mean())
    close(given[0].var(unbiased=False), norm["transformer.ln_f"].input[0, -1].var(unbiased=False))
    cache["last_layernorm"] = {"mean": given.mean(-1), "variance": given.var(-1)}
    assert ac.ActivationCache.concatenate([cache, cache])["last_layernorm"]["mean"].shape == (4,)


def test_gradient_of_a_logit(gpt2: Any) -> None:
    output, cache = ac.run_with_cache(gpt2, IDS, sites=["embed"], detach=False, copy=False)
    (gradient,) = torch.autograd.grad(output.logits[0, -1, 42], cache["embed"])
    assert gradient.shape == cache["embed"].shape == (1, S, D)
    # Held against a step in a direction.
    direction = torch.randn(1, S, D, generator=torch.Generator().manual_seed(0)).double()
    double = tiny_model("gpt2").double()
    with torch.no_grad():
        logits = []
        for sign in (1, -1):
            with ac.edit(double, {"embed": lambda x, sign=sign: x + sign * 1e-5 * direction}):
                logits.append(double(torch.tensor([IDS])).logits[0, -1, 42])
    slope = (logits[0] - logits[1]) / 2e-5
    torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=1e-3, atol=1e-5)


def test_a_lens_of_what_was_saved(gpt2: Any, tmp_path: Any) -> None:
    """The scale of the final norm is that of the pass that was saved, and the layers are the model's."""
    live = ac.extract_batches(gpt2, [[IDS, IDS[:4]]], sites="resid_post", positions="last")
    kept = ac.ActivationCache.load(live.save(tmp_path))
    lens = kept.logit_lens(model=gpt2, layers=[1, 3], recompute_ln=False, top_k=3)
    with torch.no_grad():
        for row, ids in enumerate((IDS, IDS[:4])):
            output = gpt2(torch.tensor([ids]), output_hidden_states=True)
            close(lens.logits(3)[row, 0], output.logits[0, -1])
            # Behind the last block, before the norm.
            with ac.capture(gpt2, "transformer.ln_f", include_inputs=True) as norm:
                gpt2(torch.tensor([ids]))
            last, early = norm["transformer.ln_f"].input[0, -1], output.hidden_states[2][0, -1]
            scaled = (early - early.mean()) / (last.var(unbiased=False) + gpt2.transformer.ln_f.eps).sqrt()
            expected = gpt2.lm_head(scaled * gpt2.transformer.ln_f.weight + gpt2.transformer.ln_f.bias)
            close(lens.logits(1)[row, 0], expected)
            best = int(output.logits[0, -1].argmax())
            in_both = best in expected.topk(3).indices
            assert lens.first_layer(best, 3)[row].tolist() == [1 if in_both else 3]
    assert lens.logits(1).shape == (2, 1, VOCABULARY)
    with pytest.raises(OptionError, match="give it as model="):
        kept.logit_lens()


class TestHeads:
    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_projections_and_heads(self, family: str) -> None:
        model = tiny_model(family)
        names = ["attn_in", "q", "k", "v", "z", "head_out", "pattern", "attn_out"]
        cache = ac.extract_batches(model, [[IDS]], sites=names)
        heads, groups, size = 4, 4 if family == "gpt2" else 2, 8
        for layer in range(4):
            given, q, k, v, z, out, pattern, whole = (cache[f"{name}.{layer}"] for name in names)
            assert q.shape == z.shape == (1, S, heads, size)
            assert k.shape == v.shape == (1, S, groups, size)
            assert out.shape == (1, S, heads, D)
            assert pattern.shape == (1, heads, S, S)
            attention: Any = (
                model.transformer.h[layer].attn if family == "gpt2" else model.model.layers[layer].self_attn
            )
            with torch.no_grad():
                if family == "gpt2":
                    made = attention.c_attn(given).split(D, -1)
                    weight, bias = attention.c_proj.weight, attention.c_proj.bias
                else:
                    made = attention.q_proj(given), attention.k_proj(given), attention.v_proj(given)
                    weight, bias = attention.o_proj.weight.T, torch.zeros(D)
            for found, by_hand in zip((q, k, v), made, strict=True):
                close(found.flatten(2), by_hand)
            for head in range(heads):
                # A head of queries uses the keys and values of its group.
                close(z[0, :, head], pattern[0, head] @ v[0, :, head * groups // heads])
                close(out[0, :, head], z[0, :, head] @ weight[head * size : (head + 1) * size].detach())
            close(out.sum(2) + bias.detach(), whole)

    def test_at_named_positions(self, llama: Any) -> None:
        groups = {"a": FIRST, "b": SECOND}
        cache = ac.extract_batches(llama, [[IDS]], sites=["q", "k", "head_out.1.2"], positions=groups)
        whole = ac.run_with_cache(llama, IDS, sites=["q", "k", "head_out"])[1]
        for key, expected in (
            ("q.1", whole["q.1"]),
            ("k.1", whole["k.1"]),
            ("head_out.1.2", whole["head_out.1"][:, :, 2]),
        ):
            parts = cache.map_to_dict(key)
            assert parts["a"].shape == (1, 4, *expected.shape[2:])
            close(parts["a"], expected[:, :4])
            close(parts["b"], expected[:, 4:])
        one_head = torch.stack([part[:, :, 3].mean(1) for part in cache.map_to_dict("q.1").values()], 1)
        assert one_head.shape == (1, 2, 8)

    def test_means_over_examples(self, llama: Any) -> None:
        prompts = [IDS, IDS[:3], [7, 8, 9, 10]]
        means = ac.extract_batches(
            llama, [prompts[:2], prompts[2:]], sites=["z.2", "k.2"], positions="last", reduce="mean"
        )
        singly = [ac.run_with_cache(llama, ids, sites=["z.2", "k.2"])[1] for ids in prompts]
        assert means["z.2"].shape == (4, 8)
        assert means["k.2"].shape == (2, 8)
        close(means["z.2"], torch.stack([one["z.2"][0, -1] for one in singly]).mean(0))


class TestPositions:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_last_is_the_last_real_token(self, llama: Any, side: str) -> None:
        ids, mask = torch.zeros(2, S + 2, dtype=torch.long), torch.zeros(2, S + 2, dtype=torch.long)
        for row, length in enumerate((S, 3)):
            at = slice(length) if side == "right" else slice(S + 2 - length, None)
            ids[row, at], mask[row, at] = torch.tensor(IDS[:length]), 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        expected = [zoo.reference("llama", 0, tuple(IDS[:n]))["resid_post.2"][-1] for n in (S, 3)]
        for cache in (
            ac.extract_batches(llama, [inputs], sites="resid_post.2", positions="last"),
            ac.run_with_cache(llama, inputs, sites="resid_post.2", positions="last")[1],
        ):
            close(cache["resid_post.2"][:, 0], torch.stack(expected))

    @pytest.mark.parametrize(
        ("positions", "kept"),
        [
            ((0, S), [0, 1, 2, 3, 4, 5]),
            (-S, [0]),
            ((-S, -1), [0, 1, 2, 3, 4]),
            ((-2, S), [4, 5]),
            ((2, -1), [2, 3, 4]),
            (["last", "last"], [5, 5]),
            ([0, (0, 2), -S], [0, 0, 1, 0]),
        ],
    )
    def test_valid(self, llama: Any, positions: Any, kept: list[int]) -> None:
        whole = zoo.reference("llama", 0, tuple(IDS))["resid_post.0"]
        cache = ac.extract_batches(llama, [[IDS]], sites="resid_post.0", positions=positions)
        close(cache["resid_post.0"][0], whole[kept])
        named = ac.extract_batches(llama, [[IDS]], sites="resid_post.0", positions={"a": positions, "b": positions})
        for part in named.map_to_dict("resid_post.0").values():
            close(part.reshape(-1, D), whole[kept])

    @pytest.mark.parametrize("positions", ["last", "first", 0, -1, (0, 1), "all", [0, 0]])
    def test_one_token(self, llama: Any, positions: Any) -> None:
        cache = ac.extract_batches(llama, [[[101]]], sites="resid_post.0", positions=positions)
        close(cache["resid_post.0"][0, 0], zoo.reference("llama", 0, (101,))["resid_post.0"][0])

    @pytest.mark.parametrize(
        ("positions", "error"),
        [
            ((0, -S), LayerRangeError),
            ((3, 3), LayerRangeError),
            ((5, 2), LayerRangeError),
            ((0, S + 1), LayerRangeError),
            (S, LayerRangeError),
            (-S - 1, LayerRangeError),
            ([], OptionError),
            ([[]], OptionError),
            ({"nothing": []}, OptionError),
            ({"nothing": (2, 2)}, LayerRangeError),
        ],
    )
    def test_nothing_and_outside(self, llama: Any, positions: Any, error: type[ActCacheError]) -> None:
        with pytest.raises(error):
            ac.extract_batches(llama, [[IDS]], sites="resid_post.0", positions=positions)


def test_after_an_exception(gpt2: Any) -> None:
    """Time after time, and the next call is as if nothing had been."""
    before = ac.extract_batches(gpt2, [[IDS]], sites="resid_post")
    state = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), list(m.__dict__)) for m in gpt2.modules()]
    for _ in range(3):
        with pytest.raises(LayerRangeError, match="batch 1"):
            ac.extract_batches(gpt2, [[IDS], [IDS[:2]]], sites="resid_post", positions=3)
        with ac.edit(gpt2, {"mlp_out.1": _fail}), pytest.raises(RuntimeError, match="on purpose"):
            ac.extract_batches(gpt2, [[IDS]], sites="resid_post")
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks), list(m.__dict__)) for m in gpt2.modules()] == state
    assert ac.extract_batches(gpt2, [[IDS]], sites="resid_post") == before


def _fail(value: Tensor) -> Tensor:
    raise RuntimeError("on purpose")


def test_everything_and_nothing(gpt2: Any) -> None:
    with torch.no_grad():
        plain = gpt2(torch.tensor([IDS])).logits
    output, cache = ac.run_with_cache(gpt2, IDS)
    assert {"", "transformer.wte", "transformer.ln_f", "transformer.h.0.attn", "lm_head"} <= set(cache)
    assert torch.equal(cache["lm_head"].output, output.logits)
    sites = [str(info.site) for info in ac.sites(gpt2)]
    output, cache = ac.run_with_cache(gpt2, IDS, sites=sites)
    assert {"embed", "pattern.0", "final_norm", "logits"} <= set(cache)
    assert list(cache) == sites
    assert cache["logits"].shape == (1, S, VOCABULARY)
    close(output.logits, plain)
    # An edit of nothing is refused, and leaves the output as it is.
    with pytest.raises(OptionError, match="edits is empty"):
        ac.extract_batches(gpt2, [[IDS]], sites="logits", edits=[])
    with torch.no_grad():
        assert torch.equal(gpt2(torch.tensor([IDS])).logits, plain)


def stand_in(*heads: Any) -> ac.ActivationCache:
    return ac.ActivationCache({"pattern.0": torch.tensor([heads])})


class TestAttentionOfAToken:
    """From a token, to a token, and what it attends to most: one line each."""

    CACHE = stand_in(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]],
        [[0.25] * 4] * 4,
    )

    def test_from_and_to(self) -> None:
        from_first = self.CACHE.get_position(0, 0, site="pattern").mean(1)
        torch.testing.assert_close(from_first, torch.tensor([[0.475, 0.175, 0.175, 0.175]]))
        to_first = self.CACHE.rows("pattern.0")[0].mean(0)[:, 0]
        torch.testing.assert_close(to_first, torch.tensor([0.475, 0.175, 0.325, 0.175]))

    def test_most(self) -> None:
        row = self.CACHE.get_position(0, 2, site="pattern").mean(1)[0]
        assert row.sort(descending=True).indices[:2].tolist() == [0, 1]
        # More than there are gives all of them.
        assert row.sort(descending=True).indices[:9].tolist() == [0, 1, 2, 3]

    def test_outside(self) -> None:
        with pytest.raises(LayerRangeError, match="position 4 of layer 0 is out of range"):
            self.CACHE.get_position(0, 4, site="pattern")
        with pytest.raises(LayerRangeError, match="layer 1 of pattern is not in the cache"):
            self.CACHE.get_position(1, 0, site="pattern")
        with pytest.raises(IndexError):
            self.CACHE.rows("pattern.0")[0].mean(0)[:, 4]
