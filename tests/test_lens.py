"""What a lens says of every layer and position, against the model's own hidden states, norm and head."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import actcache as ac
import zoo
from actcache import errors
from actcache.model.layer_predictions import predict_layers, rank_of
from actcache.testing.tiny import tiny_tokenizer

CAUSAL = [
    name
    for name, known in zoo.FAMILIES.items()
    if not known.encoder_decoder and name not in ("bert", "distilbert", "roberta", "modernbert")
]
PROMPTS = zoo.prompts_of(3, [5, 1, 8])
CHOSEN = [7, 46]
K = 4


@dataclass
class Expected:
    """Of one prompt, float64: log-probabilities of some layers ``[T, V]``, and of the model."""

    layers: dict[int, Tensor]
    final: Tensor


@torch.no_grad()
def expected(family: str, model: Any, prompt: list[int]) -> Expected:
    """From transformers' hidden states alone: the norm and the head in float64."""
    known = zoo.FAMILIES[family]
    stack = known.stacks[""]
    wide = copy.deepcopy(model).double()
    norm = wide.get_submodule(stack.final_norm) if stack.final_norm else torch.nn.Identity()
    output = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    layers = {}
    for name, hidden in zip(zoo.same_hidden_states(family, model)[""], output.hidden_states, strict=True):
        if name is None or name == "final_norm":
            continue
        layer = int(name.rpartition(".")[2]) - name.startswith("resid_pre")
        if layer >= 0:
            layers[layer] = known.head(wide, norm(hidden.double()))[0].log_softmax(-1)
    return Expected(layers, output.logits[0].double().log_softmax(-1))


def check(lens: Any, at: int, theirs: Expected, tolerance: float = 1e-5) -> None:
    """Everything the lens says of the real positions of prompt `at`."""
    real = lens.mask[at]
    assert int(real.sum()) == len(theirs.final)
    final = theirs.final
    depth = max(lens.layers)
    for layer, log in {**theirs.layers, depth: final}.items():
        place = lens.layers.index(layer)
        mine = lens.probabilities[place, at][real].double()
        own = log.exp().gather(-1, lens.tokens[place, at][real])
        best = log.exp().topk(K).values
        assert float((mine - own).abs().max()) < tolerance
        assert float((mine - best).abs().max()) < tolerance
        entropy = -(log.exp() * log).sum(-1)
        assert float((lens.entropy[place, at][real] - entropy).abs().max()) < tolerance
        divergence = (final.exp() * (final - log)).sum(-1)
        assert float((lens.kl[place, at][real] - divergence).abs().max()) < tolerance
        for i, token in enumerate(lens.chosen):
            chance = lens.chosen_probabilities[place, at, :, i][real]
            assert float((chance - log.exp()[:, token]).abs().max()) < tolerance
            rank = lens.chosen_ranks[place, at, :, i][real]
            # What is as likely as the token but for rounding may stand on either side.
            above = (log > log[:, token, None] + 1e-5).sum(-1)
            near = (log > log[:, token, None] - 1e-5).sum(-1)
            assert bool(((rank >= above) & (rank <= near)).all())


@pytest.mark.parametrize("family", CAUSAL)
def test_a_lens_says_what_norm_and_head_say_of_the_hidden_states(family: str, tmp_path: Path) -> None:
    model = zoo.model_of(family)
    cache = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    stored = cache.logit_lens(PROMPTS, K, tokens=CHOSEN)
    assert stored.layers == list(range(len(stored.layers)))
    assert stored.tokens.shape == (len(stored.layers), len(PROMPTS), 11, K)
    for i, prompt in enumerate(PROMPTS):
        theirs = expected(family, model, prompt)
        assert len(theirs.layers) >= 3
        check(stored, i, theirs)
        # The same pass, bare and captured.
        _, captured = ac.run_with_cache(model, [prompt], sites="resid_post")
        bare = captured.logit_lens(top_k=K, tokens=CHOSEN)
        check(bare, 0, theirs)
        assert zoo.relative_error(bare.entropy[:, 0], stored.entropy[:, i, : len(prompt)]) < 1e-5


