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
from actcache.testing.tiny import tiny_model
from attention_blocks_helpers import by_hand, causal

GROUPS: dict[str, Any] = {"subject": (1, 4), "last": -1, "two": [0, -2], "twice": [2, 2]}


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
