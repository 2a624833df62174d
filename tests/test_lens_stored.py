"""A lens of what is stored: without the model, completed where something is missing, refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["one two", "b", "Some longer text."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.saved("gemma2", tmp_path_factory.mktemp("model"))


def cache_of(folder: Path, store: Path, **options: Any) -> ac.UnifiedCache:
    return ac.UnifiedCache(folder, store=store, **{"cache_pooled": False, "compute_perplexity": False, **options})


def test_stored_and_captured_streams_give_the_same(folder: Path, tmp_path: Path) -> None:
    cache_of(folder, tmp_path).warmup(PROMPTS)
    cold = cache_of(folder, tmp_path)
    stored = cold.logit_lens(PROMPTS, 3, tokens=["o"])
    ranks, logits = stored.rank("e"), stored.logits(1)
    assert not cold.model_loaded
    _, held = ac.run_with_cache(cold.model, PROMPTS, sites="resid_post", tokenizer=cold.tokenizer)
    captured = held.logit_lens(top_k=3, tokens=["o"], tokenizer=cold.tokenizer)
    assert torch.equal(stored.mask, captured.mask)
    assert torch.equal(stored.input_ids, captured.input_ids)
    assert torch.equal(stored.positions, captured.positions)
    for name in ("probabilities", "chosen_probabilities", "entropy", "kl"):
        mine, theirs = (getattr(lens, name)[:, stored.mask] for lens in (stored, captured))
        assert zoo.relative_error(mine, theirs) < 1e-5
    assert zoo.relative_error(logits, captured.logits(1)) < 1e-5
    agree = (ranks == captured.rank("e")).float().mean()
    assert float(agree) > 0.95
    assert stored.table(2, 5).splitlines()[0] == "prompt 2, position 5, behind ' '"


def test_what_is_missing_is_computed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(folder, tmp_path)
    with monkeypatch.context() as patched:
        # The model that is loaded for it has the head.
        patched.setattr("actcache.model.head_files.load_head", None)
        first = cache.logit_lens(PROMPTS[0], layers=[1])
    assert first.layers == [1]
    assert cache.model_loaded
    # Just the layer that was asked for, and the last.
    plan = cache_of(folder, tmp_path, layers=[1, 3]).plan(PROMPTS[0])
    assert (plan.cached, plan.missing) == (1, 0)
    assert cache_of(folder, tmp_path).plan(PROMPTS[0]).missing == 1
    lens = cache.logit_lens(PROMPTS)
    assert torch.equal(lens.kl[1, 0, :8], first.kl[0, 0])
    # Forgotten meanwhile: what is asked of the lens later is computed again.
    before = lens.logits(2)
    ac.set_cache_backend(str(tmp_path))
    cache.store.clear()
    assert zoo.relative_error(lens.logits(2), before) < 1e-6


@pytest.mark.parametrize("stored_as", [{"cache_pooled": True}, {"cache_pooled": False}])
@pytest.mark.parametrize("read_as", [{"cache_pooled": True}, {"cache_pooled": False}])
def test_the_last_token_in_either_form(
    folder: Path, tmp_path: Path, stored_as: dict[str, Any], read_as: dict[str, Any]
) -> None:
    cache_of(folder, tmp_path, **stored_as).warmup(PROMPTS)
    cold = cache_of(folder, tmp_path, **read_as)
    last = cold.logit_lens(PROMPTS, 3, positions="last")
    assert not cold.model_loaded
    assert last.tokens.shape == (4, 3, 1, 3)
    whole = cache_of(folder, tmp_path / "whole").logit_lens(PROMPTS, 3)
    for i, text in enumerate(PROMPTS):
        end = len(text)
        assert last.positions[i].tolist() == [end]
        assert last.input_ids[i, 0] == whole.input_ids[i, end]
        assert zoo.relative_error(last.kl[:, i, 0], whole.kl[:, i, end]) < 1e-5
        assert torch.equal(last.tokens[:, i, 0, 0], whole.tokens[:, i, end, 0])
    if read_as["cache_pooled"]:
        assert torch.equal(cold.logit_lens(PROMPTS, 3).kl, last.kl)


def test_positions(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path)
    whole = cache.logit_lens(PROMPTS)
    some = cache.logit_lens(PROMPTS, positions=[(0, 2), -1])
    assert some.positions.tolist() == [[0, 1, 7], [0, 1, 1], [0, 1, 17]]
    assert torch.equal(some.entropy[:, 2, 2], whole.entropy[:, 2, 17])
    each = cache.logit_lens(PROMPTS, positions=[[3, 4], [0], [-2]])
    assert each.positions.tolist() == [[3, 4], [0, -1], [16, -1]]
    assert each.mask.tolist() == [[True, True], [True, False], [True, False]]
    assert torch.equal(each.tokens[:, 0, 1], whole.tokens[:, 0, 4])
    with pytest.raises(errors.LayerRangeError, match="position 4 is out of range: the prompt has 2 tokens"):
        cache.logit_lens(PROMPTS, positions=4)
    with pytest.raises(errors.OptionError, match="unknown position 'lst'"):
        cache.logit_lens(PROMPTS, positions="lst")


def test_completions_have_lenses(folder: Path, tmp_path: Path) -> None:
    cache = cache_of(folder, tmp_path, generate={"max_new_tokens": 3})
    lens = cache.logit_lens(PROMPTS[:2], positions="completion")
    said = cache.get_completions(PROMPTS[:2])
    for i, one in enumerate(said):
        start, stop = one.completion_span
        assert lens.positions[i][lens.mask[i]].tolist() == list(range(start, stop))
    # Greedy: the last layer's best token at one position is the next one.
    text = cache.logit_lens(PROMPTS[:2])
    for i, one in enumerate(said):
        start, stop = one.completion_span
        assert text.tokens[-1, i, start - 1 : stop - 1, 0].tolist() == text.input_ids[i, start:stop].tolist()


def test_other_sites_and_stacks(tmp_path: Path) -> None:
    model = zoo.model_of("t5")
    ids = [[5, 9, 30, 7], [8, 3]]
    cache = ac.UnifiedCache(
        model,
        tokenizer=tiny_tokenizer(),
        sites=["encoder.resid_post", "decoder.resid_post"],
        cache_pooled=False,
        store=tmp_path,
    )
    lens = cache.logit_lens(ids, 2)
    assert lens.site == "decoder.resid_post"
    for i, prompt in enumerate(ids):
        logits = zoo.reference("t5", 0, tuple(prompt))["logits"].double()
        best = logits.softmax(-1).topk(2).values
        assert float((lens.probabilities[-1, i, : len(prompt)] - best).abs().max()) < 1e-5
    with pytest.raises(errors.OptionError, match=r"computed from the decoder, write 'decoder\.resid_post'"):
        cache.logit_lens(ids, site="encoder.resid_post")
    both = ac.UnifiedCache(
        zoo.model_of("gpt2"), sites=["resid_pre", "resid_post"], cache_pooled=False, store=tmp_path / "two"
    )
    before, after = both.logit_lens(ids, site="resid_pre"), both.logit_lens(ids)
    assert torch.equal(before.kl[1:][:, before.mask], after.kl[:-1][:, after.mask])
    with pytest.raises(errors.OptionError, match=r"reads 'resid_mid', which is not among this cache's sites"):
        both.logit_lens(ids, site="resid_mid")
    with pytest.raises(errors.OptionError, match="unknown site of the residual stream 'attn_out'"):
        both.logit_lens(ids, site="attn_out")
    with pytest.raises(errors.OptionError, match=r"write site='resid_post' and layers=\[1\]"):
        both.logit_lens(ids, site="resid_post.1")


def test_an_encoder_decoder_that_is_not_loaded(tmp_path: Path) -> None:
    """Its head is not read by itself, so the model is loaded for it."""
    zoo.model_of("t5").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"sites": "decoder.resid_post", "cache_pooled": False, "store": tmp_path / "store"}
    first = ac.UnifiedCache(tmp_path / "model", **options).logit_lens("ab")
    again = ac.UnifiedCache(tmp_path / "model", **options).logit_lens("ab")
    assert torch.equal(first.kl, again.kl)


def test_what_a_cache_does_not_keep_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match=r"follows from 'resid_post\.3'.*add the last layer to layers= \(-1\)"):
        cache_of(folder, tmp_path, layers=[0, 1]).logit_lens(PROMPTS)
    with pytest.raises(errors.OptionError, match=r"layers=\[2\] asks for 'resid_post\.2'"):
        cache_of(folder, tmp_path, layers=[0, 3]).logit_lens(PROMPTS, layers=[2])
    with pytest.raises(errors.LayerRangeError):
        cache_of(folder, tmp_path).logit_lens(PROMPTS, layers=[9])
    with pytest.raises(errors.OptionError, match="pooled as 'mean', which no token's prediction follows from"):
        cache_of(folder, tmp_path, cache_pooled=True, pooling="mean").logit_lens(PROMPTS, positions="last")
    pooled = cache_of(folder, tmp_path, cache_pooled=True)
    with pytest.raises(errors.OptionError, match="positions='all' needs full sequences"):
        pooled.logit_lens(PROMPTS, positions="all")
    for top_k in (0, 260, True):
        with pytest.raises(errors.OptionError, match=rf"top_k is {top_k}: expected 1 to 259"):
            pooled.logit_lens(PROMPTS, top_k)
    # Nothing was computed for a question that has no answer.
    assert not list(tmp_path.rglob("*.safetensors"))


def test_models_without_logits_are_refused_by_name(tmp_path: Path) -> None:
    backbone = zoo.model_of("gpt2").transformer
    cache = ac.UnifiedCache(backbone, tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    with pytest.raises(errors.SiteUnavailableError, match="GPT2Model gives no logits"):
        cache.logit_lens([[5, 6]])


def test_edits_count_and_those_behind_the_stream_are_refused(tmp_path: Path) -> None:
    model = zoo.model_of("llama")
    options: dict[str, Any] = {"cache_pooled": False, "store": tmp_path, "compute_perplexity": False}
    plain = ac.UnifiedCache(model, **options).logit_lens([[5, 9, 7]])
    edited = ac.UnifiedCache(model, edits=ac.ablate("mlp_out.2"), **options).logit_lens([[5, 9, 7]])
    assert torch.equal(plain.kl[3], edited.kl[3])
    assert torch.equal(plain.entropy[:2], edited.entropy[:2])
    assert not torch.equal(plain.entropy[2:], edited.entropy[2:])
    behind = ac.UnifiedCache(model, edits=ac.ablate("final_norm"), **options)
    with pytest.raises(errors.OptionError, match="changes logits behind"):
        behind.logit_lens([[5, 9, 7]])


def test_a_model_that_was_changed_answers_no_more_for_the_lens(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    lens = ac.UnifiedCache(model, cache_pooled=False, store=tmp_path).logit_lens([[5, 9, 7]])
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(errors.ModelChangedError):
        lens.logits(0)


def test_a_narrow_store_and_one_that_keeps_nothing(folder: Path, tmp_path: Path) -> None:
    whole = cache_of(folder, tmp_path / "a").logit_lens(PROMPTS)
    nothing = ac.Store(tmp_path / "b", limit_gb=0)
    assert torch.equal(cache_of(folder, nothing).logit_lens(PROMPTS).kl[:, whole.mask], whole.kl[:, whole.mask])
    for dtype, tolerance in (("bfloat16", 0.05), ("int8", 0.1)):
        narrow = cache_of(folder, ac.Store(tmp_path / dtype, dtype=dtype)).logit_lens(PROMPTS)
        difference = (narrow.entropy - whole.entropy)[:, whole.mask].abs().max()
        assert 0 < float(difference) < tolerance


def test_imported_streams_where_they_are_trusted(folder: Path, tmp_path: Path) -> None:
    """Their tokens may not be stored with them, and are the prompts' own then."""
    cache = cache_of(folder, tmp_path / "own", cache_pooled=True)
    own = cache.logit_lens(PROMPTS, 3)
    values, _ = cache.get_activations(PROMPTS)  # type: ignore[misc]
    arrays = dict(zip(cache.sites, values.chunk(4, dim=1), strict=True))
    ac.import_arrays(arrays, str(folder), PROMPTS, pooling="last_token", store=tmp_path / "imported")
    trusting = cache_of(folder, tmp_path / "imported", cache_pooled=True, trust_names=True)
    lens = trusting.logit_lens(PROMPTS, 3)
    assert not trusting.model_loaded
    assert torch.equal(lens.kl, own.kl)
    assert torch.equal(lens.input_ids, own.input_ids)
    assert torch.equal(lens.positions, own.positions)


def test_prompts_that_were_stored_in_different_dtypes(folder: Path, tmp_path: Path) -> None:
    for text, dtype in zip(PROMPTS, ("float16", "bfloat16", "float32"), strict=True):
        cache_of(folder, ac.Store(tmp_path, dtype=dtype)).warmup(text)
    cold = cache_of(folder, tmp_path)
    mixed = cold.logit_lens(PROMPTS)
    assert not cold.model_loaded
    for i, text in enumerate(PROMPTS):
        alone = cold.logit_lens(text)
        real = mixed.mask[i]
        assert zoo.relative_error(mixed.kl[:, i, real], alone.kl[:, 0, : int(real.sum())]) < 1e-5