def test_what_padding_holds(tmp_path: Path) -> None:
    cache = ac.UnifiedCache(zoo.model_of("gpt2"), tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    lens = cache.logit_lens(PROMPTS, 3, tokens=7)
    assert lens.mask.tolist() == [[k < len(prompt) for k in range(11)] for prompt in PROMPTS]
    outside = ~lens.mask
    assert bool((lens.tokens[:, outside] == -1).all())
    assert bool((lens.probabilities[:, outside] == 0).all())
    assert bool((lens.chosen_ranks[:, outside] == -1).all())
    assert bool(lens.entropy[:, outside].isnan().all())
    assert bool(lens.kl[:, outside].isnan().all())
    assert bool(lens.kl[:, lens.mask].isfinite().all())
    assert bool((lens.logits(2)[outside] == 0).all())
    for i, prompt in enumerate(PROMPTS):
        assert lens.input_ids[i].tolist() == prompt + [-1] * (11 - len(prompt))
        assert lens.positions[i].tolist() == [*range(len(prompt)), *[-1] * (11 - len(prompt))]


def test_the_last_layer_is_no_way_from_itself(tmp_path: Path) -> None:
    cache = ac.UnifiedCache(zoo.model_of("gemma2"), tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    lens = cache.logit_lens([PROMPTS[0]])
    assert bool((lens.kl[-1] == 0).all())
    assert bool((lens.kl[:-1] > 0).all())


def test_tokens_of_equal_logits_share_the_better_rank(tmp_path: Path) -> None:
    assert rank_of(torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0]]), 2).tolist() == [0]
    assert rank_of(torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0]]), 4).tolist() == [2]
    model = copy.deepcopy(zoo.model_of("llama"))
    with torch.no_grad():
        model.lm_head.weight[46] = model.lm_head.weight[7]
    lens = ac.UnifiedCache(model, tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path).logit_lens(
        PROMPTS, tokens=[7, 46]
    )
    assert torch.equal(lens.chosen_ranks[..., 0], lens.chosen_ranks[..., 1])
    for layer in lens.layers:
        logits = lens.logits(layer)
        order = (logits > logits[..., 7, None]).sum(-1)
        assert torch.equal(lens.chosen_ranks[layer, ..., 0][lens.mask], order[lens.mask])


def test_a_head_that_rules_tokens_out() -> None:
    """Logits of minus infinity: probability 0, and nothing to be unsure of."""

    class Head:
        vocab_size, device = 4, torch.device("cpu")

        def __call__(self, rows: Tensor) -> Tensor:
            return rows

    head: Any = Head()
    rows = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    final = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    made = predict_layers(head, [rows, final], final, top_k=4, chosen=[2])
    assert made.entropy[:, 0].tolist() == pytest.approx([0.6931472, 0.0])
    assert made.kl is not None
    assert made.kl[:, 0].tolist() == pytest.approx([0.6931472, 0.0])
    assert made.ranks[:, 0, 0].tolist() == [2, 1]
    assert made.chosen[:, 0, 0].tolist() == [0.0, 0.0]
    back = predict_layers(head, [final], rows, top_k=1)
    assert back.kl is not None
    assert back.kl[0, 0] == torch.inf


