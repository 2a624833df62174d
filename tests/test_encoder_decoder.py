"""Encoder-decoder models: both stacks, extracted, stored and captured, against bare passes of one prompt (`zoo`)."""

from __future__ import annotations

import pytest
import torch

import actcache as ac
import zoo
from actcache import errors
from actcache.extract.plan import share_of_blocks
from actcache.testing.tiny import PAD, tiny_model, tiny_tokenizer

FLOAT32 = 1e-5
FAMILIES = ["t5", "t5-v1.1", "bart"]
PROMPTS = zoo.prompts_of(4, [1, 9, 17, 17, 30, 5])
TEXTS = ["the cat sat", "a", "on the mat", "dogs and cats and dogs"]

every_family = pytest.mark.parametrize("family", FAMILIES)


def compare(family: str, ours: ac.Activations, prompts: list[list[int]]) -> None:
    for i, ids in enumerate(prompts):
        alone = zoo.reference(family, 0, tuple(ids))
        for site in ours:
            assert zoo.relative_error(ours[site][i], alone[site]) < FLOAT32, (site, i)


@every_family
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_site_of_both_stacks_together(family, batch_size):
    model = zoo.model_of(family)
    sites = zoo.expected_sites(family, model)
    prompts = [*PROMPTS, [PAD, 7, PAD, PAD]]
    ours = ac.ActivationExtractor(model, sites=sites, batch_size=batch_size).extract(prompts)
    assert list(ours) == sites
    compare(family, ours, prompts)


@every_family
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layers_are_those_of_the_stack(family, stack):
    model = zoo.model_of(family)
    depth = zoo.stack_depths(family, model)[stack]
    ours = ac.ActivationExtractor(model, sites=f"{stack}.resid_post").extract(PROMPTS)
    assert list(ours) == [f"{stack}.resid_post.{layer}" for layer in range(depth)]
    compare(family, ours, PROMPTS)
    last = ac.ActivationExtractor(model, sites=f"{stack}.resid_post", layers="last")
    assert last.sites == [f"{stack}.resid_post.{depth - 1}"]
    assert ac.ActivationExtractor(model, sites=f"{stack}.mlp_out.-1").sites == [f"{stack}.mlp_out.{depth - 1}"]


def test_stacks_of_different_depth_each_give_all_their_layers():
    # Three blocks decode what four encoded.
    extractor = ac.ActivationExtractor(zoo.model_of("bart"), sites=["encoder.resid_post", "decoder.resid_post"])
    assert [len(names) for names in extractor.site_names.values()] == [4, 3]
    with pytest.raises(errors.LayerRangeError, match="3 layers"):
        ac.ActivationExtractor(zoo.model_of("bart"), sites="decoder.resid_post", layers=3)


@every_family
def test_the_decoder_does_not_run_for_sites_of_the_encoder(family):
    model = tiny_model(family)
    encoder_sites = [site for site in zoo.expected_sites(family, model) if site.startswith("encoder.")]
    expected = ac.ActivationExtractor(model, sites=encoder_sites).extract(PROMPTS)
    ran = []
    decoder = model.get_decoder()
    for module in (decoder, model.get_output_embeddings()):
        module.register_forward_pre_hook(lambda *_: ran.append(1))
    name = next(iter(decoder._forward_pre_hooks.values())).__qualname__
    again = ac.ActivationExtractor(model, sites=encoder_sites, allow_hooks=[name]).extract(PROMPTS)
    assert not ran
    for site in encoder_sites:
        for one, other in zip(again[site], expected[site], strict=True):
            assert torch.equal(one, other)
    ac.ActivationExtractor(model, sites="decoder.resid_post.0", allow_hooks=[name]).extract(PROMPTS[:1])
    assert ran


class TestNames:
    @pytest.mark.parametrize(
        ("site", "message"),
        [
            ("resid_post", r"two stacks of blocks, write 'encoder\.resid_post' or 'decoder\.resid_post'"),
            ("resid_post.1", r"write 'encoder\.resid_post\.1' or 'decoder\.resid_post\.1'"),
            ("embed", r"write 'encoder\.embed' or 'decoder\.embed'"),
            ("encoder.logits", "write 'logits'"),
        ],
    )
    def test_a_site_without_its_stack_is_named_before_any_work(self, site, message, tmp_path):
        tiny_model("t5").save_pretrained(tmp_path)
        with pytest.raises(errors.SiteUnavailableError, match=message):
            ac.UnifiedCache(tmp_path, sites=site)

    def test_a_stack_where_there_is_one(self):
        with pytest.raises(errors.SiteUnavailableError, match=r"one stack of blocks, write 'resid_post' without"):
            ac.UnifiedCache(tiny_model("gpt2"), sites="encoder.resid_post")

    def test_a_model_without_a_start_token(self, tmp_path):
        model = tiny_model("t5", decoder_start_token_id=None, bos_token_id=None)
        for sites in ("decoder.resid_post", "logits", ["encoder.embed", "decoder.embed"]):
            with pytest.raises(errors.OptionError, match="decoder_start_token_id"):
                ac.UnifiedCache(model, sites=sites)
        assert ac.UnifiedCache(model, sites="encoder.resid_post").plan(PROMPTS).missing == len(PROMPTS)


