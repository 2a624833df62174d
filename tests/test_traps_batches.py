"""Traps of prompts that share a pass: what packing, padding, lengths, beams and experts do to their activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.capture import generation
from actcache.capture.passes import Passes
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.testing.tiny import BOS, EOS, PAD, tiny_model, tiny_tokenizer
from reference import alone, relative_error
from traps_helpers import IDS, PROMPTS, WRONG, first, path_of, plain, rows_of, spied


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_09_prompts_packed_into_one_row_leak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With restarted position ids in one row, a prompt sees the one before it: here each prompt has its own row."""
    model = tiny_model(family)
    last = path_of(model, "resid_post.3")
    packed = torch.tensor([[*PROMPTS[0], *PROMPTS[3]]])
    positions = torch.tensor([[*range(len(PROMPTS[0])), *range(len(PROMPTS[3]))]])
    given = {"position_ids": positions} if family != "bloom" else {}
    together = plain(model, [last], input_ids=packed, **given)[last][0, len(PROMPTS[0]) :]
    expected = plain(model, [last], torch.tensor([PROMPTS[3]]))[last][0]
    assert relative_error(together, expected) > WRONG

    calls = spied(model, monkeypatch)
    extracted = rows_of(model, PROMPTS, layers="last", max_batch_tokens=1000)
    assert relative_error(extracted["resid_post.3"][3], expected) < 1e-5
    # The rows as they were run: each prompt once, alone in its row, however much room there was.
    real = [
        row[: int(mask.sum())] if mask is not None else row
        for call in calls
        for row, mask in zip(call["input_ids"], call.get("attention_mask", [None] * len(IDS)), strict=False)
    ]
    assert sorted(row.tolist() for row in real if row.tolist() in PROMPTS) == sorted(PROMPTS)
    assert all(len(row) <= max(map(len, PROMPTS)) for row in real)


def test_11_padding_in_a_mean() -> None:
    """Padded positions hold vectors of ordinary size: a mean over all positions is wrong."""
    model = tiny_model("llama")
    _, cache = ac.run_with_cache(model, PROMPTS, sites="resid_post.3")
    padded = cache["resid_post.3"]
    ours = rows_of(model, PROMPTS, layers="last", pooling="mean", batch_size=4)["resid_post.3"]
    for row, ids in enumerate(PROMPTS):
        reference = alone(model, ids, "resid_post.3").mean(0)
        assert relative_error(ours[row], reference) < 1e-5
        assert relative_error(cache.rows("resid_post.3")[row].mean(0), reference) < 1e-5
        if len(ids) < 10:
            assert relative_error(padded[row].mean(0), reference) > WRONG


def test_14_attention_kernels_and_batches_change_bfloat16() -> None:
    """sdpa and eager, and in bfloat16 a padded batch and a prompt alone, are not the same numbers: kernels are kept
    apart, and bfloat16 stays within its rounding."""
    eager, sdpa = (tiny_model("llama", attn_implementation=kind).bfloat16() for kind in ("eager", "sdpa"))
    long = PROMPTS[1] * 5
    one, other = (alone(model, long, "resid_post.3").float() for model in (eager, sdpa))
    assert not torch.equal(one, other)
    # Eight bits of mantissa through four blocks; an error of another kind would be of the order of the values.
    assert relative_error(one, other) < 5e-2
    identities = [ac.ActivationExtractor(model).source.identity().values for model in (eager, sdpa)]
    assert identities[0] != identities[1]
    different = {key for key in identities[0] if identities[0][key] != identities[1][key]}
    assert "attn_implementation" in different
    prompts = [*PROMPTS, long]
    batched = rows_of(sdpa, prompts, layers="last", batch_size=5)["resid_post.3"]
    for row, ids in enumerate(prompts):
        assert relative_error(batched[row].float(), alone(sdpa, ids, "resid_post.3").float()) < 5e-2