def test_slices_change_nothing_and_bound_the_memory() -> None:
    """Logits of at most so many rows are there at a time."""
    model = zoo.model_of("llama")
    _, cache = ac.run_with_cache(model, PROMPTS, sites="resid_post")
    streams = [cache[f"resid_post.{layer}"].reshape(-1, 32) for layer in range(4)]
    from actcache.model.head import find_head

    real = find_head(model)
    largest = []

    class Watched:
        vocab_size, device = real.vocab_size, real.device

        def __call__(self, rows: Tensor) -> Tensor:
            largest.append(len(rows))
            return real(rows)

    watched: Any = Watched()
    whole = predict_layers(watched, streams, streams[-1], top_k=3, chosen=[5], max_bytes=1 << 30)
    assert max(largest) == 44
    largest.clear()
    parts = predict_layers(watched, streams, streams[-1], top_k=3, chosen=[5], max_bytes=4 * real.vocab_size * 5)
    assert max(largest) == 5
    assert torch.equal(whole.tokens, parts.tokens)
    for name in ("probabilities", "entropy", "kl", "chosen"):
        assert zoo.relative_error(getattr(parts, name), getattr(whole, name)) < 1e-5


def test_a_capture_without_the_last_block_has_no_divergence() -> None:
    model = zoo.model_of("gpt2")
    _, cache = ac.run_with_cache(model, PROMPTS, sites="resid_post", layers=[1])
    lens = cache.logit_lens()
    assert not lens.has_kl
    assert bool(lens.entropy[lens.mask[None]].isfinite().all())
    with pytest.raises(errors.UnknownKeyError, match=r"follows from resid_post\.3, which the cache does not hold"):
        _ = lens.kl
    assert "KL" not in lens.table()
    _, cache = ac.run_with_cache(model, PROMPTS, sites=["resid_pre", "resid_post"])
    before, after = cache.logit_lens("resid_pre"), cache.logit_lens()
    assert torch.equal(before.kl[1:][:, before.mask], after.kl[:-1][:, after.mask])


