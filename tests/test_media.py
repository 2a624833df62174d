"""Models that read images: their sites are the language model's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import actcache as ac
import vision
from actcache.errors import (
    MissedModuleError,
    OptionError,
    PromptError,
    SiteUnavailableError,
    UnknownKeyError,
    WrongSiteError,
)
from actcache.testing.tiny import tiny_model
from vision import BOTH, IMAGE, KINDS, LAYERS, MIXED, close, inputs_of, model_of, tower_of


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What transformers itself records, in a plain pass: before each block, and behind the last norm."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return output.get("hidden_states") or output.language_model_outputs.hidden_states


@pytest.mark.parametrize("name", KINDS)
class TestSites:
    def test_are_those_of_the_text(self, name: str) -> None:
        model, kind = model_of(name), KINDS[name]
        inputs = inputs_of(name, [(1, 3), (1, 6)])
        paths = {str(info.site): info.path for info in ac.sites(model)}
        assert not any("vision" in path or "visual" in path for path in paths.values())
        for layer in range(LAYERS):
            assert paths[f"resid_post.{layer}"] == f"{kind.blocks}.{layer}"
        expected = hidden_states(model, inputs)
        names = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm", "logits"]
        output, cache = ac.run_with_cache(model, inputs, sites=names)
        with torch.no_grad():
            plain = model(**inputs).logits
        # Not a bit of the pass is another one, padding included.
        assert torch.equal(output.logits, plain)
        assert torch.equal(cache["logits"], plain)
        assert torch.equal(cache.input_ids, inputs["input_ids"])
        assert torch.equal(cache.attention_mask, inputs["attention_mask"].bool())
        for layer in range(LAYERS):
            pre, attention, mid, mlp, post = (cache[f"{site}.{layer}"] for site in names[:5])
            # Features of images that a model adds between two blocks are in the stream when the next one begins.
            if name != "qwen3_vl":
                assert torch.equal(pre, expected[layer])
            close(mid, pre + attention)
            close(post, mid + mlp)
        with torch.no_grad():
            close(model.get_output_embeddings()(cache["final_norm"]), plain)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_each_prompt_has_the_values_it_has_alone(self, name: str, side: str) -> None:
        """Images, text and padding of others do not reach it: positions are counted as the model counts them."""
        model = model_of(name)
        prompts = MIXED
        if name == "blip2" and side == "left":
            # It takes no position ids.
            with pytest.raises(PromptError, match="not told where tokens stand"):
                ac.extract_batches(model, [inputs_of(name, prompts, side=side)], sites="resid_pre")
            return
        cache = ac.extract_batches(model, [inputs_of(name, prompts, side=side)], sites=["resid_pre", "logits"])
        for row, prompt in enumerate(prompts):
            alone = inputs_of(name, [prompt])
            expected = hidden_states(model, alone)
            with torch.no_grad():
                close(cache.rows("logits")[row], model(**alone).logits[0])
            for layer in range(LAYERS if name != "qwen3_vl" else 1):
                close(cache.rows(f"resid_pre.{layer}")[row], expected[layer][0])

    def test_the_tower_is_there_by_path(self, name: str) -> None:
        model, tower = model_of(name), tower_of(model_of(name))
        inputs = inputs_of(name, [(1, 3)])
        kept: list[Tensor] = []
        hook = model.get_submodule(f"{tower}.1").register_forward_hook(
            lambda module, args, output: kept.append(output if isinstance(output, Tensor) else output[0])
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        cache = ac.extract_batches(model, [inputs], modules=f"{tower}.*", sites="resid_post.0")
        assert list(cache) == [f"{tower}.0", f"{tower}.1", "resid_post.0"]
        assert torch.equal(cache[f"{tower}.1"].hidden, kept[0])
        if name != "blip2":
            # Which text alone does not run; this one needs an image.
            with pytest.raises(MissedModuleError, match=r"blocks|layers"):
                ac.run_with_cache(model, [[3, 4, 5]], f"{tower}.0")


def test_features_that_are_added_between_blocks() -> None:
    """They belong to no branch: what a block returned, and what the next one is given, differ at the image only."""
    model, inputs = model_of("qwen3_vl"), inputs_of("qwen3_vl", [(1, 4)])
    cache = ac.run_with_cache(model, inputs, sites=["resid_post.0", "resid_pre.1", "resid_post.1", "resid_pre.2"])[1]
    added = cache["resid_pre.1"] - cache["resid_post.0"]
    image = inputs["input_ids"] == IMAGE
    assert bool((added[image].abs().amax(-1) > 0.1).all())
    assert bool((added[~image] == 0).all())
    assert torch.equal(cache["resid_pre.2"], cache["resid_post.1"])


def test_the_stream_is_the_sum_of_its_parts_with_such_features_too() -> None:
    model, inputs = model_of("qwen3_vl"), inputs_of("qwen3_vl", [(1, 4), (1, 2)])
    sites = ["embed", "resid_pre", "attn_out", "mlp_out", "resid_post"]
    cache = ac.run_with_cache(model, inputs, sites=sites)[1]
    components, labels = cache.decompose_resid(return_labels=True)
    assert labels[-1] == "0_added"
    assert len(labels) == 2 + 2 * LAYERS
    close(components.sum(0), cache["resid_post.2"])
    close(cache.decompose_resid(1).sum(0), cache["resid_pre.1"])
    close(cache.accumulated_resid()[1], cache["resid_pre.1"])
    # One side of a place does not tell what came in there, and is not the other.
    for lacking in ("resid_pre", "resid_post"):
        part = cache.select(sites=[site for site in sites if site != lacking])
        with pytest.raises(UnknownKeyError, match=rf"decompose_resid needs {lacking}"):
            part.decompose_resid()
    after = cache.select(sites=["resid_post"])
    with pytest.raises(UnknownKeyError, match=r"needs embed|needs resid_pre"):
        after.accumulated_resid()
    with pytest.raises(WrongSiteError, match=r"trained on resid_pre\.1"):
        ac.encode(after, Encoder())
    assert torch.equal(ac.encode(cache, Encoder()), cache["resid_pre.1"].relu() * cache.attention_mask[..., None])
    text = ac.run_with_cache(model, inputs_of("qwen3_vl", [(0, 4)]), sites=sites)[1]
    assert text.decompose_resid().shape[0] == 1 + 2 * LAYERS


def test_a_vector_beside_such_features_is_not_taken_for_its_neighbour(tmp_path: Path) -> None:
    model, inputs = model_of("qwen3_vl"), inputs_of("qwen3_vl", [(1, 4)])
    sites = ["embed", "resid_pre", "resid_post"]
    cache = ac.run_with_cache(model, inputs, sites=sites)[1]
    column = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    after, before = (cache.vector(site, 0, column) for site in ("resid_post.0", "resid_pre.1"))
    assert after.info()["between_blocks"] is True
    assert not torch.equal(after.value(), before.value())
    assert torch.equal(ac.encode(before, Encoder()), before.value().relu())
    saved = ac.ActivationCache.load(ac.ActivationCache({"mine": after}).save(tmp_path / "one.safetensors"))
    message = (
        r"trained on resid_pre\.1, and the vector is of resid_post\.0, which is another value on this model.*Capture"
    )
    for vector, known in ((after, None), (saved["mine"], None), (after.value(), model)):
        with pytest.raises(WrongSiteError, match=message):
            ac.encode(vector, Encoder(), site=None if known is None else "resid_post.0", model=known)
    # In front of the first block nothing comes in.
    first = Encoder()
    first.site = "resid_pre.0"
    assert torch.equal(ac.encode(cache.vector("embed", 0, column), first), cache["resid_pre.0"][0, column].relu())
    assert torch.equal(ac.encode(cache.select(sites=["embed"]), first)[0, column], cache["embed"][0, column].relu())
    # Of a model that is gone, a cache knows it by the one that is given.
    loaded = ac.ActivationCache.load(cache.select(sites=["resid_post"]).save(tmp_path / "all.safetensors"))
    with pytest.raises(WrongSiteError, match=r"trained on resid_pre\.1"):
        ac.encode(loaded, Encoder(), model=model)


class Encoder:
    site = "resid_pre.1"

    def encode(self, x: Tensor) -> Tensor:
        return x.relu()


def test_an_encoder_that_reads_images() -> None:
    """Images are in its prompts, and none is in the decoder's, of which nothing was asked."""
    model, inputs = vision.florence2(), vision.florence2_inputs()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).encoder_hidden_states[1]
    expected = torch.stack([expected[0, 1:3], expected[1, 2:4]])
    positions = ac.tokens_of("image")
    with ac.capture(model, sites="encoder.resid_pre.1", positions=positions) as captured, torch.no_grad():
        model(**inputs)
    run = ac.run_with_cache(model, inputs, sites="encoder.resid_pre.1", positions=positions)[1]
    for cache in (captured, run):
        assert torch.equal(cache["encoder.resid_pre.1"], expected)
        assert cache.input_ids.tolist() == [[IMAGE, IMAGE]] * 2


