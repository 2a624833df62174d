"""Attention between groups of tokens in many batches, joined and averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.errors import OptionError
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from attention_blocks_helpers import by_hand, causal

IDS = [101, 102, 103, 104, 105, 106]
S, D = len(IDS), 32


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def both_sides(q: int, k: int) -> bool:
    return True


def eager(family: str, ids: list[int]) -> tuple[Tensor, ...]:
    """What transformers itself returns of attention, a layer each: [H, S, S]."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return tuple(layer[0] for layer in model(torch.tensor([ids]), output_attentions=True).attentions)


class TestInBatches:
    PROMPTS = (IDS, IDS[:4], [7, 8, 9, 10, 11], [5, 6, 7])

    def own(self, family: str, layer: int) -> list[Tensor]:
        return [eager(family, list(ids))[layer] for ids in self.PROMPTS]

    @pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
    def test_patterns_of_batches(self, family: str) -> None:
        model = tiny_model(family)
        batches = [list(self.PROMPTS[:2]), list(self.PROMPTS[2:3]), list(self.PROMPTS[3:])]
        cache = ac.extract_batches(model, batches, sites="pattern")
        assert cache["pattern.1"].shape == (4, 4, S, S)
        for layer in range(4):
            for row, other in zip(cache.rows(f"pattern.{layer}"), self.own(family, layer), strict=True):
                close(row, other)
                close(row.sum(-1), torch.ones(row.shape[:2]))

    @pytest.mark.parametrize("family", ["gpt2", "bert", "llama-dynamic"])
    @pytest.mark.parametrize("reduce", ["mean", "sum", "uniform_ratio"])
    def test_blocks_of_batches(self, family: str, reduce: str) -> None:
        model = tiny_model(family)
        keys: dict[str, Any] = {"start": (0, 2), "last": -1}
        for queries in (None, {"last": -1}, {"last": -1, "middle": [1, -2, 1]}):
            blocks = ac.AttentionBlocks(keys=keys, queries=queries, reduce=reduce)
            loader = [list(self.PROMPTS[:2]), list(self.PROMPTS[2:])]
            cache = ac.extract_batches(
                model, loader, sites=["pattern", "resid_post.3"], layers=[1, 3], attention=blocks
            )
            assert sorted(cache) == ["attention_blocks.1", "attention_blocks.3", "resid_post.3"]
            found = cache["attention_blocks.3"]
            rows = list((queries or keys).values())
            assert found.shape == (4, 4, len(rows), 2)
            seen = both_sides if family == "bert" else causal
            for i, pattern in enumerate(self.own(family, 3)):
                for r, row in enumerate(rows):
                    for c, column in enumerate(keys.values()):
                        expected = by_hand(pattern, row, column, reduce, seen).float()
                        torch.testing.assert_close(found[i, :, r, c], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
            whole = ac.run_with_cache(model, list(self.PROMPTS[0]), sites="pattern.3")[1]
            torch.testing.assert_close(
                blocks.of(whole)["attention_blocks.3"][0], found[0], rtol=1e-4, atol=1e-5, equal_nan=True
            )

    @pytest.mark.parametrize(
        ("family", "windows"),
        [("mistral", (8, 8)), ("gpt_neo", (None, 8)), ("gemma3", (8, None)), ("gpt_oss", (8, None))],
    )
    def test_windows_that_slide(self, family: str, windows: tuple[int | None, int | None]) -> None:
        prompts = [[5 + 7 * i for i in range(n)] for n in (13, 9, 4)]
        blocks = ac.AttentionBlocks(
            keys={"start": (0, 2), "end": (-3, -1)}, queries={"last": -1, "middle": [3, -2]}, reduce="uniform_ratio"
        )
        cache = ac.extract_batches(
            tiny_model(family), [prompts[:2], prompts[2:]], sites="pattern", layers=[0, 1], attention=blocks
        )
        for layer, window in enumerate(windows):
            for i, ids in enumerate(prompts):
                pattern = eager(family, ids)[layer]
                for r, row in enumerate(([-1], [3, -2])):
                    for c, column in enumerate(((0, 2), (-3, -1))):
                        expected = by_hand(
                            pattern, row, column, "uniform_ratio",
                            lambda q, k, window=window: k <= q and (window is None or q - k < window),
                        )  # fmt: skip
                        found = cache[f"attention_blocks.{layer}"][i, :, r, c]
                        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_groups_by_what_a_chat_says(self, gpt2: Any) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        chats = [
            [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        ]
        blocks = ac.AttentionBlocks(
            keys={"question": ac.tokens_of("user")}, queries={"answer": ac.tokens_of("assistant")}, reduce="sum"
        )
        cache = ac.extract_batches(gpt2, [chats], sites="pattern.2", attention=blocks, tokenizer=tokenizer)
        # u:2+2?;a:4; and u:Hi;a:Hello;
        for i, (text, question, answer) in enumerate(
            [("u:2+2?;a:4;", (2, 6), (9, 10)), ("u:Hi;a:Hello;", (2, 4), (7, 12))]
        ):
            pattern = eager("gpt2", tokenizer.convert_tokens_to_ids(list(text)))[2]
            close(cache["attention_blocks.2"][i, :, 0, 0], pattern[:, slice(*answer), slice(*question)].sum((1, 2)))

    def test_mean_of_blocks(self, gpt2: Any) -> None:
        blocks = ac.AttentionBlocks(keys={"start": (0, 2), "last": -1}, reduce="uniform_ratio")
        loader = [list(self.PROMPTS[:2]), list(self.PROMPTS[2:3]), list(self.PROMPTS[3:])]
        options: dict[str, Any] = {"sites": ["pattern.2"], "attention": blocks}
        each = ac.extract_batches(gpt2, loader, **options)["attention_blocks.2"]
        mean = ac.extract_batches(gpt2, loader, reduce="mean", **options)
        assert mean["attention_blocks.2"].shape == (4, 2, 2)
        torch.testing.assert_close(
            mean["attention_blocks.2"].value(), each.mean(0), rtol=1e-5, atol=1e-6, equal_nan=True
        )
        assert mean["attention_blocks.2"][:, 0, 1].isnan().all()
        assert mean.info("attention_blocks.2")["queries"] == ["start", "last"]
        both = ac.extract_batches(
            gpt2, loader, sites=["pattern.2", "resid_post.1"], positions="last", reduce="mean", attention=blocks
        )
        assert both["resid_post.1"].shape == (D,)
        torch.testing.assert_close(
            both["attention_blocks.2"].value(), mean["attention_blocks.2"].value(), equal_nan=True
        )

    def test_examples_without_an_answer_do_not_count(self, gpt2: Any) -> None:
        """The second example's key lies behind its query."""
        keys = {"it": [[0], [2], [1]]}
        blocks = ac.AttentionBlocks(keys=keys, queries={"second": 1}, reduce="uniform_ratio")
        prompts = [IDS, IDS[:4], [7, 8, 9]]
        mean = ac.extract_batches(gpt2, [prompts], sites="pattern.1", attention=blocks, reduce="mean")
        ratios = [eager("gpt2", ids)[1][:, 1, at] * 2 for ids, at in ((IDS, 0), ([7, 8, 9], 1))]
        close(mean["attention_blocks.1"][:, 0, 0], torch.stack(ratios).mean(0))

    @pytest.mark.parametrize("family", ["gpt2", "llama-dynamic"])
    def test_other_groups_in_every_batch(self, family: str) -> None:
        model = tiny_model(family)
        loader = [([IDS], [[1, 2]]), ([IDS, IDS[:4]], [[3], [0, 1]])]
        cache = ac.extract_batches(
            model, loader, sites="pattern.0",
            attention=lambda batch: ac.AttentionBlocks(keys={"it": batch[1]}, queries={"last": -1}, reduce="sum"),
        )  # fmt: skip
        patterns = [eager(family, IDS)[0], eager(family, IDS)[0], eager(family, IDS[:4])[0]]
        for i, at in enumerate([[1, 2], [3], [0, 1]]):
            close(cache["attention_blocks.0"][i, :, 0, 0], patterns[i][:, -1, at].sum(-1))
        with pytest.raises(ac.ActCacheError, match="batch 1: its groups of keys are named"):
            ac.extract_batches(
                model, [[IDS], [IDS, IDS]], sites="pattern.0",
                attention=lambda batch: ac.AttentionBlocks(keys={f"a{len(batch)}": 0}),
            )  # fmt: skip

    def test_mean_of_patterns(self, gpt2: Any) -> None:
        twice = ac.extract_batches(gpt2, [[IDS, IDS]], sites="pattern.1", reduce="mean")["pattern.1"]
        assert twice.shape == (4, S, S)
        close(twice, eager("gpt2", IDS)[1])
        other = [7, 8, 9, 10, 11, 12]
        three = ac.extract_batches(gpt2, [[IDS, IDS], [other]], sites="pattern.1", reduce="mean")["pattern.1"]
        close(three, (2 * eager("gpt2", IDS)[1] + eager("gpt2", other)[1]) / 3)
        last = ac.extract_batches(gpt2, [[IDS, IDS], [other]], sites="pattern.1", positions="last", reduce="mean")
        close(last["pattern.1"], three[:, -1])
        with pytest.raises(ac.ActCacheError, match=r"batch 1: 'pattern.1' cannot be averaged .*AttentionBlocks"):
            ac.extract_batches(gpt2, [[IDS], [IDS[:3]]], sites="pattern.1", reduce="mean")

    def test_what_is_asked_for_wrongly(self, gpt2: Any) -> None:
        blocks = ac.AttentionBlocks(keys={"first": 0})
        for options, message in (
            ({"sites": "resid_post", "attention": blocks}, "name them too, sites='pattern'"),
            ({"modules": "transformer.h.0", "attention": blocks}, "name them too"),
            ({"sites": "pattern", "attention": {"keys": 0}}, "expected ac.AttentionBlocks"),
            ({"sites": "pattern", "attention": lambda batch: 3}, "attention returned a int"),
            ({"sites": "pattern", "attention": blocks, "positions": "last"}, "positions= has nothing to choose from"),
        ):
            with pytest.raises(OptionError, match=message):
                ac.extract_batches(gpt2, [[IDS]], **options)

    def test_reading_patterns_changes_nothing_else(self) -> None:
        """Another implementation of attention runs for them, to the same values."""
        llama = tiny_model("llama")
        before = llama.config._attn_implementation
        plain = ac.extract_batches(llama, [[IDS]], sites="resid_post")
        with_patterns = ac.extract_batches(llama, [[IDS]], sites=["resid_post", "pattern"])
        for layer in range(4):
            close(plain[f"resid_post.{layer}"], with_patterns[f"resid_post.{layer}"])
        assert llama.config._attn_implementation == before != "eager"