def test_left_padding_and_chosen_positions_of_a_capture() -> None:
    model = zoo.model_of("llama")
    ids = torch.tensor([[0, 0, 9, 14, 77], [5, 200, 31, 7, 90]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    _, cache = ac.run_with_cache(model, {"input_ids": ids, "attention_mask": mask}, sites="resid_post")
    lens = cache.logit_lens()
    assert lens.positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert lens.input_ids.tolist() == [[-1, -1, 9, 14, 77], [5, 200, 31, 7, 90]]
    assert lens.table(0, 0).splitlines()[0].startswith("prompt 0, position 0, behind ")
    some = cache.logit_lens(pos_slice=[0, -1])
    assert some.positions.tolist() == [[0, 2], [0, 4]]
    assert some.input_ids.tolist() == [[9, 77], [5, 90]]
    assert torch.equal(some.kl[:, 0, 1], lens.kl[:, 0, 4])


def test_the_chosen_and_the_asked_for_later(tmp_path: Path) -> None:
    cache = ac.UnifiedCache(zoo.model_of("gpt2"), tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    lens = cache.logit_lens(PROMPTS, tokens=["a", 7, 7])
    assert lens.chosen == [tiny_tokenizer()("a", add_special_tokens=False)["input_ids"][0], 7]
    bare = cache.logit_lens(PROMPTS)
    assert bare.chosen == []
    for i, token in enumerate(("a", 7)):
        assert torch.equal(bare.rank(token), lens.chosen_ranks[..., i])
        assert torch.equal(lens.rank(token), lens.chosen_ranks[..., i])
    ranks = lens.rank(7)
    first = lens.first_layer(7, 100)
    inside = (ranks < 100) & lens.mask
    assert bool((first[lens.mask & ~inside.any(0)] == -1).all())
    assert torch.equal(first[inside.any(0)], inside.int().argmax(0)[inside.any(0)])
    chances = torch.stack([bare.logits(layer) for layer in bare.layers]).softmax(-1)[..., 7]
    assert torch.allclose(chances[:, lens.mask], lens.chosen_probabilities[..., 1][:, lens.mask], atol=1e-6)
    for wrong, message in (
        ("ab", r"'ab' is 2 tokens \(\[\d+, \d+\]\) and must be one"),
        (259, "token 259 is outside the model's vocabulary of 259"),
        ([1.5], "tokens holds 1.5"),
        ([True], "tokens holds True"),
    ):
        with pytest.raises(errors.OptionError, match=message):
            cache.logit_lens(PROMPTS, tokens=wrong)


def test_a_table_fits_into_a_terminal(tmp_path: Path) -> None:
    cache = ac.UnifiedCache(zoo.model_of("gpt2"), tokenizer=tiny_tokenizer(), cache_pooled=False, store=tmp_path)
    lens = cache.logit_lens(["naïve 日本", "b"], 20, tokens=["a"])
    for width in (60, 80, 120):
        lines = lens.table(0, 3, width=width).splitlines()
        assert len(lines) == 2 + len(lens.layers)
        assert all(len(line) <= width for line in lines)
        assert lines[0] == r"prompt 0, position 3, behind '\xc3'"
        assert lines[1].split() == ["layer", "entropy", "KL", "'a'", "best"]
        # Numbers end where their heads do.
        for name, value in (("entropy", lens.entropy), ("KL", lens.kl)):
            end = lines[1].index(name) + len(name)
            assert lines[2][:end].endswith(f" {float(value[0, 0, 3]):.3f}")
        place = lens.layers[-1]
        cells = lines[-1].split()
        assert cells[0] == f"resid_post.{place}"
        assert float(cells[1]) == pytest.approx(float(lens.entropy[-1, 0, 3]), abs=6e-4)
        assert cells[2] == "0.000"
        assert cells[4] == f"#{int(lens.chosen_ranks[-1, 0, 3, 0])}"
    assert len(lens.table(0, 3, width=120).splitlines()[-1]) > len(lens.table(0, 3, width=60).splitlines()[-1])
    assert lens.table() in repr(lens)
    console = Console(width=64, record=True, file=io.StringIO())
    console.print(lens)
    assert lens.table(width=64).splitlines() == [line.rstrip() for line in console.export_text().splitlines()[1:]]
    with pytest.raises(errors.LayerRangeError, match="position 2 is out of range: prompt 1 has 2 here"):
        lens.table(1, 2)
    with pytest.raises(errors.LayerRangeError, match="prompt 2 is out of range"):
        lens.table(2)


@pytest.mark.parametrize(
    ("family", "dtype"),
    # A norm that is computed in float32 inside, and one that is not.
    [("llama", torch.bfloat16), ("llama", torch.float16), ("llama", torch.float64), ("gpt2", torch.float64)],
)
def test_models_of_other_dtypes(family: str, dtype: torch.dtype) -> None:
    """Softmax and what follows are computed in float32 at least, from the logits as the model makes them."""
    model = copy.deepcopy(zoo.model_of(family)).to(dtype)
    norm = model.get_submodule(str(zoo.FAMILIES[family].stacks[""].final_norm))
    _, cache = ac.run_with_cache(model, [PROMPTS[0]], sites="resid_post")
    lens = cache.logit_lens(top_k=K, tokens=CHOSEN)
    with torch.no_grad():
        final = model(torch.tensor([PROMPTS[0]])).logits[0].double()
    for layer in lens.layers:
        with torch.no_grad():
            logits = model.lm_head(norm(cache[f"resid_post.{layer}"]))[0].double()
        log = logits.log_softmax(-1)
        divergence = (final.softmax(-1) * (final.log_softmax(-1) - log)).sum(-1)
        assert float((lens.kl[layer, 0] - divergence).abs().max()) < 1e-5
        assert float((lens.entropy[layer, 0] + (log.exp() * log).sum(-1)).abs().max()) < 1e-5
        assert float((lens.probabilities[layer, 0] - log.exp().topk(K).values).abs().max()) < 1e-5
        ranks = torch.stack([(logits > logits[:, token, None]).sum(-1) for token in CHOSEN], -1)
        assert torch.equal(lens.chosen_ranks[layer, 0], ranks)
    assert lens.probabilities.dtype == lens.kl.dtype == lens.entropy.dtype == torch.float32