class TestBlocksThatAttendToImages:
    """Text alone leaves them out: their streams are there, their parts are not known, and the others are whole."""

    def test_sites(self) -> None:
        model, inputs = vision.mllama(), vision.mllama_inputs()
        names = ["resid_pre", "attn_out", "mlp_out", "resid_post", "logits"]
        cache = ac.run_with_cache(model, inputs, sites=names)[1]
        assert [key for key in cache if key.startswith("attn_out")] == ["attn_out.0", "attn_out.2"]
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        for layer in range(LAYERS):
            assert torch.equal(cache[f"resid_pre.{layer}"], output.hidden_states[layer])
        assert torch.equal(cache["resid_post.1"], cache["resid_pre.2"])
        assert not torch.allclose(cache["resid_post.1"], cache["resid_pre.1"])
        for layer in (0, 2):
            parts = (cache[f"{site}.{layer}"] for site in names[:3])
            close(cache[f"resid_post.{layer}"], sum(parts, torch.zeros(())))
        assert torch.equal(cache["logits"], output.logits)

    def test_what_is_refused(self) -> None:
        model = vision.mllama()
        for site in ("attn_out.1", "q.1", "mlp_act.1", "resid_mid.-2"):
            with pytest.raises(SiteUnavailableError, match=r"block 1 \(.*layers\.1\) does not run on text alone"):
                ac.capture(model, sites=site)
        with pytest.raises(MissedModuleError, match=r"'resid_post\.1'"):
            ac.run_with_cache(model, [[3, 4, 5]], sites="resid_post")
        text = ac.run_with_cache(model, [[3, 4, 5]], sites=["resid_post.0", "resid_pre.2"])[1]
        assert torch.equal(text["resid_post.0"], text["resid_pre.2"])
        with pytest.raises(SiteUnavailableError, match="block 1"):
            ac.run_with_cache(model, vision.mllama_inputs(), sites=["embed", "attn_out", "mlp_out"])[
                1
            ].decompose_resid()


