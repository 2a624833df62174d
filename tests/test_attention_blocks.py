"""Attention between groups of tokens, held against sums over pairs written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
from actcache.capture.tokens import Tokens
from actcache.errors import LayerRangeError, OptionError, SiteUnavailableError, UnknownKeyError
from actcache.testing.tiny import tiny_model, tiny_tokenizer

GROUPS: dict[str, Any] = {"subject": (1, 4), "last": -1, "two": [0, -2], "twice": [2, 2]}


IDS = [101, 102, 103, 104, 105, 106]
S, D = len(IDS), 32


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return tiny_model("gpt2")


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def softmaxed(n: int, *, causal: bool = True, window: int | None = None, seed: int = 0) -> Tensor:
    scores = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed))
    at = torch.arange(n)
    hidden = torch.zeros(n, n, dtype=torch.bool)
    if causal:
        hidden |= at[None] > at[:, None]
    if window is not None:
        hidden |= (at[:, None] - at[None]).abs() >= window
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def cache_of(*own: Tensor, side: str = "right", pad: int = 0, key: str = "pattern.0") -> ac.ActivationCache:
    """A cache as a pass leaves it; what is behind the mask is made up."""
    longest = max(pattern.shape[-1] for pattern in own) + pad
    values, mask = torch.full((len(own), 2, longest, longest), 7.0), torch.zeros(len(own), longest, dtype=torch.bool)
    for row, pattern in enumerate(own):
        n = pattern.shape[-1]
        at = slice(longest - n, None) if side == "left" else slice(n)
        values[row, :, at, at] = pattern
        mask[row, at] = True
    cache = ac.ActivationCache({key: values, "resid_post.0": torch.randn(len(own), longest, 4)})
    cache._tokens = {None: Tokens(None, mask)}
    return cache


def places(choice: Any, n: int) -> list[int]:
    """By hand, for the groups of this file."""
    if isinstance(choice, tuple):
        return list(range(n))[slice(*choice)]
    return sorted({range(n)[p] for p in (choice if isinstance(choice, list) else [choice])})


def by_hand(pattern: Tensor, queries: Any, keys: Any, reduce: str, seen: Any) -> Tensor:
    n = pattern.shape[-1]
    pairs = [(q, k) for q in places(queries, n) for k in places(keys, n)]
    total = sum((pattern[:, q, k].double() for q, k in pairs), torch.zeros(len(pattern), dtype=torch.float64))
    if reduce == "sum":
        return total
    if reduce == "mean":
        return total / len(pairs)
    even = sum(1 / sum(seen(q, j) for j in range(n)) for q, k in pairs if seen(q, k))
    return total / even if even else torch.full((len(pattern),), math.nan, dtype=torch.float64)


def causal(q: int, k: int) -> bool:
    return k <= q


def both_sides(q: int, k: int) -> bool:
    return True


@pytest.mark.parametrize("reduce", ["mean", "sum", "uniform_ratio"])
@pytest.mark.parametrize(("side", "pad"), [("right", 0), ("left", 0), ("left", 3), ("right", 3)])
def test_every_pair_of_groups(reduce: str, side: str, pad: int) -> None:
    own = [softmaxed(n, seed=n) for n in (5, 9, 6)]
    blocks = ac.AttentionBlocks(keys=GROUPS, queries={"end": (-3, -1), **GROUPS}, reduce=reduce)
    cache = cache_of(*own, side=side, pad=pad)
    result = blocks.of(cache)
    assert list(result) == ["attention_blocks.0"]
    assert result["attention_blocks.0"].shape == (3, 2, 5, 4)
    for i, pattern in enumerate(own):
        for row, queries in enumerate([(-3, -1), *GROUPS.values()]):
            for column, keys in enumerate(GROUPS.values()):
                expected = by_hand(pattern, queries, keys, reduce, causal)
                found = result["attention_blocks.0"][i, :, row, column].double()
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert result.info("attention_blocks.0") == {
        "queries": ["end", *GROUPS], "keys": list(GROUPS), "reduce": reduce,
    }  # fmt: skip
    # Rows stay those of the prompts; what it was made from is as before.
    assert "pattern.0" in cache
    assert result.select(prompts=[2])["attention_blocks.0"].shape == (1, 2, 5, 4)
    assert [row.shape for row in result.rows("attention_blocks.0")] == [(2, 5, 4)] * 3


def test_without_groups_of_queries_those_of_keys() -> None:
    cache = cache_of(softmaxed(6))
    one = ac.AttentionBlocks(keys={"a": (0, 3), "b": (3, 6)}).of(cache)["attention_blocks.0"]
    other = ac.AttentionBlocks(keys={"a": (0, 3), "b": (3, 6)}, queries={"a": (0, 3), "b": (3, 6)}).of(cache)
    assert one.shape == (1, 2, 2, 2)
    assert torch.equal(one.value(), other["attention_blocks.0"].value())
    assert one[0, :, 0, 1].tolist() == [0, 0]


def test_all_keys_are_all_of_attention() -> None:
    """Rows sum to 1, however the keys are split."""
    cache = cache_of(softmaxed(7), softmaxed(4), side="left")
    split = ac.AttentionBlocks(
        keys={"a": (0, 2), "b": [2, 3], "rest": [[4, 5, 6], [0]]}, queries={"last": -1}, reduce="sum"
    )
    whole = ac.AttentionBlocks(keys={"all": "all"}, queries={"last": -1}, reduce="sum").of(cache)["attention_blocks.0"]
    torch.testing.assert_close(whole.value(), torch.ones(2, 2, 1, 1))
    parts = split.of(cache)["attention_blocks.0"].sum(-1)
    torch.testing.assert_close(parts[0, :, 0], torch.ones(2))


def test_groups_of_each_prompt() -> None:
    own = [softmaxed(5), softmaxed(8)]
    blocks = ac.AttentionBlocks(keys={"subject": [[1, 2], [4]]}, queries={"last": "last"}, reduce="sum")
    found = blocks.of(cache_of(*own))["attention_blocks.0"]
    torch.testing.assert_close(found[0, :, 0, 0], own[0][:, -1, 1:3].sum(-1))
    torch.testing.assert_close(found[1, :, 0, 0], own[1][:, -1, 4])


class TestEvenlySpread:
    """A uniform row has the ratio 1 wherever it can be asked for."""

    def of(self, cache: ac.ActivationCache) -> Tensor:
        blocks = ac.AttentionBlocks(
            keys=GROUPS, queries={"last": -1, "end": (-2, -1), "all": "all"}, reduce="uniform_ratio"
        )
        found: Tensor = blocks.of(cache)["attention_blocks.0"].value()
        return found

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_causal(self, side: str) -> None:
        own = [(torch.ones(2, n, n).tril() / torch.arange(1, n + 1)[:, None]) for n in (5, 8)]
        found = self.of(cache_of(*own, side=side, pad=2))
        torch.testing.assert_close(found[:, :, [0, 2]], torch.ones(2, 2, 2, 4))
        # The last token is not seen by the ones before it.
        assert found[:, :, 1].isnan().tolist() == [[[False, True, False, False]] * 2] * 2

    def test_to_both_sides(self) -> None:
        found = self.of(cache_of(torch.full((2, 5, 5), 1 / 5), torch.full((2, 7, 7), 1 / 7), side="left"))
        torch.testing.assert_close(found, torch.ones(2, 2, 3, 4))

    def test_in_a_window(self) -> None:
        model = tiny_model("mistral")
        n, window = 12, 8
        seen = torch.ones(n, n).tril().triu(1 - window)
        cache = cache_of((seen / seen.sum(1, keepdim=True)).expand(2, n, n), pad=1)
        with pytest.raises(SiteUnavailableError, match=r"'pattern.0': how many keys .* last query .* reduce='mean'"):
            self.of(cache)
        cache._model = lambda: model  # type: ignore[assignment]
        found = self.of(cache)
        torch.testing.assert_close(found[:, :, 2], torch.ones(1, 2, 4))
        # The last token sees the last 8 only: of the subject nothing.
        assert found[0, 0, 0].isnan().tolist() == [True, False, False, True]
        wider = cache_of(softmaxed(n, window=10))
        wider._model = lambda: model  # type: ignore[assignment]
        with pytest.raises(SiteUnavailableError, match="further back than the window of 8"):
            self.of(wider)
        # In a prompt inside the window nothing slides.
        assert not self.of(cache_of(softmaxed(6, window=8)))[:, :, 0].isnan().any()

    def test_windows_to_both_sides_and_prefixes_are_refused(self) -> None:
        with pytest.raises(SiteUnavailableError, match="last query does not look at its first key"):
            self.of(cache_of(softmaxed(9, causal=False, window=4)))
        prefix = softmaxed(9)
        prefix[:, :3, :3] = 1 / 3
        with pytest.raises(SiteUnavailableError, match="how many keys a query sees is not known"):
            self.of(cache_of(prefix))

    def test_one_token(self) -> None:
        blocks = ac.AttentionBlocks(keys={"it": 0}, reduce="uniform_ratio")
        assert blocks.of(cache_of(torch.ones(2, 1, 1)))["attention_blocks.0"].tolist() == [[[[1.0]], [[1.0]]]]


def test_one_head_and_other_names_of_a_pattern() -> None:
    own = softmaxed(6)
    cache = ac.ActivationCache({"pattern.3.1": own[None, 1], "blocks.2.attn.hook_pattern": own[None]})
    found = ac.AttentionBlocks(keys={"a": (0, 2), "b": 3}, queries={"last": -1}).of(cache)
    assert sorted(found) == ["attention_blocks.2", "attention_blocks.3.1"]
    assert found["attention_blocks.3.1"].shape == (1, 1, 2)
    torch.testing.assert_close(found["attention_blocks.3.1"][0, 0, 0], own[1, -1, :2].mean())
    assert torch.equal(found["attention_blocks.2"][:, 1], found["attention_blocks.3.1"].value())


def test_blocks_join_and_are_kept(tmp_path: Any) -> None:
    blocks = ac.AttentionBlocks(keys={"first": 0, "last": -1})
    one = blocks.of(cache_of(softmaxed(3), softmaxed(5)))
    two = blocks.of(cache_of(softmaxed(2, seed=1)))
    joined = ac.ActivationCache.concatenate([one, two])
    assert joined["attention_blocks.0"].shape == (3, 2, 2, 2)
    assert joined.info("attention_blocks.0")["keys"] == ["first", "last"]
    assert torch.equal(joined["attention_blocks.0"][2:], two["attention_blocks.0"].value())
    assert "attention_blocks.0" not in joined._masks
    joined.save(tmp_path / "blocks.safetensors")
    assert ac.ActivationCache.load(tmp_path / "blocks.safetensors") == joined
    assert copy.deepcopy(joined) == joined


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {}}, "empty dict"),
        ({"keys": None}, "expected groups by name"),
        ({"keys": (0, 3)}, "expected groups by name"),
        ({"keys": {"a": 0}, "queries": [0]}, "queries is"),
        ({"keys": {"a": []}}, "positions is"),
        ({"keys": {"a": "lats"}}, "'last'"),
        ({"keys": {"a": 0}, "reduce": "ratio"}, "'uniform_ratio'"),
    ],
)
def test_groups_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ac.AttentionBlocks(**options)


def test_what_has_no_blocks() -> None:
    blocks = ac.AttentionBlocks(keys={"subject": (2, 4)})
    with pytest.raises(UnknownKeyError, match="no attention pattern: capture sites='pattern'"):
        blocks.of(ac.ActivationCache({"resid_post.0": torch.ones(1, 2, 3)}))
    with pytest.raises(LayerRangeError, match=r"the group 'subject' is not in prompt 1: positions \(2, 4\)"):
        blocks.of(cache_of(softmaxed(4), softmaxed(3)))
    with pytest.raises(SiteUnavailableError, match=r"1 queries and 4 keys.*positions='all'"):
        blocks.of(ac.ActivationCache({"pattern.0": torch.rand(1, 2, 1, 4)}))
    with pytest.raises(OptionError, match="tokens_of"):
        ac.AttentionBlocks(keys={"said": ac.tokens_of("user")}).of(cache_of(softmaxed(4)))
