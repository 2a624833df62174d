"""backend="nnsight" in this process: the local backend's values, by nnsight's tracing."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from nnsight_helpers import needs_nnsight, plain_backward

__all__ = ["plain_backward"]

pytestmark = needs_nnsight

PROMPTS = [[5, 9, 100, 7], [8, 3], [4, 50, 6, 9, 17, 3], [11], [8, 9]]
SITES = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "final_norm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama"):
        tiny_model(family).save_pretrained(place / family)
        tiny_tokenizer().save_pretrained(place / family)
    return {path.name: path for path in place.iterdir()}


def extracted(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    activations = ac.ActivationExtractor(model, **{"sites": SITES, "layers": [0, -1], **options}).extract(PROMPTS)
    return {site: activations.data[site] for site in activations}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for site, values in expected.items():
        assert torch.equal(found[site], values), site


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_are_those_of_bare_forwards(folders: dict[str, Path], family: str) -> None:
    """Each prompt alone through plain transformers, hidden states read by transformers itself."""
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    found = ac.ActivationExtractor(folders[family], backend="nnsight", layers=[0, 1, 2]).extract(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states = bare(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer in range(3):
            torch.testing.assert_close(found[f"resid_post.{layer}"][i], states[layer + 1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", [None, "last_token", "first_token", "mean", "max", "min", "sum"])
@pytest.mark.parametrize("remote", [False, "local"])
def test_values_are_the_local_backends_bit_for_bit(folders: dict[str, Path], remote: Any, pooling: Any) -> None:
    options: dict[str, Any] = {"pooling": (lambda rows: rows.sum(0)) if pooling == "sum" else pooling}
    assert_same(
        extracted(folders["gpt2"], backend="nnsight", remote=remote, **options), extracted(folders["gpt2"], **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "falcon", "gemma2", "mixtral", "opt", "bert"])
def test_architectures(tmp_path: Path, family: str, remote: Any) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    sites = {"bert": [s for s in SITES if s != "final_norm"]}.get(family, SITES)
    have = {row.site for row in ac.sites(tiny_model(family))}
    sites = [s for s in sites if any(name.split(".")[0] == s for name in map(str, have))]
    assert {"resid_pre", "resid_post", "attn_out", "mlp_out"} <= set(sites)
    assert_same(extracted(tmp_path, sites=sites, backend="nnsight", remote=remote), extracted(tmp_path, sites=sites))


@pytest.mark.parametrize("positions", ["last", -2, (0, 2), [0, -1]])
def test_positions(folders: dict[str, Path], positions: Any) -> None:
    for remote in (False, "local"):
        extractors = [
            ac.ActivationExtractor(folders["llama"], layers=[1], positions=positions, **options)
            for options in ({}, {"backend": "nnsight", "remote": remote})
        ]
        long = [p for p in PROMPTS if len(p) > 1]
        expected, found = (extractor.extract(long) for extractor in extractors)
        assert torch.equal(found.data["resid_post.1"], expected.data["resid_post.1"])


def test_the_identity_is_the_local_one_so_that_either_answers(folders: dict[str, Path]) -> None:
    options: dict[str, Any] = {"cache_logits": True, "logit_top_k": 3, "layers": [0, -1], "cache_pooled": False}
    here = ac.UnifiedCache(folders["llama"], **options)
    traced = ac.UnifiedCache(folders["llama"], backend="nnsight", store=folders["llama"].parent / "apart", **options)
    assert traced.extractor.source.identity().values == here.extractor.source.identity().values
    here.warmup(PROMPTS)
    assert ac.UnifiedCache(folders["llama"], backend="nnsight", **options).warmup(PROMPTS).activations_cached == 5
    traced.warmup(PROMPTS)
    assert torch.equal(traced.get_activations(PROMPTS)[0], here.get_activations(PROMPTS)[0])
    np.testing.assert_array_equal(traced.get_perplexity(PROMPTS), here.get_perplexity(PROMPTS))
    assert torch.equal(traced.get_logits(PROMPTS).values, here.get_logits(PROMPTS).values)


def test_texts_and_one_line(folders: dict[str, Path]) -> None:
    texts = ["some text", "other"]
    traced = ac.activations(folders["gpt2"], texts, backend="nnsight", store=folders["gpt2"].parent / "one")
    np.testing.assert_array_equal(traced, ac.activations(folders["gpt2"], texts))


def test_a_model_is_left_as_it_was(folders: dict[str, Path]) -> None:
    model = tiny_model("gpt2")
    model.transformer.h[1].forward = model.transformer.h[1].forward
    held = [dict(part.__dict__) for part in model.modules()]
    expected = extracted(model)
    for remote in (False, "local"):
        assert_same(extracted(model, backend="nnsight", remote=remote), expected)
    for part, before in zip(model.modules(), held, strict=True):
        assert set(part.__dict__) - set(before) <= {"_call_impl"}
        assert part.__dict__.get("forward") is before.get("forward")
    assert_same(extracted(model), expected)


def test_a_model_is_left_as_it_was_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    expected = extracted(model)

    def refused(rows: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in the block")

    for remote in (False, "local"):
        with pytest.raises(ZeroDivisionError):
            extracted(model, backend="nnsight", remote=remote, pooling=refused)
        assert not any("__nnsight__" in part.__dict__ or "forward" in part.__dict__ for part in model.modules())
        assert_same(extracted(model), expected)


def test_threads_do_not_mix_their_rows() -> None:
    model = tiny_model("gpt2")
    expected = extracted(model)
    found: list[dict[str, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda: found.append(extracted(model, backend="nnsight", batch_size=1)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for one in found:
        for site, values in expected.items():
            torch.testing.assert_close(one[site], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remote", [False, "local"])
def test_a_model_that_is_traced_is_known_to_another_thread_as_what_it_is(remote: Any) -> None:
    """Looked at from within a pass: its identity, and what refuses hooks of others."""
    model = tiny_model("gpt2")
    other = ac.ActivationExtractor(model, sites="resid_post.0").source
    expected = dict(other.identity().values)
    seen: list[Any] = []

    def look(rows: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: seen.append((other.identity().values, other.model_to_run())))
        thread.start()
        thread.join()
        return rows[0]

    extracted(model, backend="nnsight", sites="resid_post.0", layers="all", pooling=look, remote=remote)
    assert len(seen) == len(PROMPTS) and all(values == expected and found is model for values, found in seen)


def test_a_forward_of_somebody_else_is_still_refused() -> None:
    from nnsight import NNsight

    model = tiny_model("gpt2")
    NNsight(model)
    with pytest.raises(errors.ForeignHooksError, match="a hook or forward of its own"):
        extracted(model, backend="nnsight")


@pytest.mark.parametrize("site", ["q.0", "k.1", "v.0", "z.0", "head_out.0"])
def test_sites_that_no_module_returns_are_refused_by_name(folders: dict[str, Path], site: str) -> None:
    extractor = ac.ActivationExtractor(folders["gpt2"], backend="nnsight", sites=site)
    with pytest.raises(errors.SiteUnavailableError, match=f"'{site}' is made of parts of what modules return"):
        extractor.extract(PROMPTS)
    assert not extractor.source.loaded


def test_without_nnsight_what_is_stored_is_read_and_the_rest_says_what_to_install(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"store": tmp_path, "compute_perplexity": False, "backend": "nnsight"}
    values = ac.UnifiedCache(folders["gpt2"], **options).get_activations(PROMPTS)[0]
    monkeypatch.setitem(sys.modules, "nnsight.intervention.source", None)
    without = ac.UnifiedCache(folders["gpt2"], **options)
    assert torch.equal(without.get_activations(PROMPTS)[0], values)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'actcache\[nnsight\]'"):
        without.warmup([[9, 9]])


def test_what_is_not_run_through_nnsight_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(errors.OptionError, match="edits= are not run through nnsight"):
        ac.ActivationExtractor(folders["gpt2"], backend="nnsight", edits=ac.ablate("attn_out.0"))
    with pytest.raises(errors.OptionError, match="dry run"):
        ac.UnifiedCache(folders["gpt2"], backend="nnsight", remote="local")
    with pytest.raises(errors.OptionError, match="expected True, False, or the address"):
        ac.UnifiedCache(folders["gpt2"], backend="nnsight", remote="ndif")


@pytest.mark.parametrize(
    "where", ["https://me:hidden@host", "https://hidden@host/", "http://host?key=hidden", "http://host#hidden"]
)
def test_no_secret_becomes_part_of_an_address(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It would be stored, and shown in every error."""
    monkeypatch.setenv("NDIF_HOST", where)
    for remote in (True, where):
        with pytest.raises(errors.OptionError, match="which would be stored") as raised:
            ac.UnifiedCache(folders["gpt2"], backend="nnsight", remote=remote)
        assert "hidden" not in str(raised.value)


def test_keys_as_files_hold_them(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = ac.ActivationExtractor(folders["gpt2"], backend="nnsight", remote=True)
    monkeypatch.setenv("NDIF_API_KEY", " a-key\n")
    backend: Any = extractor.backend()
    assert backend._key() == "a-key"
    for wrong in ("a\nkey", "a\x7fkey", "a-k\u00e9y"):
        monkeypatch.setenv("NDIF_API_KEY", wrong)
        with pytest.raises(errors.EngineUnavailableError, match="characters that no key has") as raised:
            extractor.extract(PROMPTS)
        assert wrong not in str(raised.value)
