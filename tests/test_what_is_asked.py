"""What capture and caches say to things that they cannot take: the value, what was expected, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import actcache as ac
from actcache.errors import (
    JoinError,
    LayerRangeError,
    OptionError,
    PromptError,
    PromptTypeError,
    UnknownKeyError,
    UnknownModuleError,
    UnknownSiteError,
)
from actcache.testing.tiny import tiny_model

IDS = [[5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def cache(model: Any) -> ac.ActivationCache:
    return ac.run_with_cache(model, IDS, sites=["resid_post", "pattern"])[1]


def test_a_model_given_by_name() -> None:
    for who, ask in {
        "capture": lambda: ac.capture("gpt2"),  # type: ignore[arg-type]
        "run_with_cache": lambda: ac.run_with_cache("gpt2", IDS),  # type: ignore[arg-type]
        "sites": lambda: ac.sites("gpt2"),  # type: ignore[arg-type]
        "extract_batches": lambda: ac.extract_batches("gpt2", [IDS], sites="embed"),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(OptionError, match=rf"^{who} needs .*not str: load it, .*from_pretrained\('gpt2'\)"):
            ask()
    with pytest.raises(OptionError, match=r"^capture needs a torch.nn.Module, not int$"):
        ac.capture(3)  # type: ignore[arg-type]


def test_a_tokenizer_given_by_name(model: Any) -> None:
    with pytest.raises(OptionError, match=r"tokenizer is 'gpt2': .*AutoTokenizer\.from_pretrained\('gpt2'\)"):
        ac.run_with_cache(model, IDS, sites="embed", tokenizer="gpt2")


def test_sites_and_modules_in_each_others_place(model: Any) -> None:
    with pytest.raises(UnknownModuleError, match=r"name of a site: sites='resid_post\.0'"):
        ac.capture(model, "resid_post.0")
    with pytest.raises(UnknownModuleError, match="name of a site: sites='resid_post'"):
        ac.run_with_cache(model, IDS, "resid_post")
    for path in ("transformer.h.0", "transformer.h.*.attn"):
        with pytest.raises(UnknownSiteError) as found:
            ac.capture(model, sites=["resid_post", path])
        assert str(found.value).endswith(f"name it in modules={path!r}")
    with pytest.raises(UnknownSiteError, match=r"unknown site 'nothing\.0'"):
        ac.capture(model, sites="nothing.0")
    for value in (3, 0.5):
        with pytest.raises(OptionError, match=f"modules is {value}: expected paths"):
            ac.capture(model, value)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=f"sites is {value}: expected a name"):
            ac.capture(model, sites=value)  # type: ignore[arg-type]


def test_the_end_of_a_path(model: Any) -> None:
    for short, meant in [("h.0", "transformer.h.0"), ("h.1.attn", "transformer.h.1.attn"), ("h.*.mlp", "**.h.*.mlp")]:
        with pytest.raises(UnknownModuleError) as found:
            ac.capture(model, short)
        assert str(found.value).endswith(f"Did you mean {meant!r}?")
        assert ac.capture(model, meant)


def test_heads_that_there_are_not(model: Any, cache: ac.ActivationCache) -> None:
    heads = cache["pattern.1"].shape[1]
    with pytest.raises(UnknownKeyError, match=rf"'pattern\.1' has {heads} heads \(0 to {heads - 1}\)\.$"):
        cache[f"pattern.1.{heads}"]
    with pytest.raises(UnknownSiteError, match=r"'head_out\.1\.-1' names no head: .* as in 'head_out\.1\.0'"):
        ac.capture(model, sites="head_out.1.-1")


def test_the_prompt_that_is_wrong_is_named(model: Any) -> None:
    for prompts, number in [(["a", None], 1), ([[5], 3.5], 1), (["a", [5]], 1), ([[5], [6], "a"], 2), ([None, "a"], 0)]:
        with pytest.raises(PromptTypeError, match=f"^prompt {number} is "):
            ac.run_with_cache(model, prompts, sites="embed")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="there is no prompt in 5: pass a text"):
        ac.run_with_cache(model, 5, sites="embed")  # type: ignore[arg-type]
    with pytest.raises(PromptTypeError, match=r"^inputs\['input_ids'\] is a list: .*return_tensors='pt'"):
        ac.run_with_cache(model, {"input_ids": [[1, 2]]}, sites="embed")


def test_what_a_cache_is_asked_for(model: Any, cache: ac.ActivationCache) -> None:
    for prompts in ("a", ["a"], 1.5, [0, 1.5], None):
        if prompts is not None:
            with pytest.raises(OptionError, match=r"prompts is .*: expected an int, a slice, or a list of ints"):
                cache.select(prompts=prompts)  # type: ignore[arg-type]
    assert cache.select(prompts=torch.tensor([1])).input_ids.tolist() == [IDS[1]]  # type: ignore[arg-type, union-attr]
    labelled = cache.select()
    labelled.columns["label"] = [1, 2, 3]
    with pytest.raises(OptionError, match="column 'label' has 3 items and the cache 2 prompts"):
        labelled.select(prompts=[1])
    labelled.columns["label"] = [1, 2]
    assert labelled.select(prompts=[1]).columns["label"] == [2]


def test_visits_of_an_entry(model: Any) -> None:
    with ac.capture(model, "transformer.h.0") as cache, torch.no_grad():
        for ids in IDS:
            model(torch.tensor([ids]))
    entry = cache["transformer.h.0"]
    for index in (2, -3):
        with pytest.raises(LayerRangeError, match=rf"visit {index} is out of range: the entry has 2 visits \(0 to 1\)"):
            entry[index]
    assert [visit.hidden.shape[1] for visit in entry[:]] == [3, 4]
    assert [visit.hidden.shape[1] for visit in entry[1:]] == [4]
    assert entry[-1].hidden.shape[1] == 4


def test_every_token_and_chosen_ones_do_not_join(model: Any, cache: ac.ActivationCache, tmp_path: Path) -> None:
    last = ac.run_with_cache(model, IDS, sites=["resid_post", "pattern"], positions="last")[1]
    named = ac.run_with_cache(model, IDS, sites=["resid_post", "pattern"], positions={"last": -1})[1]
    whole = cache.select()
    kept = ac.ActivationCache.load(last.save(tmp_path / "last.safetensors"))
    for one, other in [(whole, last), (last.select(), whole), (whole, named.at("last")), (whole, kept)]:
        before = one["resid_post.0"].clone()
        with pytest.raises(JoinError, match=r"chosen positions \(positions=\), .* every token"):
            one.cat(other)
        with pytest.raises(JoinError, match="chosen positions"):
            ac.ActivationCache.concatenate([one, other])
        assert torch.equal(one["resid_post.0"], before)
    # One token each, wherever it stands in its prompt, is what single captures are joined for.
    first = ac.run_with_cache(model, IDS, sites=["resid_post", "pattern"], positions=0)[1]
    both = ac.ActivationCache.concatenate([last, first])
    assert both["resid_post.0"].shape[:2] == (4, 1)
    assert ac.ActivationCache.concatenate([whole, cache])["resid_post.0"].shape[0] == 4


def test_sites_are_printed_as_a_table(model: Any) -> None:
    found = ac.sites(model)
    lines = str(found).splitlines()
    assert lines[0].split() == ["site", "blocks", "shape", "read", "at"]
    assert len(lines) == 1 + len({info.site.name for info in found}) < len(found)
    line = next(line for line in lines if line.startswith("resid_post."))
    assert line.split() == ["resid_post.0", "0-3", "[B,", "S,", "D]", "output", "of", "transformer.h.0"]
    assert isinstance(found, list)
    assert found[0] in found
