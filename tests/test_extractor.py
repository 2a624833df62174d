"""Extraction against bare forward passes of one prompt at a time (`reference.alone`)."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.model.anatomy import check_identities
from actcache.testing.tiny import tiny_model
from reference import alone, relative_error

# Eight bits of float32 rounding over a few blocks of sums; measured errors are below 1e-6.
FLOAT32 = 5e-6
# bfloat16 keeps 8 bits: 2^-8 per rounding, some roundings deep.
BFLOAT16 = 3e-2

SITES = ["resid_pre", "resid_post", "attn_out", "mlp_out", "embed", "final_norm", "logits"]


def prompts_for(model, n=12, seed=0):
    rng = random.Random(seed)
    limit, vocabulary = 64, model.config.vocab_size
    lengths = [1, 2, limit, limit, *(rng.randint(1, limit) for _ in range(n - 4))]
    prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]
    prompts[5] = [0, 0, *prompts[5], 0]  # the id that fills up batches, inside and at the end of a prompt
    return prompts


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama-tied"])
def model(request):
    return {
        "gpt2": lambda: tiny_model("gpt2", seed=1, n_layer=3),
        "llama": lambda: tiny_model("llama", seed=1),
        "llama-tied": lambda: tiny_model("llama-tied", seed=2),
    }[request.param]()


@pytest.mark.parametrize("batch_size", [1, 3, 8, None])
def test_every_row_is_what_the_prompt_gives_alone(model, batch_size):
    prompts = prompts_for(model)
    ours = ac.ActivationExtractor(model, sites=SITES, batch_size=batch_size).extract(prompts)
    for site in ours:
        for i in (0, 1, 2, 5, 7, 11):
            assert relative_error(ours[site][i], alone(model, prompts[i], site)) < FLOAT32, (site, i)


def test_order_and_company_do_not_matter(model):
    prompts = prompts_for(model)
    order = random.Random(3).sample(range(len(prompts)), len(prompts))
    extractor = ac.ActivationExtractor(model, max_batch_tokens=128)
    straight = extractor.extract(prompts)
    shuffled = extractor.extract([prompts[i] for i in order])
    for site in straight:
        for k, i in enumerate(order):
            assert relative_error(shuffled[site][k], straight[site][i]) < FLOAT32


def test_only_batches_of_different_lengths_are_masked(model, monkeypatch):
    from actcache.model.forward_inputs import ForwardInputs

    given = []
    make = ForwardInputs.make
    monkeypatch.setattr(ForwardInputs, "make", lambda *args: given.append(make(*args)) or given[-1])
    extractor = ac.ActivationExtractor(model, layers="last")
    extractor.extract([[1, 2, 3], [4, 5, 6]])
    extractor.extract([[1, 2, 3], [4]])
    assert ["attention_mask" in g for g in given] == [False, True]
    assert given[1]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(g["position_ids"].tolist() == [[0, 1, 2]] * 2 for g in given)


@pytest.mark.parametrize("pooling", ["last_token", "first_token", "mean", "max", "min"])
def test_pooling_is_the_pooling_of_the_prompt_alone(model, pooling):
    prompts = prompts_for(model)
    ours = ac.ActivationExtractor(model, layers=[0, -1], pooling=pooling).extract(prompts)
    reduce = {
        "last_token": lambda h: h[-1],
        "first_token": lambda h: h[0],
        "mean": lambda h: h.double().mean(0),
        "max": lambda h: h.amax(0),
        "min": lambda h: h.amin(0),
    }[pooling]
    for site in ours:
        assert ours[site].shape == (len(prompts), ours[site].shape[1])
        for i, prompt in enumerate(prompts):
            assert relative_error(ours[site][i], reduce(alone(model, prompt, site))) < FLOAT32


def test_pooling_by_a_function_gets_the_real_tokens_only(model):
    prompts = prompts_for(model)
    ours = ac.ActivationExtractor(model, layers="last", pooling=lambda h: h.norm(dim=0)).extract(prompts)
    (site,) = ours
    for i, prompt in enumerate(prompts):
        assert relative_error(ours[site][i], alone(model, prompt, site).norm(dim=0)) < FLOAT32


@pytest.mark.parametrize(
    ("positions", "index"), [("last", [-1]), ("first", [0]), (0, [0]), (-1, [-1]), ([0, -1], [0, -1])]
)
def test_positions_count_real_tokens(model, positions, index):
    prompts = prompts_for(model)
    ours = ac.ActivationExtractor(model, layers="last", positions=positions).extract(prompts)
    (site,) = ours
    for i, prompt in enumerate(prompts):
        assert relative_error(ours[site][i], alone(model, prompt, site)[index]) < FLOAT32


def test_bfloat16_stays_within_its_precision():
    model = tiny_model("llama", seed=4).to(torch.bfloat16)
    prompts = prompts_for(model)
    ours = ac.ActivationExtractor(model, layers="all").extract(prompts)
    for site in ours:
        assert ours[site][0].dtype is torch.bfloat16
        for i, prompt in enumerate(prompts):
            assert relative_error(ours[site][i], alone(model, prompt, site)) < BFLOAT16


def test_padded_view_has_zeros_and_mask_where_nothing_is():
    model = tiny_model("gpt2", n_layer=3)
    prompts = [[1, 2, 3], [4], [5, 6]]
    ours = ac.ActivationExtractor(model, layers=[0, 1]).extract(prompts)
    padded, mask = ours.padded()
    assert padded.shape == (3, 3, 2 * model.config.n_embd)
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert not padded[~mask].any()
    assert torch.equal(padded[1, 0, : model.config.n_embd], ours["resid_post.0"][1][0])


def test_layers_come_in_the_order_asked():
    model = tiny_model("gpt2", n_layer=3)
    assert list(ac.ActivationExtractor(model, layers=[-1, 0]).extract([[1]])) == [
        f"resid_post.{model.config.n_layer - 1}",
        "resid_post.0",
    ]


def test_blocks_past_the_deepest_layer_and_the_head_do_not_run():
    model = tiny_model("gpt2", n_layer=3)
    check_identities(model)
    ran = []
    model.transformer.h[2].forward = lambda *a, **k: ran.append("block 2")
    model.lm_head.forward = lambda *a, **k: ran.append("head")
    from actcache.extract.backends import Reduction, Setting
    from actcache.extract.backends.local import LocalBackend

    name = model.lm_head.forward.__qualname__
    source = ac.ActivationExtractor(model, layers=[0, 1], allow_hooks=[name]).source
    with LocalBackend(Setting(source)).session(["resid_post.0", "resid_post.1"], Reduction("last_token")) as session:
        rows = session.run([np.array([1, 2, 3], np.int32)]).wait()
    assert set(rows) == {"resid_post.0", "resid_post.1"}
    assert ran == []


def test_training_mode_is_left_as_it_was_and_does_not_change_values():
    model = tiny_model("gpt2", seed=5, n_layer=3)
    model.transformer.drop.p = 0.5
    expected = alone(model, [1, 2, 3], "resid_post.1")
    model.train()
    model.transformer.h[0].eval()
    ours = ac.ActivationExtractor(model, layers=1).extract([[1, 2, 3]])
    assert relative_error(ours["resid_post.1"][0], expected) < FLOAT32
    assert model.training
    assert model.transformer.drop.training
    assert not model.transformer.h[0].training


def test_hooks_of_somebody_else_are_refused_unless_named():
    def steering(module, args, output):
        return None

    model = tiny_model("gpt2", n_layer=3)
    model.transformer.h[0].register_forward_hook(steering)
    with pytest.raises(errors.ForeignHooksError, match=r"transformer\.h\.0"):
        ac.UnifiedCache(model).plan([[1, 2]])
    name = steering.__qualname__
    ac.UnifiedCache(model, allow_hooks=[name]).plan([[1, 2]])


def test_a_pooling_function_may_work_in_place():
    def first_of_spoilt(rows):
        first = rows[0].clone()
        rows.zero_()
        return first

    model = tiny_model("gpt2", n_layer=3)
    ours = ac.ActivationExtractor(model, pooling=first_of_spoilt).extract([[1, 2, 3]])
    for layer in range(3):
        site = f"resid_post.{layer}"
        assert relative_error(ours[site][0], alone(model, [1, 2, 3], site)[0]) < FLOAT32


@pytest.mark.parametrize("function", [lambda rows: rows, lambda rows: rows.sum(), lambda rows: 1.0])
def test_a_pooling_function_must_give_one_vector(function):
    with pytest.raises(errors.OptionError, match=r"one vector \[D\]"):
        ac.ActivationExtractor(tiny_model("gpt2"), pooling=function).extract([[1, 2]])


def test_what_the_caller_set_for_speed_does_not_reach_stored_float32():
    model = tiny_model("gpt2", n_layer=3)
    expected = alone(model, [1, 2, 3], "resid_post.2")
    inside = []

    def watch(rows):
        inside.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return rows[-1]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = ac.ActivationExtractor(model, layers=2, pooling=watch).extract([[1, 2, 3]])
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert relative_error(ours["resid_post.2"][0], expected[-1]) < FLOAT32
    assert inside == [("highest", False)]


def test_threads_that_share_a_model_do_not_read_each_others_passes():
    model = tiny_model("gpt2", n_layer=3)
    prompts = [[[t, 7, k % 200 + 3] for k in range(60)] for t in (11, 12, 13)]
    alone_first = [ac.ActivationExtractor(model, pooling="mean").extract(p) for p in prompts]
    with ThreadPoolExecutor(3) as pool:
        runs = pool.map(
            lambda p: ac.ActivationExtractor(model, pooling="mean", max_batch_tokens=6).extract(p), prompts * 2
        )
        for k, run in enumerate(runs):
            for site in run:
                assert relative_error(run[site], alone_first[k % 3][site]) < FLOAT32


def test_a_site_that_did_not_run_is_an_error():
    model = tiny_model("gpt2", n_layer=3)
    check_identities(model)
    forward, blocks = model.transformer.forward, model.transformer.h

    def early_exit(*args, **kwargs):
        model.transformer.h = blocks[:2]
        try:
            return forward(*args, **kwargs)
        finally:
            model.transformer.h = blocks

    model.transformer.forward = early_exit
    with pytest.raises(errors.MissedModuleError, match=r"resid_post\.2"):
        ac.ActivationExtractor(model, allow_hooks=[early_exit.__qualname__]).extract([[1, 2]])


class TestBadInput:
    @pytest.fixture
    def model(self):
        return tiny_model("gpt2", n_layer=3)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"sites": "resid_pots"}, errors.UnknownSiteError, "resid_post"),
            ({"layers": 99}, errors.LayerRangeError, "99"),
            ({"layers": "al"}, errors.OptionError, "all"),
            ({"pooling": "lst_token"}, errors.OptionError, "last_token"),
            ({"dtype": "float23"}, errors.OptionError, "float32"),
            ({"device": "gpu"}, errors.OptionError, "cuda"),
            ({"batch_size": 0}, errors.OptionError, "batch_size"),
            ({"max_batch_tokens": -5}, errors.OptionError, "max_batch_tokens"),
            ({"backend": "vllm"}, errors.OptionError, "local"),
            ({"dtype": "bfloat16"}, errors.OptionError, "already loaded"),
            ({"sites": []}, errors.OptionError, "sites"),
            ({"positions": "lst"}, errors.OptionError, "last"),
            ({"positions": [[0], [1]]}, errors.OptionError, "get_activations"),
        ],
    )
    def test_options_are_checked_before_any_work(self, model, options, error, message):
        with pytest.raises(error, match=message):
            ac.ActivationExtractor(model, **options)

    def test_a_prompt_past_the_context_is_refused_by_name(self, model):
        long = [1] * (model.config.n_positions + 1)
        with pytest.raises(errors.PromptError, match=rf"prompt 1 has {len(long)} tokens.*{model.config.n_positions}"):
            ac.ActivationExtractor(model).extract([[1], long])

    def test_a_token_id_outside_the_vocabulary_is_refused(self, model):
        with pytest.raises(errors.PromptError, match=f"token id {model.config.vocab_size}"):
            ac.ActivationExtractor(model).extract([[model.config.vocab_size]])

    def test_text_without_a_tokenizer(self, model):
        with pytest.raises(errors.TokenizerError, match="tokenizer="):
            ac.ActivationExtractor(model).extract(["text"])

    def test_not_a_model(self):
        with pytest.raises(errors.OptionError, match="Hub id"):
            ac.ActivationExtractor(torch.nn.Linear(2, 2))
