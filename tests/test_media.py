"""Models that read images: their sites are the language model's, and positions tell images from text."""

from __future__ import annotations

import copy
import random
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
from actcache.model.media import media_tokens
from actcache.testing.tiny import tiny_model
from vision import IMAGE, KINDS, LAYERS, inputs_of, model_of, prompt_of, tower_of

# Pairs (images, words) of each prompt.
MIXED = [(2, 3), (1, 6), (1, 2)]
BOTH = {"image": ac.tokens_of("image"), "text": ac.tokens_of("text")}


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What transformers itself records, in a plain pass: before each block, and behind the last norm."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    return output.get("hidden_states") or output.language_model_outputs.hidden_states


def image_places(prompt: list[int]) -> list[int]:
    return [at for at, token in enumerate(prompt) if token == IMAGE]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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


class TestPositions:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
    def test_images_and_text(self, name: str, side: str) -> None:
        """However a pass is made, and for other numbers of images in each prompt."""
        model, inputs = model_of(name), inputs_of(name, MIXED, side=side)
        whole = ac.run_with_cache(model, inputs, sites="resid_post")[1]
        with ac.capture(model, sites="resid_post", positions=BOTH) as captured, torch.no_grad():
            model(**inputs)
        run = ac.run_with_cache(model, inputs, sites="resid_post", positions=BOTH)[1]
        batches = ac.extract_batches(model, [inputs], sites="resid_post", positions=BOTH)
        prompts = [prompt_of(name, *pair) for pair in MIXED]
        for cache in (captured, run, batches):
            for row, prompt in enumerate(prompts):
                images = image_places(prompt)
                text = [at for at in range(len(prompt)) if at not in images]
                assert len(images) == MIXED[row][0] * KINDS[name].tokens
                for layer in range(LAYERS):
                    mine = whole.rows(f"resid_post.{layer}")[row]
                    close(cache.at("image").rows(f"resid_post.{layer}")[row], mine[images])
                    close(cache.at("text").rows(f"resid_post.{layer}")[row], mine[text])
                assert cache.at("image").input_ids[row][cache.at("image").attention_mask[row]].unique().tolist() == [
                    IMAGE
                ]
            image = cache.map_to_dict("resid_post.1")["image"]
            assert image.shape == (3, 2 * KINDS[name].tokens, 32)
            assert bool((image[1, KINDS[name].tokens :] == 0).all())
            close(
                cache.at("image").get_position(1, -1),
                torch.stack(
                    [
                        rows[image_places(prompt)[-1]]
                        for rows, prompt in zip(whole.rows("resid_post.1"), prompts, strict=True)
                    ]
                ),
            )

    @pytest.mark.parametrize(
        ("positions", "kept"),
        [
            (ac.tokens_of("image"), [1, 2, 3, 4, 6, 7, 8, 9]),
            (ac.tokens_of("image", "first"), [1, 2, 3, 4]),
            (ac.tokens_of("image", "last"), [6, 7, 8, 9]),
            (ac.tokens_of("image", 1), [6, 7, 8, 9]),
            (ac.tokens_of("image", -2), [1, 2, 3, 4]),
            (ac.tokens_of("text"), [0, 5, 10, 11, 12]),
            (ac.tokens_of("text", "last"), [10, 11, 12]),
            ([ac.tokens_of("image", 0), "last"], [1, 2, 3, 4, 12]),
            ([[ac.tokens_of("text", 1), 0]], [5, 0]),
        ],
    )
    def test_which(self, positions: Any, kept: list[int]) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(2, 3)])
        whole = ac.run_with_cache(model, inputs, sites="resid_post.2")[1]["resid_post.2"][0]
        for cache in (
            ac.run_with_cache(model, inputs, sites="resid_post.2", positions=positions)[1],
            ac.extract_batches(model, [inputs], sites="resid_post.2", positions=positions),
        ):
            close(cache["resid_post.2"][0], whole[kept])
        with ac.capture(model, sites="resid_post.2", positions=positions) as cache, torch.no_grad():
            model(**inputs)
        close(cache["resid_post.2"][0], whole[kept])

    def test_over_many_batches(self) -> None:
        """Joined, and as means: each example's own image counts once, however many tokens it has."""
        model = model_of("llava")
        batches = [inputs_of("llava", MIXED[:2], side="left"), inputs_of("llava", MIXED[2:])]
        cache = ac.extract_batches(model, iter(batches), sites="resid_post.1", positions=BOTH)
        means = ac.extract_batches(model, batches, sites="resid_post.1", positions=BOTH, reduce="mean")
        expected: dict[str, list[Tensor]] = {"image": [], "text": []}
        for row, pair in enumerate(MIXED):
            whole = ac.run_with_cache(model, inputs_of("llava", [pair]), sites="resid_post.1")[1]["resid_post.1"][0]
            images = image_places(prompt_of("llava", *pair))
            text = [at for at in range(len(whole)) if at not in images]
            for name, at in (("image", images), ("text", text)):
                close(cache.at(name).rows("resid_post.1")[row], whole[at])
                expected[name].append(whole[at].mean(0))
        for name, rows in expected.items():
            close(means["resid_post.1"][name], torch.stack(rows).mean(0))

    def test_some_of_them_at_random(self) -> None:
        """Two tokens of the images and one of the text, others in every prompt: a function of the batch chooses."""
        model, chosen, generator = model_of("llava"), [], random.Random(0)

        def some(batch: dict[str, Tensor]) -> dict[str, list[list[int]]]:
            found: dict[str, list[list[int]]] = {"image": [], "text": []}
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                real = ids[mask.bool()].tolist()
                text = [at for at, token in enumerate(real) if token != IMAGE]
                found["image"].append(generator.sample(image_places(real), 2))
                found["text"].append([generator.choice(text)])
            chosen.append(found)
            return found

        batches = [inputs_of("llava", MIXED, side="left"), inputs_of("llava", MIXED[:1])]
        cache = ac.extract_batches(model, batches, sites="resid_post.1", positions=some)
        for row, pair in enumerate([*MIXED, MIXED[0]]):
            whole = ac.run_with_cache(model, inputs_of("llava", [pair]), sites="resid_post.1")[1]["resid_post.1"][0]
            picked = chosen[0 if row < 3 else 1]
            for name in ("image", "text"):
                close(cache.at(name).rows("resid_post.1")[row], whole[picked[name][row % 3]])
        image = cache.at("image")
        assert image.input_ids.tolist() == [[IMAGE, IMAGE]] * 4
        assert not bool((cache.at("text").input_ids == IMAGE).any())

    def test_modules_are_cut_too(self) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(1, 3)])
        path = "model.language_model.layers.1.mlp"
        whole = ac.run_with_cache(model, inputs, path)[1][path].output
        with ac.capture(model, path, positions=ac.tokens_of("image")) as cache, torch.no_grad():
            model(**inputs)
        assert torch.equal(cache[path].output, whole[:, 1:5])

    def test_sound(self) -> None:
        """Whatever a config names: this one a token for sound."""
        model = copy.copy(tiny_model("llama"))
        model.config = copy.deepcopy(model.config)
        model.config.audio_token_id = 50
        assert media_tokens(model) == {"audio": frozenset({50})}
        inputs = {"input_ids": torch.tensor([[3, 50, 4, 50]])}
        cache = ac.run_with_cache(model, inputs, sites="embed", positions=ac.tokens_of("audio"))[1]
        assert cache.input_ids.tolist() == [[50, 50]]
        with pytest.raises(OptionError, match=r"tokens_of\('image'\) .* only tokens for audio"):
            ac.capture(model, sites="embed", positions=ac.tokens_of("image"))

    def test_text_on_a_model_of_text(self) -> None:
        cache = ac.run_with_cache(tiny_model("llama"), [5, 6, 7], sites="embed", positions=ac.tokens_of("text"))[1]
        assert cache.input_ids.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_generation(name: str) -> None:
    """Images are in the prompt only, and new tokens are text."""
    model, inputs = model_of(name), inputs_of(name, [(1, 3), (1, 3)], side="left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with ac.capture(model, sites="resid_post.1", positions=BOTH) as cache:
        made = model.generate(**inputs, **options)
    with ac.capture(model, sites="resid_post.1") as whole:
        model.generate(**inputs, **options)
    images = image_places(prompt_of(name, 1, 3))
    text = [at for at in range(made.shape[1] - 1) if at not in images]
    assert len(text) == inputs["input_ids"].shape[1] - len(images) + 2
    close(cache.at("image")["resid_post.1"], whole["resid_post.1"][:, images])
    close(cache.at("text")["resid_post.1"], whole["resid_post.1"][:, text])
    assert torch.equal(whole.input_ids, made[:, :-1])
    assert torch.equal(cache.at("text").input_ids, made[:, text])


class TestEdits:
    def test_of_images_only(self) -> None:
        """With padding on the left, and in every step of generation as in one pass over its tokens."""
        model, inputs = model_of("llava"), inputs_of("llava", MIXED, side="left")
        image = inputs["input_ids"] == IMAGE
        vector = torch.linspace(-1, 1, 32)
        plain = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.steer("resid_post.0", vector, positions=ac.tokens_of("image"))):
            steered = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.ablate("resid_post.0", positions=ac.tokens_of("text", "first"))):
            ablated = ac.run_with_cache(model, inputs, sites="resid_post.0")[1]["resid_post.0"]
        real = inputs["attention_mask"].bool()
        close(steered[image], plain[image] + vector)
        assert torch.equal(steered[real & ~image], plain[real & ~image])
        first = real & (inputs["input_ids"] == 3)
        assert bool((ablated[first] == 0).all())
        assert torch.equal(ablated[real & ~first], plain[real & ~first])

    def test_in_generation(self) -> None:
        model, inputs = model_of("llava"), inputs_of("llava", [(1, 3)])
        edit = ac.ablate("mlp_out.1", positions=ac.tokens_of("image"))
        with ac.edit(model, edit), ac.capture(model, sites=["mlp_out.1", "resid_post.2"]) as steps:
            made = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        longer = {**inputs, "input_ids": made[:, :-1], "attention_mask": torch.ones_like(made[:, :-1])}
        with ac.edit(model, edit):
            once = ac.run_with_cache(model, longer, sites=["mlp_out.1", "resid_post.2"])[1]
        assert bool((steps["mlp_out.1"][:, 1:5] == 0).all())
        assert bool((steps["mlp_out.1"][:, 5:] != 0).any(-1).all())
        for key in once:
            close(steps[key], once[key])

    def test_patches_one_image_by_another(self) -> None:
        """Positions are told in both prompts: the image is elsewhere in the source."""
        model = model_of("llava")
        source = ac.run_with_cache(model, inputs_of("llava", [(2, 3)]), sites="resid_post.0")[1]
        target = inputs_of("llava", [(1, 6)])
        plain = ac.run_with_cache(model, target, sites="resid_post.0")[1]["resid_post.0"]
        with ac.edit(model, ac.patch("resid_post.0", source, positions=ac.tokens_of("image", "last"))):
            patched = ac.run_with_cache(model, target, sites="resid_post.0")[1]["resid_post.0"]
        close(patched[:, 1:5], source["resid_post.0"][:, 6:10])
        assert torch.equal(patched[:, 5:], plain[:, 5:])

    @pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
    def test_text_that_does_not_see_the_image(self, name: str) -> None:
        """The experiment that these are for: a knockout leaves attention from text to the image at 0, and the rest
        of it adds up to 1. Where every way is cut, other pixels change nothing behind the image."""
        model, inputs = model_of(name), inputs_of(name, [(1, 4)])
        images = image_places(prompt_of(name, 1, 4))
        behind = list(range(images[-1] + 1, inputs["input_ids"].shape[1]))
        cut = ac.knockout("all", from_positions=ac.tokens_of("text", "last"), to_positions=ac.tokens_of("image"))
        with ac.edit(model, cut):
            cache = ac.run_with_cache(model, inputs, sites=["pattern.1", "logits"])[1]
            inputs["pixel_values"] = inputs["pixel_values"] * -2
            other = ac.run_with_cache(model, inputs, sites="logits")[1]
        pattern = cache["pattern.1"][0][:, behind]
        assert bool((pattern[..., images] == 0).all())
        close(pattern.sum(-1), torch.ones(4, len(behind)))
        assert torch.equal(cache["logits"][:, behind], other["logits"][:, behind])
        assert not torch.allclose(cache["logits"][:, images], other["logits"][:, images])

    def test_are_told_from_others(self) -> None:
        kinds = [ac.ablate("mlp_out.1", positions=ac.tokens_of(*one)) for one in (["image"], ["text"], ["image", 1])]
        identities = [str(one.identity()) for one in kinds]
        assert len(set(identities)) == 3
        assert kinds[0].identity()["positions"] == {"tokens_of": "image", "which": "all"}


def test_attention_between_images_and_text() -> None:
    model, inputs = model_of("llava"), inputs_of("llava", MIXED, side="left")
    cache = ac.run_with_cache(model, inputs, sites="pattern.1")[1]
    blocks = ac.AttentionBlocks(keys=BOTH, queries={"text": BOTH["text"]}, reduce="sum")
    after = blocks.of(cache)["attention_blocks.1"].value()
    during = ac.extract_batches(model, [inputs], sites="pattern.1", attention=blocks)["attention_blocks.1"].value()
    for row, pair in enumerate(MIXED):
        pattern, images = cache.rows("pattern.1")[row], image_places(prompt_of("llava", *pair))
        text = [at for at in range(pattern.shape[-1]) if at not in images]
        expected = torch.stack([pattern[:, text][..., keys].sum((1, 2)) for keys in (images, text)], -1)
        for found in (after, during):
            close(found[row, :, 0], expected)


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
