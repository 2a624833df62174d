"""extract_batches: any batches, and for every prompt the values it has alone."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import actcache as ac
import zoo
from actcache.capture import extract_batches as module
from actcache.errors import (
    JoinError,
    LayerRangeError,
    OptionError,
    PromptError,
    PromptTypeError,
    UnknownModuleError,
    UnknownSiteError,
)
from actcache.testing.tiny import BOS, FAMILIES, PAD, tiny_model, tiny_tokenizer

RNG = random.Random(3)
PROMPTS = [[BOS, *(RNG.randrange(3, 259) for _ in range(n))] for n in (4, 16, 2, 9, 9, 1, 20)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def padded(prompts: list[list[int]], side: str, *, longest: int | None = None) -> dict[str, Tensor]:
    longest = longest or max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), PAD), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        at = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def in_batches(prompts: list[list[int]], form: str) -> Iterator[Any]:
    for start in (0, 3, 6):
        batch = prompts[start : start + 3]
        yield batch if form == "ids" else padded(batch, form, longest=24 if form == "far left" else None)


def alone(model: Any, prompt: list[int], path: str = "transformer.h.2") -> Tensor:
    """What a block returns for one prompt, by a hook of torch: [T, D]."""
    found: list[Tensor] = []

    def note(_m: Any, _a: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = model.get_submodule(path).register_forward_hook(note)
    with torch.no_grad():
        model(torch.tensor([prompt]))
    handle.remove()
    return found[0][0]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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


def test_columns_are_kept_row_by_row(model: Any) -> None:
    given = [
        {
            "n": [3, 4],
            "s": ("a", "bb"),
            "t": torch.tensor([[1.5], [2.5]]),
            "a": np.array(["x", "yyy"]),
            "o": [None, {}],
        },
        {"n": [5], "s": ["ccc"], "t": torch.tensor([[3.5]]), "a": np.array(["z"]), "o": [(1, 2)]},
    ]
    batches = zip([PROMPTS[:2], PROMPTS[2:3]], given, strict=True)
    cache = ac.extract_batches(model, batches, sites="resid_post.0", columns=lambda batch: batch[1])
    assert cache.columns["n"] == [3, 4, 5]
    assert cache.columns["s"] == ["a", "bb", "ccc"]
    assert torch.equal(cache.columns["t"], torch.tensor([[1.5], [2.5], [3.5]]))
    assert cache.columns["a"].tolist() == ["x", "yyy", "z"]
    assert cache.columns["o"] == [None, {}, (1, 2)]
    assert cache.select(prompts=[2, 0]).columns["n"] == [5, 3]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (lambda b: {"label": [1]}, OptionError, "batch 0: column 'label' has 1 values, and the batch has 2 prompts"),
        (lambda b: {"label": "ab"}, OptionError, "column 'label' is 'ab'"),
        (lambda b: {"label": 3}, OptionError, "column 'label' is 3"),
        (lambda b: {"label": torch.tensor(3)}, OptionError, "column 'label'"),
        (lambda b: [1, 2], OptionError, "returned a list"),
        (["lable"], OptionError, "column 'lable' is no field of the batch: .*Did you mean 'label'"),
        ("label", OptionError, "expected a function of the batch, or a list of field names"),
        ([], OptionError, "expected a function"),
        (lambda b: {"n": [1] * 2, "w": b["width"]}, JoinError, r"batch 1: column 'w' is a tensor of float32, .*int64"),
        (lambda b: {"n": [1] * 2, **b["more"]}, JoinError, "batch 1: column 'x' is not there"),
    ],
)
def test_columns_that_do_not_fit(model: Any, columns: Any, error: type[Exception], message: str) -> None:
    batches = [
        {**padded(PROMPTS[:2], "left"), "label": [1, 2], "width": torch.tensor([1, 2]), "more": {"x": [1, 2]}},
        {**padded(PROMPTS[:2], "left"), "label": [1, 2], "width": torch.tensor([1.0, 2]), "more": {}},
    ]
    with pytest.raises(error, match=message):
        ac.extract_batches(model, batches, sites="resid_post.0", columns=columns)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ("text", PromptTypeError, "dataloader is 'text': expected batches"),
        (7, PromptTypeError, "dataloader is 7"),
        ([], PromptError, "no batch"),
        ([PROMPTS[:1], [[300]]], PromptError, "batch 1: prompt 0 holds token id 300"),
        ([[[5] * 65]], PromptError, "65 tokens, the model's context is 64"),
        ([{"ids": torch.ones(1, 3).long()}], PromptTypeError, "fields 'ids', and GPT2LMHeadModel needs 'input_ids'"),
        ([{"text": ["a"], "label": [1]}], PromptTypeError, r"\(\(batch\['text'\], batch\) for batch in loader\)"),
        ([{"input_ids": torch.ones(3).long()}], PromptTypeError, r"'input_ids' of the batch is \[3\]: expected .*B, S"),
        (
            [{**padded(PROMPTS[:2], "left"), "attention_mask": torch.ones(2, 3)}],
            PromptTypeError,
            r"'attention_mask' of the batch is \[2, 3\], and 'input_ids' is \[2, 17\]",
        ),
        (
            [{**padded(PROMPTS[:2], "left"), "position_ids": torch.ones(3, 17)}],
            PromptTypeError,
            "'position_ids'.*3 rows",
        ),
        ([{"input_ids": torch.full((1, 2), 999)}], PromptError, "token id 999"),
        ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)}], PromptError, "no tokens"),
        ([{"input_ids": [["a"]]}], PromptTypeError, "'input_ids' of the batch is no rectangle of numbers"),
        ([("a", "b")], PromptTypeError, r"read as \(inputs, anything\)"),
        ([([5, 6], [7, 8])], PromptTypeError, r"read as \(inputs, anything\)"),
        ([()], PromptError, "empty tuple"),
        ([[torch.ones(1, 3).long(), torch.ones(1, 2).long()]], PromptTypeError, "several prompts, or one and what"),
        ([3], PromptError, "batch 0: there is no prompt"),
    ],
)
def test_batches_that_cannot_be_read(model: Any, batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ac.extract_batches(model, batches, sites="resid_post.0")
    assert ac.extract_batches(model, [PROMPTS[:2]], sites="resid_post.0")["resid_post.0"].shape == (2, 17, 32)


def test_what_is_asked_for_is_checked_before_the_first_batch(model: Any) -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was taken")
        yield

    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, OptionError, "name sites=, modules= or both"),
        ({"sites": "resid_psot"}, UnknownSiteError, "resid_post"),
        ({"sites": "resid_post.9"}, LayerRangeError, "layer 9"),
        ({"modules": "transformer.k"}, UnknownModuleError, "transformer.k"),
        ({"sites": "resid_post", "positions": "lats"}, OptionError, "'last'"),
        ({"sites": "resid_post", "positions": {}}, OptionError, "empty dict"),
        ({"sites": "resid_post", "reduce": "maen"}, OptionError, "'mean'"),
        ({"sites": "resid_post", "reduce": "mean", "columns": ["x"]}, OptionError, "columns have no rows"),
        ({"modules": "transformer.h.0", "reduce": "mean"}, OptionError, "modules have no known positions"),
        ({"sites": "resid_post", "dtype": "float3"}, OptionError, "float32"),
        ({"sites": "resid_post", "into": {}}, OptionError, "into must be an ActivationCache"),
        ({"sites": "resid_post", "into": ac.ActivationCache(), "reduce": "mean"}, OptionError, "mean is not joined"),
        ({"sites": "resid_post", "edits": {"resid_psot.1": torch.relu}}, ac.ActCacheError, "resid_post"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            ac.extract_batches(model, never(), **options)
    with pytest.raises(OptionError, match="not str"):
        ac.extract_batches("gpt2", never(), sites="resid_post")  # type: ignore[arg-type]


def test_modules_are_joined_per_visit(model: Any) -> None:
    cache = ac.extract_batches(model, in_batches(PROMPTS, "ids"), modules=["transformer.h.2", "transformer.h.*.mlp"])
    assert len(cache) == 5
    for row, prompt in zip(cache.rows("transformer.h.2"), PROMPTS, strict=True):
        close(row, alone(model, prompt))
    assert len(cache["transformer.h.2"]) == 1
    cache = ac.extract_batches(
        model, in_batches(PROMPTS, "ids"), modules="transformer.h.0.mlp", include_inputs=True, include_output=False
    )
    assert cache["transformer.h.0.mlp"].input.shape == (7, 21, 32)
    assert cache["transformer.h.0.mlp"].output is None


def test_the_head_does_not_run_unless_logits_are_asked_for(model: Any) -> None:
    runs: list[str] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: runs.append(path))
        for path in ("transformer.h.3", "lm_head")
    ]
    cache = ac.extract_batches(model, [PROMPTS[:2]], sites="resid_post", layers=[0, 1])
    assert runs == []
    assert sorted(cache) == ["resid_post.0", "resid_post.1"]
    cache = ac.extract_batches(model, [PROMPTS[:2], PROMPTS[2:3]], sites=["logits"], positions="last")
    for handle in handles:
        handle.remove()
    assert runs == ["transformer.h.3", "lm_head"] * 2
    with torch.no_grad():
        close(cache["logits"][2, 0], model(torch.tensor([PROMPTS[2]])).logits[0, -1])


def test_values_leave_with_their_batch_in_the_dtype_asked_for(model: Any) -> None:
    seen: list[torch.dtype] = []

    def batches() -> Iterator[Any]:
        for prompt in PROMPTS:
            yield [prompt]

    cache = ac.extract_batches(model, batches(), sites="resid_post.1", dtype=torch.bfloat16)
    seen.append(cache["resid_post.1"].dtype)
    assert seen == [torch.bfloat16]
    assert cache["resid_post.1"].shape == (7, 21, 32)
    assert cache["resid_post.1"].is_contiguous()
    # Only what was asked for is kept: one tensor, without what it was joined from.
    assert cache.nbytes == 7 * 21 * 32 * 2
    assert not cache["resid_post.1"].requires_grad


def test_the_model_is_as_before(model: Any) -> None:
    model.train()
    try:
        quiet = ac.run_with_cache(model, PROMPTS[0], sites="resid_post.3")[1]
        before = [(dict(m._forward_hooks), m.training, list(m.__dict__)) for m in model.modules()]
        cache = ac.extract_batches(model, [PROMPTS[:1]], sites="resid_post.3")
        assert torch.equal(cache["resid_post.3"], quiet["resid_post.3"])
        with pytest.raises(PromptError):
            ac.extract_batches(model, [PROMPTS[:1], [[999]]], sites="resid_post.3")
        assert [(dict(m._forward_hooks), m.training, list(m.__dict__)) for m in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


class TestInterrupts:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
    def test_in_a_pass(self, model: Any, error: type[BaseException]) -> None:
        passes: list[int] = []

        def interrupt(*_: Any) -> None:
            passes.append(1)
            if len(passes) == 3:
                raise error("now")

        handle = model.transformer.h[2].register_forward_hook(interrupt)
        collected = ac.ActivationCache()
        before = [list(m.__dict__) for m in model.modules()]
        try:
            with pytest.raises(error, match="now") as raised:
                ac.extract_batches(
                    model, ([prompt] for prompt in PROMPTS), sites="resid_post.1", modules="transformer.h.2",
                    into=collected, columns=lambda batch: {"length": [len(batch[0])]},
                )  # fmt: skip
        finally:
            handle.remove()
        if error is RuntimeError:
            assert raised.value.__notes__ == ["This was batch 2, counted from 0."]
        assert [list(m.__dict__) for m in model.modules()] == before
        # What was finished is there, and the run goes on behind it.
        assert collected.columns["length"] == [5, 17]
        ac.extract_batches(
            model, [PROMPTS[2:]], sites="resid_post.1", modules="transformer.h.2", into=collected,
            columns=lambda batch: {"length": list(map(len, batch))},
        )  # fmt: skip
        assert collected.columns["length"] == list(map(len, PROMPTS))
        for row, prompt in zip(collected.rows("resid_post.1"), PROMPTS, strict=True):
            close(row, alone(model, prompt, "transformer.h.1"))
        assert collected.input_ids[:2, :5].tolist() == [PROMPTS[0], PROMPTS[1][:5]]

    def test_in_the_loader(self, model: Any) -> None:
        def batches() -> Iterator[Any]:
            yield PROMPTS[:2]
            raise KeyboardInterrupt

        collected = ac.ActivationCache()
        with pytest.raises(KeyboardInterrupt):
            ac.extract_batches(model, batches(), sites="resid_post.1", into=collected)
        assert collected["resid_post.1"].shape == (2, 17, 32)


def test_edits_of_every_pass(model: Any) -> None:
    edits = [ac.ablate("mlp_out.1"), ac.steer("resid_post.0", torch.ones(32), positions="last")]
    cache = ac.extract_batches(model, in_batches(PROMPTS, "left"), sites="resid_post.2", edits=edits)
    for row, prompt in zip(cache.rows("resid_post.2"), PROMPTS, strict=True):
        with ac.edit(model, edits):
            close(row, alone(model, prompt))
    assert zoo.relative_error(cache.rows("resid_post.2")[0], alone(model, PROMPTS[0])) > 0.1
    # Behind the last site an edit changes nothing that is kept, and is no mistake.
    behind = ac.extract_batches(model, [PROMPTS[:1]], sites="resid_post.0", edits=ac.ablate("mlp_out.3"))
    close(behind["resid_post.0"][0], alone(model, PROMPTS[0], "transformer.h.0"))
    apart = tiny_model("llama-dynamic")
    assert ac.extract_batches(apart, [PROMPTS[:2]], sites="resid_post.2", edits=edits)["resid_post.2"].shape[0] == 2
    for edits_of_batch in ({"mlp_out.1": lambda x: x * 0}, ac.ablate("mlp_out.1", positions=[[0], [1]])):
        with pytest.raises(PromptError, match="its edits may belong to the batch as a whole"):
            ac.extract_batches(apart, [PROMPTS[:2]], sites="resid_post.2", edits=edits_of_batch)


def test_fields_that_cannot_be_taken_apart() -> None:
    model = tiny_model("llama-dynamic")
    batch = padded(PROMPTS[:2], "right")
    with pytest.raises(PromptError, match=r"depend on the longest prompt .* the field 'position_ids'"):
        ac.extract_batches(model, [{**batch, "position_ids": torch.arange(17)[None]}], sites="resid_post.0")
    embeds, mask = torch.randn(2, 17, 32), batch["attention_mask"]
    with pytest.raises(PromptError, match="'inputs_embeds'"):
        ac.extract_batches(model, [{"inputs_embeds": embeds, "attention_mask": mask}], sites="resid_post.0")
    cache = ac.extract_batches(model, [{"inputs_embeds": embeds}], sites="resid_post.0")
    with torch.no_grad():
        close(cache["resid_post.0"][1], _block(model, embeds[1:])[0])


def _block(model: Any, embeds: Tensor) -> Tensor:
    found: list[Any] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, output: found.append(output))
    model(inputs_embeds=embeds)
    handle.remove()
    return found[0] if isinstance(found[0], Tensor) else found[0][0]


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


def test_batches_are_let_go_and_shown(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch at a time is alive, and the bar counts them."""
    shown: list[Any] = []

    class Bar:
        def update(self, n: int = 1) -> None:
            shown.append(n)

    class Progress:
        def __init__(self, total: Any, description: str, *, unit: str) -> None:
            shown.append((total, unit))

        def __enter__(self) -> Bar:
            return Bar()

        def __exit__(self, *_: Any) -> None:
            shown.append("closed")

    monkeypatch.setattr(module, "progress", Progress)

    class Batch(dict[str, Tensor]):
        pass

    alive: weakref.WeakSet[Batch] = weakref.WeakSet()
    most = 0

    def batches() -> Iterator[Batch]:
        nonlocal most
        for prompt in PROMPTS:
            batch = Batch(padded([prompt], "right"))
            # A dict has no hash.
            Batch.__hash__ = object.__hash__  # type: ignore[assignment]
            alive.add(batch)
            gc.collect()
            most = max(most, len(alive))
            yield batch
            del batch

    ac.extract_batches(model, batches(), sites="resid_post.0")
    assert shown == [(None, "batch"), *[1] * 7, "closed"]
    # The one that is being made, and the one before.
    assert most <= 2
    ac.extract_batches(model, [PROMPTS[:1]] * 3, sites="resid_post.0")
    assert shown[9] == (3, "batch")
