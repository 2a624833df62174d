"""The shipped model: it loads as any local model does, and it knows what the demo shows."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from actcache.demo import model_path
from actcache.demo.facts import RELATIONS, facts, values
from actcache.demo.prompts import demo_prompts, landmarks, split, statements

LIMIT = 8 * 1000 * 1000


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(model_path())


@torch.no_grad()
def last_token_by_layer(loaded: tuple[Any, Any], texts: list[str]) -> torch.Tensor:
    """Output of each block at the last token, [texts, layers, width]; batches of one length, so without padding."""
    model, tokenizer = loaded
    ids = tokenizer(texts)["input_ids"]
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda _module, _args, out: seen.append((out[0] if isinstance(out, tuple) else out)[:, -1])
        )
        for block in model.model.layers
    ]
    result = torch.empty(len(texts), len(hooks), model.config.hidden_size)
    for length in set(map(len, ids)):
        rows = [i for i, row in enumerate(ids) if len(row) == length]
        model.model(torch.tensor([ids[i] for i in rows]), use_cache=False)
        result[rows] = torch.stack(seen, 1)
        seen.clear()
    for hook in hooks:
        hook.remove()
    return result


@pytest.fixture(scope="module")
def lens(loaded: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities read from each layer, [landmarks, layers, vocabulary], and the ids of the answers."""
    model, tokenizer = loaded
    hidden = last_token_by_layer(loaded, [prompt for prompt, _ in landmarks()])
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in landmarks()]
    assert all(len(row) == 1 for row in ids)
    with torch.no_grad():
        return model.lm_head(model.model.norm(hidden)).softmax(-1), torch.tensor(ids)[:, 0]


def test_shape_and_size(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert 4 <= model.config.num_hidden_layers <= 6
    assert 128 <= model.config.hidden_size <= 192
    assert model.config.tie_word_embeddings
    assert sum(path.stat().st_size for path in model_path().iterdir()) <= LIMIT


def test_folder_is_ordinary_and_names_no_machine() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for path in model_path().iterdir():
        text = path.read_bytes()[:4_000_000].decode("latin-1")
        if path.suffix == ".safetensors":
            text = text[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        assert not re.search(r"/(home|root|tmp|work|Users|mnt|usr)\b|[A-Z]:\\\\", text), path.name
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model_path() / name).read_text())
        assert not {"_name_or_path", "name_or_path"} & set(settings)
        # transformers 4 knows the tokenizer's class under no other name.
        assert settings.get("tokenizer_class", "PreTrainedTokenizerFast") == "PreTrainedTokenizerFast"


def test_every_value_is_one_token(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for value in {value for relation in RELATIONS for value in values(relation)}:
        assert len(tokenizer(f" {value}", add_special_tokens=False)["input_ids"]) == 1, value
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    ids = tokenizer("The Eiffel Tower")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id


def test_tokenizer_keeps_any_text(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for text in ("The Eiffel Tower is in Paris. True.", "Ünïcode 😀  two  spaces\n\tand ' .quotes"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_demo_prompts_fit_the_context(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in demo_prompts()]
    assert min(lengths) <= 8 and max(lengths) > 150
    assert max(lengths) <= model.config.max_position_embeddings == tokenizer.model_max_length


def test_answers_landmarks(lens: tuple[torch.Tensor, torch.Tensor]) -> None:
    probabilities, answers = lens
    right = probabilities[:, -1].argmax(-1) == answers
    asked = [prompt for prompt, _ in landmarks()]
    assert right[asked.index("The Eiffel Tower is in the city of")]
    assert len(asked) >= 60
    assert right.float().mean() >= 0.9
    assert right[:40].float().mean() >= 0.9


def test_eiffel_tower_is_in_paris(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    made = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(made[0, -1:]) == " Paris"


def test_answer_rises_late(lens: tuple[torch.Tensor, torch.Tensor]) -> None:
    probabilities, answers = lens
    of_answer = probabilities[torch.arange(len(answers)), :, answers].median(0).values
    layers = len(of_answer)
    assert of_answer[: layers // 2].max() < 0.1
    assert of_answer[-1] > 0.8
    assert of_answer[-1] > 5 * of_answer[layers // 2 - 1]


def test_probe_for_truth_rises_over_the_layers(loaded: tuple[Any, Any]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    items = statements()
    hidden = last_token_by_layer(loaded, [item.text for item in items]).numpy()
    labels = torch.tensor([item.label for item in items]).numpy()
    train, test = split(items)
    mean, scale = hidden[train].mean(0), hidden[train].std(0)
    hidden = (hidden - mean) / scale
    score = []
    for layer in range(hidden.shape[1]):
        fitted = linear_model.LogisticRegression(C=0.1, max_iter=2000).fit(hidden[train, layer], labels[train])
        score.append(fitted.score(hidden[test, layer], labels[test]))
    half = len(score) // 2
    assert score[0] < 0.65
    assert min(score[half:]) > 0.85
    assert sum(score[half:]) / (len(score) - half) > sum(score[:half]) / half + 0.1


def test_facts_of_every_relation_are_known(loaded: tuple[Any, Any]) -> None:
    from actcache.demo.prompts import completion

    model, tokenizer = loaded
    for relation in RELATIONS:
        asked = [completion(fact) for fact in facts(relation)]
        hidden = last_token_by_layer(loaded, [prompt for prompt, _ in asked])[:, -1]
        with torch.no_grad():
            guesses = model.lm_head(model.model.norm(hidden)).argmax(-1)
        right = [tokenizer.decode([guess]) == answer for guess, (_, answer) in zip(guesses, asked, strict=True)]
        assert sum(right) >= 0.9 * len(right), relation