class TestStored:
    @pytest.fixture(params=FAMILIES)
    def family(self, request):
        return request.param

    @pytest.fixture
    def folder(self, family, tmp_path):
        zoo.model_of(family).save_pretrained(tmp_path / "model")
        tiny_tokenizer(bos=False).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @staticmethod
    def ids_of(text):
        return tuple(tiny_tokenizer(bos=False)(text)["input_ids"])

    def test_by_stack_and_together(self, family, folder):
        sites = ["encoder.resid_post", "decoder.resid_post", "decoder.cross_attn_out", "logits"]
        depths = zoo.stack_depths(family, zoo.model_of(family))
        answers = ac.UnifiedCache(folder, layers=[1, 0], sites=sites).get_activations(TEXTS)
        assert list(answers) == sites
        for i, text in enumerate(TEXTS):
            alone = zoo.reference(family, 0, self.ids_of(text))
            for site, (values, mask) in answers.items():
                names = [f"{site}.1", f"{site}.0"] if site != "logits" else [site]
                expected = torch.cat([alone[name][-1] for name in names])
                assert mask is None
                assert zoo.relative_error(values[i], expected) < FLOAT32, (site, text)
        # Read again by another object, whose layers are all of the stack's: the rest is computed.
        for stack, depth in depths.items():
            cache = ac.UnifiedCache(folder, sites=f"{stack}.resid_post")
            values, _ = cache.get_activations(TEXTS)
            assert values.shape == (len(TEXTS), 32 * depth)
            assert torch.equal(values[:, :32], answers[f"{stack}.resid_post"][0][:, 32:])

    def test_every_row_and_a_warm_run(self, family, folder):
        cache = ac.UnifiedCache(folder, layers=0, sites="decoder.mlp_out", cache_pooled=False)
        values, mask = cache.get_activations(TEXTS)
        for i, text in enumerate(TEXTS):
            alone = zoo.reference(family, 0, self.ids_of(text))["decoder.mlp_out.0"]
            assert int(mask[i].sum()) == len(alone)
            assert zoo.relative_error(values[i][mask[i]], alone) < FLOAT32
        warm = ac.UnifiedCache(folder, layers=0, sites="decoder.mlp_out", cache_pooled=False)
        assert torch.equal(warm.get_activations(TEXTS)[0], values)
        assert not warm.model_loaded

    def test_what_the_decoder_is_given_is_part_of_the_identity(self, family, folder):
        start = zoo.model_of(family).config.decoder_start_token_id
        for model in (folder, zoo.model_of(family)):
            values = ac.UnifiedCache(model, sites="decoder.embed").extractor.source.identity().values
            assert values["decoder_input"] == f"shifted-right:{start}"
        assert "decoder_input" not in ac.UnifiedCache(tiny_model("gpt2")).extractor.source.identity().values

    def test_the_plan_counts_what_is_written(self, family, folder):
        for sites in (["encoder.resid_post"], ["decoder.resid_post.1", "logits"], ["encoder.embed", "decoder.embed"]):
            cache = ac.UnifiedCache(folder, sites=sites, cache_pooled=False)
            plan = cache.plan(TEXTS)
            assert plan.bytes_to_write == cache.warmup(TEXTS).bytes_written


def test_an_encoder_alone_is_planned_as_the_part_it_is():
    model = zoo.model_of("bart")

    def depth(*sites, of=model, **options):
        extractor = ac.UnifiedCache(of, sites=list(sites), **options).extractor
        return share_of_blocks(extractor.source, extractor.sites)

    # Four blocks of the encoder, then three of the decoder.
    assert depth("encoder.resid_post.0") == pytest.approx(1 / 7)
    assert depth("encoder.resid_post") == pytest.approx(4 / 7)
    assert depth("encoder.resid_post", "decoder.resid_post.0") == pytest.approx(5 / 7)
    assert depth("logits", "encoder.embed") == 1.0
    assert depth("resid_post", of=zoo.model_of("gpt2"), layers=1) == pytest.approx(2 / 4)


class TestOnePass:
    @every_family
    def test_texts(self, family):
        model, tokenizer = zoo.model_of(family), tiny_tokenizer(bos=False)
        sites = ["encoder.resid_post.1", "decoder.resid_post.1", "decoder.cross_attn_out.0", "logits"]
        output, cache = ac.run_with_cache(model, TEXTS, tokenizer=tokenizer, sites=sites)
        assert torch.equal(output.logits, cache["logits"])
        for i, text in enumerate(TEXTS):
            alone = zoo.reference(family, 0, TestStored.ids_of(text))
            for site in sites:
                assert zoo.relative_error(cache.rows(site)[i], alone[site]) < FLOAT32, site

    @every_family
    def test_a_dict_is_passed_as_it_is(self, family):
        model = zoo.model_of(family)
        inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "decoder_input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
        with torch.no_grad():
            expected = model(**inputs).logits
        output, cache = ac.run_with_cache(model, inputs, sites=["encoder.embed", "decoder.embed"])
        torch.testing.assert_close(output.logits, expected)
        assert cache["encoder.embed"].shape == (1, 3, 32)
        assert cache["decoder.embed"].shape == (1, 5, 32)

    def test_a_model_without_a_start_token(self):
        model = tiny_model("t5", decoder_start_token_id=None, bos_token_id=None)
        with pytest.raises(errors.OptionError, match="decoder_start_token_id"):
            ac.run_with_cache(model, [7, 8], sites="encoder.embed")


def test_pooling_of_decoder_rows_counts_the_prompts_own_tokens():
    family = "bart"
    ours = ac.ActivationExtractor(zoo.model_of(family), sites="decoder.resid_post.2", pooling="mean").extract(PROMPTS)
    for i, ids in enumerate(PROMPTS):
        alone = zoo.reference(family, 0, tuple(ids))["decoder.resid_post.2"]
        assert zoo.relative_error(ours["decoder.resid_post.2"][i], alone.double().mean(0)) < FLOAT32
