"""extract_batches: any batches, and for every prompt the values it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import actcache as ac
import zoo
from actcache.errors import (
    JoinError,
    PromptTypeError,
)
from actcache.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer
from extract_batches_helpers import PROMPTS, alone, close, in_batches, padded


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_what_the_prompt_gives_alone(family: str) -> None:
    model = tiny_model(family)
    names = zoo.expected_sites(family, model)
    sites = [name for name in names if name.rpartition(".")[-1] in ("1", "logits") and "pattern" not in name]
    for form in ("ids", "left", "right"):
        cache = ac.extract_batches(model, in_batches(PROMPTS, form), sites=sites)
        for site in sites:
            rows = cache.rows(site)
            assert len(rows) == len(PROMPTS)
            for row, prompt in zip(rows, PROMPTS, strict=True):
                alone = zoo.reference(family, 0, tuple(prompt))[site]
                assert zoo.relative_error(row.reshape(alone.shape), alone) < 2e-6, (form, site)
        # Ids and mask of every batch, whatever its width.
        mask = cache.attention_mask
        assert mask is not None
        assert cache.input_ids is not None
        if "encoder" not in sites[0] and "decoder" not in sites[0]:
            assert [ids[real].tolist() for ids, real in zip(cache.input_ids, mask, strict=True)] == PROMPTS


def test_padding_in_front_that_the_model_would_count() -> None:
    """Its positions are counted from the ids, and what lies under the mask need not be the padding id."""
    model = tiny_model("roberta")
    batch = padded(PROMPTS[:3], "left")
    batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] > 0, 7)
    cache = ac.extract_batches(model, [batch], sites="resid_post.1")
    for row, prompt in zip(cache.rows("resid_post.1"), PROMPTS, strict=False):
        assert zoo.relative_error(row, zoo.reference("roberta", 0, tuple(prompt))["resid_post.1"]) < 2e-6


@pytest.mark.parametrize("form", ["ids", "left", "right", "far left"])
def test_positions_count_real_tokens(model: Any, form: str) -> None:
    expected = [alone(model, prompt) for prompt in PROMPTS]
    cache = ac.extract_batches(model, in_batches(PROMPTS, form), sites="resid_post.2", positions="last")
    assert cache["resid_post.2"].shape == (7, 1, 32)
    close(cache["resid_post.2"][:, 0], torch.stack([row[-1] for row in expected]))
    named = {"first": 0, "end": (-2, -1), "both": [0, -1]}
    cache = ac.extract_batches(model, in_batches(PROMPTS, form), sites=["resid_post.2"], positions=named)
    found = cache.map_to_dict("resid_post.2")
    close(found["first"], torch.stack([row[0] for row in expected]))
    close(found["end"][:, 0], torch.stack([row[-2] for row in expected]))
    close(found["both"], torch.stack([row[[0, -1]] for row in expected]))


def test_other_spans_in_every_batch(model: Any) -> None:
    batches = [
        {"ids": [PROMPTS[0], PROMPTS[1]], "subject": [[1, 2], [5, 6, 7]]},
        {"ids": [PROMPTS[3]], "subject": [[0]]},
    ]
    cache = ac.extract_batches(
        model,
        ((batch["ids"], batch) for batch in batches),
        sites="resid_post.2",
        positions=lambda batch: {"subject": batch[1]["subject"], "last": -1},
    )
    subject = cache.at("subject")
    expected = [alone(model, PROMPTS[0])[1:3], alone(model, PROMPTS[1])[5:8], alone(model, PROMPTS[3])[:1]]
    for row, other in zip(subject.rows("resid_post.2"), expected, strict=True):
        close(row, other)
    close(cache.map_to_dict("resid_post.2")["last"][1], alone(model, PROMPTS[1])[-1])
    assert [ids[real].tolist() for ids, real in zip(subject.input_ids, subject.attention_mask, strict=True)] == [
        PROMPTS[0][1:3], PROMPTS[1][5:8], PROMPTS[3][:1],
    ]  # fmt: skip
    with pytest.raises(JoinError, match=r"batch 1: its positions are named \['a'\]"):
        ac.extract_batches(
            model, [[PROMPTS[0]], [PROMPTS[0]] * 2], sites="resid_post.2",
            positions=lambda batch: {"ab"[len(batch) == 1]: 0},
        )  # fmt: skip


def test_prompts_that_run_apart_keep_their_order_and_positions() -> None:
    model = tiny_model("llama-dynamic")
    batch = [PROMPTS[i] for i in (1, 3, 0, 6, 4)]
    where = [[0], [1, 2], [3], [19, 0], [8]]
    cache = ac.extract_batches(
        model, [batch, padded(batch, "left")], sites=["resid_post.2"], positions={"mine": where, "last": -1},
        columns=lambda batch: {"number": np.arange(5)},
    )  # fmt: skip
    for i in range(10):
        prompt, at = batch[i % 5], where[i % 5]
        expected = zoo.reference("llama-dynamic", 0, tuple(prompt))["resid_post.2"]
        close(cache.at("mine").rows("resid_post.2")[i], expected[at])
        close(cache.map_to_dict("resid_post.2")["last"][i], expected[-1])
    assert cache.columns["number"].tolist() == [0, 1, 2, 3, 4] * 2


def test_forms_of_batches(model: Any, tokenizer: Any) -> None:
    texts = ["a", "The Eiffel Tower", "two words"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = torch.stack([alone(model, prompt)[-1] for prompt in ids])
    lists = {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": [0, 1, 2], "text": texts}
    tensors = padded(ids, "right")
    forms = {
        "texts": [texts],
        "a text each": texts,
        "ids": [ids],
        "a prompt's ids each": [torch.tensor(i) for i in ids],
        "tensors of ids": [[torch.tensor(i) for i in ids]],
        "arrays of ids": [[np.asarray(i) for i in ids]],
        "a tensor each": [torch.tensor([i]) for i in ids],
        "an array each": [np.asarray([i]) for i in ids],
        "encoding": [tokenizer(texts, return_tensors="pt", padding=True)],
        "encoding as the loader": tokenizer(texts, return_tensors="pt", padding=True),
        "encoding of lists": [tokenizer(texts)],
        "lists": [lists],
        "lists of tensors": [{"input_ids": list(tensors["input_ids"]), "attention_mask": tensors["attention_mask"]}],
        "arrays": [{name: value.numpy() for name, value in tensors.items()}],
        # A class per prompt is not what a language model computes a loss from.
        "with labels": [{**tensors, "labels": torch.tensor([0, 1, 1]), "idx": torch.arange(3), "note": "x"}],
        "pair": [(tensors, torch.arange(3))],
        "pair of ids": [(ids, ["x", "y", "z"])],
        "pair of texts": [(tuple(texts), 3)],
        "list of a pair": [[texts, torch.arange(3)]],
        "generator": (text for text in texts),
    }
    for form, batches in forms.items():
        cache = ac.extract_batches(model, batches, sites="resid_post.2", positions="last", tokenizer=tokenizer)
        torch.testing.assert_close(cache["resid_post.2"][:, 0], expected, rtol=1e-5, atol=1e-5, msg=form)
        assert cache.tokens == [[tokenizer.convert_ids_to_tokens(i)[-1]] for i in ids], form


def test_loaders_of_torch(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([[*prompt[:3]] for prompt in PROMPTS if len(prompt) >= 3])
    expected = torch.stack([alone(model, prompt)[-1] for prompt in ids.tolist()])
    pairs = DataLoader(TensorDataset(ids, torch.arange(len(ids)) * 10), batch_size=2)
    cache = ac.extract_batches(
        model, pairs, sites="resid_post.2", positions=-1, columns=lambda batch: {"label": batch[1]}
    )
    close(cache["resid_post.2"][:, 0], expected)
    assert cache.columns["label"].tolist() == [0, 10, 20, 30, 40, 50]

    class Texts(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for i in range(5):
                yield {"text": "x" * (i + 1), "label": i, "name": f"n{i}"}

    texts: Any = DataLoader(Texts(), batch_size=2)
    cache = ac.extract_batches(
        model, ((batch["text"], batch) for batch in texts), sites="resid_post.2", positions="last",
        columns=["label", "name"], tokenizer=tokenizer,
    )  # fmt: skip
    assert cache.columns["label"].tolist() == [0, 1, 2, 3, 4]
    assert cache.columns["name"] == ["n0", "n1", "n2", "n3", "n4"]
    close(cache["resid_post.2"][4, 0], alone(model, tokenizer("xxxxx")["input_ids"])[-1])


def test_token_types_that_say_nothing_and_those_that_do() -> None:
    model = tiny_model("bert")
    right, left = padded(PROMPTS[:3], "right"), padded(PROMPTS[:3], "left")
    types = torch.zeros_like(right["input_ids"])
    quiet = ac.extract_batches(model, [right], sites="resid_post.1")
    for batch in ({**right, "token_type_ids": types}, {**left, "token_type_ids": types}):
        cache = ac.extract_batches(model, [batch], sites="resid_post.1")
        for one, other in zip(cache.rows("resid_post.1"), quiet.rows("resid_post.1"), strict=True):
            close(one, other)
    told = ac.extract_batches(model, [{**right, "token_type_ids": types + 1}], sites="resid_post.1")
    assert zoo.relative_error(told["resid_post.1"], quiet["resid_post.1"]) > 0.01


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images).amax((2, 3)))


def test_a_model_that_takes_no_tokens() -> None:
    model, images, classes = Convolutions(), torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 1, 0, 1])
    loader = DataLoader(TensorDataset(images, classes), batch_size=2)
    cache = ac.extract_batches(model, loader, modules=["first", "head"], columns=lambda b: {"class": b[1]})
    close(cache["first"].output, model.first(images).detach())
    close(cache["head"].output, model(images).detach())
    assert cache.columns["class"].tolist() == classes.tolist()
    named = ac.extract_batches(model, [{"images": images[:3], "label": classes[:3]}], modules="first")
    close(named["first"].output, model.first(images[:3]).detach())
    whole = ac.extract_batches(model, images, modules="first")
    close(whole["first"].output, model.first(images).detach())
    with pytest.raises(PromptTypeError, match="fields 'pixels', and Convolutions needs 'images'"):
        ac.extract_batches(model, [{"pixels": images}], modules="first")