class Gated(nn.Embedding):
    """An embedding with as many experts as the model has layers."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(*embedding.weight.shape)
        self.weight = embedding.weight
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))


@torch.no_grad()
def test_17_as_many_experts_as_layers() -> None:
    """A list of modules of the right length need not be the blocks: the shallowest is."""
    mixtral = tiny_model("mixtral")
    assert mixtral.config.num_local_experts == mixtral.config.num_hidden_layers == 4
    assert describe(mixtral).block_paths == [f"model.layers.{i}" for i in range(4)]
    # Of gptj's blocks transformers says nothing, so that only their number tells.
    for family in ("llama", "gptj"):
        model = tiny_model(family)
        model.set_input_embeddings(Gated(model.get_input_embeddings()))
        lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4]
        assert lists[0].endswith(".experts")
        blocks = "model.layers" if family == "llama" else "transformer.h"
        assert describe(model).block_paths == [f"{blocks}.{i}" for i in range(4)]
    assert relative_error(rows_of(model, [PROMPTS[1]])["resid_post.3"][0], alone(model, PROMPTS[1], "resid_post.3")) < 1e-5  # fmt: skip  # noqa: E501


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
def test_18_rotary_embeddings_that_follow_the_longest_prompt(family: str) -> None:
    """Beside a long prompt a short one is encoded as if it were long, mask and position ids notwithstanding."""
    context = tiny_model(family).config.max_position_embeddings
    short, long = [5, 9, 100, 7], [(7 * i) % 250 + 5 for i in range(context if family != "llama-dynamic" else 40)]
    lengths = torch.tensor([len(short), len(long)])
    ids = torch.tensor([short + [PAD] * (len(long) - len(short)), long])
    mask = (torch.arange(len(long)) < lengths[:, None]).long()
    naive = plain(tiny_model(family), ["model.layers.3"], input_ids=ids, attention_mask=mask)["model.layers.3"]
    expected = [alone(tiny_model(family), prompt, "resid_post.3") for prompt in (short, long)]
    assert relative_error(naive[0, : len(short)], expected[0]) > WRONG
    for prompts in ([short, long], [long, short]):
        ours = rows_of(tiny_model(family), prompts, layers="last")["resid_post.3"]
        for prompt, row in zip(prompts, ours, strict=True):
            assert relative_error(row, expected[prompt is long]) < 1e-5


@torch.no_grad()
def test_19_beams_exchange_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the steps of a beam search, put one after the other, belong to different sequences."""
    model = tiny_model("gpt2")

    def searched() -> tuple[Any, Tensor]:
        with ac.capture(model, sites="resid_post.3") as cache:
            made = model.generate(
                IDS, attention_mask=torch.ones_like(IDS), num_beams=3, num_return_sequences=3, max_new_tokens=8,
                min_new_tokens=8, pad_token_id=PAD,
            )  # fmt: skip
        return cache, made

    def worst(cache: Any, made: Tensor) -> float:
        rows = zip(cache.rows("resid_post.3"), made, strict=True)
        return max(relative_error(row, alone(model, ids[:-1].tolist(), "resid_post.3")) for row, ids in rows)

    assert worst(*searched()) < 1e-5
    # Without what generate tells, the exchange of rows is still noticed ...
    monkeypatch.setattr(generation.Watch, "__init__", lambda self, modules, reader: setattr(self, "_stands", []))
    with pytest.raises(SiteUnavailableError, match="reordered"):
        worst(*searched())
    # ... and without that too, rows are wrong.
    monkeypatch.setattr(Passes, "_exchanged", lambda *_: None)
    assert worst(*searched()) > WRONG


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_20_experts_and_routers(family: str) -> None:
    """Routers see all tokens in one list, experts are one module or many: by path everything is what the module gave,
    and mlp_out has one row per token."""
    model = tiny_model(family)
    mlp = path_of(model, "mlp_out.1")
    inside = [f"{mlp}.{name}" for name, module in model.get_submodule(mlp).named_modules() if name]
    found: dict[str, list[Any]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: found.setdefault(path, []).append(out) and None
        )
        for path in [mlp, *inside]
    ]
    with ac.capture(model, sites="mlp_out.1") as sites, ac.capture(model) as cache:
        model(IDS)
    for handle in handles:
        handle.remove()
    assert any(first(outs[0]).ndim == 2 for outs in found.values()), "no router or expert saw flattened tokens"
    for path, outputs in found.items():
        assert len(cache[path]) == len(outputs)
        for visit, output in zip(cache[path], outputs, strict=True):
            assert type(visit.output) is type(output)
            pairs = zip(visit.output, output, strict=True) if isinstance(output, tuple) else [(visit.output, output)]
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(b, Tensor))
    assert sites["mlp_out.1"].shape == (2, 6, 32)
    assert torch.equal(sites["mlp_out.1"], first(found[mlp][0]))
    # With fewer positions kept, what is not one row per token is left as it is.
    with ac.capture(model, [mlp, *found], positions="last") as last:
        model(IDS)
    assert torch.equal(last[mlp].hidden, first(found[mlp][0])[:, -1:])
    for path, outputs in found.items():
        if path != mlp and first(outputs[0]).ndim == 2:
            assert torch.equal(last[path][0].hidden, first(outputs[0]))


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def test_21_templates_with_a_bos_and_padding_that_is_text() -> None:
    """A chat template's text already starts with the BOS; where padding is the EOS, a mask of ids loses real tokens."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "hi there, you"}]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    right = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    twice = tokenizer(texts[0])["input_ids"]
    assert twice[:2] == [BOS, BOS]
    assert right[0].count(BOS) == 1
    assert right[0][-1] == EOS
    expected = [alone(model, ids, "resid_post.3") for ids in right]
    ours = rows_of(model, chats, tokenizer=tokenizer, layers="last")["resid_post.3"]
    for row, reference in zip(ours, expected, strict=True):
        assert relative_error(row, reference) < 1e-5
    assert relative_error(alone(model, twice, "resid_post.3")[1:], expected[0]) > WRONG

    # Padded on the left behind a mask of ids: the EOS at the end is masked, and its row is another one.
    ids = torch.tensor([[EOS] * (len(right[1]) - len(right[0])) + right[0], right[1]])
    mask = (ids != tokenizer.pad_token_id).long()
    assert mask.sum(1).tolist() == [len(right[0]) - 1, len(right[1]) - 1]
    naive = plain(model, ["model.layers.3"], input_ids=ids, attention_mask=mask)["model.layers.3"]
    assert relative_error(naive[0, -1:], expected[0][-1:]) > WRONG
    cache = ac.run_with_cache(model, right, sites="resid_post.3")[1]
    assert cache.attention_mask.sum(1).tolist() == [len(ids) for ids in right]
    for row, reference in zip(cache.rows("resid_post.3"), expected, strict=True):
        assert relative_error(row, reference) < 1e-5
