"""Dicts with padding in front of their tokens: each prompt gives what the bare model gives for it alone, or is refused.

Under the mask may lie any id: the padding id, or another one.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.errors import PromptError
from actcache.model import front_padding
from actcache.model.invariance import own_positions
from actcache.testing.tiny import tiny_model

PAD = 1
# The padding id is a token like any other inside a prompt, also as its first.
PROMPTS = [[5, 9, 100, 7, 8], [8, 3, 4], [PAD, 0, 9], [6, PAD, 9, PAD]]
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    **SIZES, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
COUNTED = {
    "roberta": {},
    "camembert": {},
    "xlm-roberta-xl": {},
    "roberta-prelayernorm": {},
    "data2vec-text": {},
    "mpnet": {},
    "esm": {"position_embedding_type": "absolute"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "ibert": {},
}


def model_of(family: str, sizes: dict[str, Any] = SIZES, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **more})
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def in_front(fill: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[fill] * (5 - len(p)) + p for p in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in PROMPTS]),
    }


@torch.no_grad()
def bare(model: Any, prompt: list[int]) -> Tensor:
    mask = torch.ones(1, len(prompt), dtype=torch.long)
    hidden: Tensor = model(torch.tensor([prompt]), attention_mask=mask)[0]
    return hidden[0]


def holds(rows: list[Tensor], expected: list[Tensor]) -> bool:
    errors = [(row - one).abs().max() / one.abs().max() for row, one in zip(rows, expected, strict=True)]
    return max(map(float, errors)) < 1e-5


@pytest.mark.parametrize("fill", [PAD, 7])
@pytest.mark.parametrize("family", COUNTED)
def test_positions_are_those_of_the_prompt_alone(family: str, fill: int) -> None:
    model = model_of(family, **COUNTED[family])
    expected = [bare(model, prompt) for prompt in PROMPTS]
    inputs = in_front(fill)
    output, cache = ac.run_with_cache(model, inputs, sites="resid_post")
    states = output[0]
    assert holds([states[row, 5 - len(p) :] for row, p in enumerate(PROMPTS)], expected)
    last = max(cache, key=str)
    assert [len(row) for row in cache.rows(last)] == list(map(len, PROMPTS))
    assert [ids[real].tolist() for ids, real in zip(cache.input_ids, cache.attention_mask, strict=True)] == PROMPTS
    assert list(inputs) == ["input_ids", "attention_mask"]


def test_embeddings_instead_of_ids() -> None:
    model = model_of("roberta")
    inputs = in_front(7)
    embeddings = model.get_input_embeddings()
    given = {"inputs_embeds": embeddings(inputs["input_ids"]).detach(), "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        expected = [model(inputs_embeds=embeddings(torch.tensor([p])))[0][0] for p in PROMPTS]
        states = ac.run_with_cache(model, given, sites="resid_post")[0][0]
    assert holds([states[row, 5 - len(p) :] for row, p in enumerate(PROMPTS)], expected)


def test_positions_of_the_callers_own_stay() -> None:
    model = model_of("roberta")
    inputs = {**in_front(7), "position_ids": torch.arange(5).expand(4, -1) + 9}
    with torch.no_grad():
        expected = model(**inputs)[0]
    assert torch.equal(ac.run_with_cache(model, inputs, sites="resid_post")[0][0], expected)


def test_in_a_callers_own_call_the_model_does_what_it_does() -> None:
    model = model_of("roberta")
    inputs = in_front(7)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        with ac.capture(model, sites="resid_post") as cache:
            model(**inputs)
    assert torch.equal(cache["resid_post.0"], expected[1])
    assert [ids[real].tolist() for ids, real in zip(cache.input_ids, cache.attention_mask, strict=True)] == PROMPTS


def test_the_trap_itself() -> None:
    model = model_of("roberta")
    with torch.no_grad():
        states = model(**in_front(7))[0]
    assert not holds(
        [states[row, 5 - len(p) :] for row, p in enumerate(PROMPTS)], [bare(model, prompt) for prompt in PROMPTS]
    )


@pytest.mark.parametrize(
    ("family", "fills"), [("marian", {PAD: False, 7: False}), ("m2m_100", {PAD: True, 7: False}), ("bart", {7: False})]
)
def test_models_that_take_no_positions(family: str, fills: dict[int, bool]) -> None:
    """Marian and Bart number whatever is there, M2M100 counts from the ids."""
    model = model_of(family, SEQ2SEQ)
    prompts = [p for p in PROMPTS if PAD not in p]
    for fill, right in fills.items():
        inputs = {name: value[:2] for name, value in in_front(fill).items()}
        inputs["decoder_input_ids"] = torch.tensor([[2, 5], [2, 5]])
        if right:
            cache = ac.run_with_cache(model, inputs, sites="encoder.resid_post")[1]
            encoder = model.get_encoder()
            with torch.no_grad():
                expected = [encoder(torch.tensor([p]), output_hidden_states=True).hidden_states[1][0] for p in prompts]
            assert holds(cache.rows("encoder.resid_post.0"), expected)
        else:
            ran: list[int] = []
            handle = model.register_forward_hook(lambda *_, ran=ran: ran.append(1))
            with pytest.raises(PromptError, match=r"padding stands in front.*Pad on the right"):
                ac.run_with_cache(model, inputs, sites="encoder.resid_post")
            handle.remove()
            assert not ran
    # Behind the tokens it changes nothing.
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    ac.run_with_cache(model, inputs, sites="encoder.resid_post")


@pytest.mark.parametrize("family", ["t5", "bloom", "falcon-rw", "distilbert", "mamba", "opt"])
def test_models_that_padding_in_front_does_not_change(family: str) -> None:
    model = tiny_model(family)
    inputs = {name: value[:2] for name, value in in_front(7).items()}
    stack = "encoder." if model.config.is_encoder_decoder else ""
    if stack:
        inputs["decoder_input_ids"] = torch.tensor([[2, 5], [2, 5]])
    site = f"{stack}resid_post.1"
    if family == "distilbert" and "position_ids" not in inspect.signature(model.forward).parameters:
        # It has a table of positions, and takes none in transformers 4.
        with pytest.raises(PromptError, match="in front of tokens"):
            ac.run_with_cache(model, inputs, sites=site)
        return
    cache = ac.run_with_cache(model, inputs, sites=site)[1]
    for row, prompt in zip(cache.rows(site), PROMPTS, strict=False):
        alone = {**{k: v[:1] for k, v in inputs.items()}, "input_ids": torch.tensor([prompt])}
        alone["attention_mask"] = torch.ones(1, len(prompt), dtype=torch.long)
        assert holds([row], [ac.run_with_cache(model, alone, sites=site)[1][site][0]])


def test_how_models_make_positions() -> None:
    found = own_positions(model_of("roberta"))
    assert found is not None
    assert found.of(in_front(7)["attention_mask"].bool(), in_front(7)["input_ids"]).tolist() == [
        [2, 3, 4, 5, 6],
        [1, 1, 2, 3, 4],
        [1, 1, 1, 2, 3],
        [1, 2, 1, 3, 1],
    ]
    assert own_positions(tiny_model("bert")) is None


@pytest.mark.parametrize("size", [0.0, 300.0, 3000.0])
def test_a_massive_dimension_hides_nothing(size: float) -> None:
    model = model_of("bart", SEQ2SEQ)
    with torch.no_grad():
        model.encoder.layers[-1].final_layer_norm.bias[0] += size
    inputs = {name: value[:2] for name, value in in_front(7).items()}
    inputs["decoder_input_ids"] = torch.tensor([[2, 5], [2, 5]])
    with pytest.raises(PromptError, match="padding stands in front"):
        ac.run_with_cache(model, inputs, sites="encoder.resid_post")


def test_what_fails_for_the_moment_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bart", SEQ2SEQ)
    inputs = {name: value[:2] for name, value in in_front(7).items()}
    inputs["decoder_input_ids"] = torch.tensor([[2, 5], [2, 5]])

    def no_memory(*given: Any) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(front_padding, "_effect", no_memory)
        ac.run_with_cache(model, inputs, sites="encoder.resid_post")
    with pytest.raises(PromptError, match="padding stands in front"):
        ac.run_with_cache(model, inputs, sites="encoder.resid_post")


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_prompt_by_itself_and_beside_another(prompts: int) -> None:
    """Mamba 2 of transformers 4 looks at the mask only where there are several prompts."""
    model = tiny_model("mamba2")
    inputs = {name: value[:prompts] for name, value in in_front(7).items()}
    inputs = {
        name: torch.cat([torch.tensor([[7 if name == "input_ids" else 0]]).expand(prompts, 1), value], 1)
        for name, value in inputs.items()
    }
    try:
        cache = ac.run_with_cache(model, inputs, sites="resid_post")[1]
    except PromptError:
        assert prompts == 1
        assert transformers.__version__.startswith("4.")
        return
    for row, prompt in zip(cache.rows("resid_post.1"), PROMPTS, strict=False):
        alone = ac.run_with_cache(model, {"input_ids": torch.tensor([prompt])}, sites="resid_post")[1]
        assert holds([row], [alone["resid_post.1"][0]])