class TestRefusals:
    def test_a_model_of_text(self) -> None:
        model = tiny_model("llama")
        image = ac.tokens_of("image")
        for refused in (
            lambda: ac.capture(model, sites="embed", positions=image),
            lambda: ac.run_with_cache(model, [1, 2], sites="embed", positions={"a": [image]}),
            lambda: ac.extract_batches(model, [[[1, 2]]], sites="embed", positions=image),
        ):
            with pytest.raises(OptionError, match=r"no meaning on LlamaForCausalLM: .* no tokens .* image_token_id"):
                refused()
        with (
            ac.edit(model, ac.ablate("mlp_out.1", positions=image)),
            pytest.raises(OptionError, match="LlamaForCausalLM"),
        ):
            model(torch.tensor([[1, 2]]))

    def test_a_prompt_without_an_image(self) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(1, 3), (0, 5)])
        with pytest.raises(PromptError, match=r"batch 0: prompt 1 has no tokens .*tokens_of\('image'\).*id 100"):
            ac.extract_batches(model, [inputs], sites="embed", positions=ac.tokens_of("image"))
        with (
            pytest.raises(PromptError, match="prompt 1 has no tokens"),
            ac.capture(model, sites="embed", positions=BOTH),
        ):
            model(**inputs)
        with pytest.raises(PromptError, match="prompt 0 has no tokens number 1 of those"):
            ac.run_with_cache(model, inputs, sites="embed", positions=ac.tokens_of("image", 1))
        only = ac.extract_batches(model, [inputs], sites="embed", positions=ac.tokens_of("text"))
        assert [len(row) for row in only.rows("embed")] == [4, 5]

    def test_a_mistyped_kind(self) -> None:
        with pytest.raises(PromptError, match=r"prompt 0 is not a chat.* Did you mean 'image'"):
            ac.run_with_cache(model_of("llava"), [[3]], sites="embed", positions=ac.tokens_of("images"))

    def test_embeddings_instead_of_ids(self) -> None:
        model = model_of("llava")
        inputs = {"inputs_embeds": torch.randn(1, 5, 32)}
        with pytest.raises(PromptError, match="told by token ids"):
            ac.run_with_cache(model, inputs, sites="embed", positions=ac.tokens_of("image"))
        with (
            pytest.raises(OptionError, match="told by token ids"),
            ac.capture(model, sites="embed", positions=ac.tokens_of("image")),
        ):
            model(**inputs)

    def test_extraction_which_knows_text_only(self) -> None:
        with pytest.raises(OptionError, match=r"tokens_of\('image'\) cannot be used here, where prompts are text only"):
            ac.ActivationExtractor(model_of("llava"), positions=ac.tokens_of("image"))

    def test_ids_that_no_table_has(self) -> None:
        """A placeholder may lie behind the last row of the table of embeddings; other ids may not."""
        model = vision.KINDS["gemma3"].make().eval()
        model.config.image_token_index = model.model.config.image_token_index = 120
        inputs = inputs_of("gemma3", [(1, 3)])
        inputs["input_ids"] = torch.where(inputs["input_ids"] == IMAGE, 120, inputs["input_ids"])
        cache = ac.extract_batches(model, [inputs], sites="resid_post.1", positions=ac.tokens_of("image"))
        assert cache.input_ids.tolist() == [[120] * 4]
        inputs["input_ids"][0, 0] = 121
        with pytest.raises(PromptError, match="token id 121"):
            ac.extract_batches(model, [inputs], sites="resid_post.1")

    def test_images_in_front_of_the_text(self) -> None:
        """They have no tokens that could be counted: the values are there, positions of tokens are not."""
        model, inputs = vision.git(), {"input_ids": torch.tensor([[3, 4, 5]]), "pixel_values": torch.ones(1, 3, 8, 8)}
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True).hidden_states[1]
        cache = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]
        assert torch.equal(cache["resid_post.0"], expected)
        assert expected.shape[1] > 3
        for positions in ("last", {"text": ac.tokens_of("text")}):
            with pytest.raises(OptionError, match="for 3 tokens this model has 8 positions"):
                ac.run_with_cache(model, inputs, sites="resid_post.0", positions=positions)

    def test_a_model_whose_blocks_are_not_made_out(self) -> None:
        with pytest.raises(SiteUnavailableError):
            ac.capture(torch.nn.Linear(2, 2), sites="embed", positions=ac.tokens_of("text"))
