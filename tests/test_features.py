"""Features of autoencoders over what is stored: what sae.encode gives, stored once, and never those of another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.derive.autoencoder import autoencoder_digest
from actcache.errors import NotCachedError, OptionError, WrongSiteError
from actcache.extract import features as encoding
from actcache.store import segment
from actcache.store.store import Store
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from features_helpers import PROMPTS, SITE, SPACE, WIDTH, N, Sae, new_store, same, vectors


def test_they_are_what_encode_gives_and_computed_once(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae()
    features = ac.encode_store(store, sae, SITE, space=SPACE)
    assert (features.encoded, features.found, features.n_features, features.site) == (40, 0, N, SITE)
    same(features, sae)
    assert sae.training, "it is left in the mode in which it came"
    files = list((store.root / features.space).glob("*.safetensors"))
    assert files and [segment.validate(p) for p in files] == [[]] * len(files)

    calls = len(sae.seen)
    again = ac.encode_store(store, Sae(), "blocks.1.hook_resid_post", space=SPACE.space)
    assert (again.encoded, again.found, again.space) == (0, 40, features.space)
    assert len(sae.seen) == calls
    more = [[77, 1, 2], [78]]
    store.write(SPACE, more, {SITE: [vectors(p) for p in more]})
    assert ac.encode_store(store, sae, SITE, space=SPACE).encoded == 2
    assert sum(b * t for b, t, _ in sae.seen[calls:]) <= 2 * 4, "what is stored is not encoded again"
    same(features, sae, PROMPTS + more)
    assert len(features.prompts()) == 42


def test_where_a_feature_is_active_and_how_often(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae()
    features = ac.Features.open(store, ac.encode_store(store, sae, SITE, space=SPACE, name="mine").space)
    assert (features.n_features, features.pooling, features.site) == (N, None, SITE)
    assert ac.Features.open(store, "mine").space == features.space
    table = features.prompts()
    dense = [found.to_dense() for found in features.read()]
    assert torch.equal(features.counts(), torch.stack([(d != 0).sum(0) for d in dense]).sum(0))
    prompt, position, value = features.where(3)
    assert len(prompt) == int(features.counts()[3]) > 0
    for i, t, v in zip(prompt.tolist(), position.tolist(), value.tolist(), strict=True):
        assert dense[i][t, 3] == v
        with torch.no_grad():
            assert sae.encode_of(vectors(table.tokens(i).tolist()))[t, 3] == pytest.approx(v, rel=1e-5)
    with pytest.raises(NotCachedError, match="Did you mean 'mine'"):
        ac.Features.open(store, "mime")


def test_pooled_vectors_have_one_row_each(tmp_path: Path) -> None:
    store, sae = Store(tmp_path / "store", index_dir=tmp_path / "index"), Sae()
    last = torch.stack([vectors(p)[-1] for p in PROMPTS])
    store.write(SPACE, PROMPTS, {SITE: list(last)}, pooling="last_token")
    with pytest.raises(NotCachedError, match="last_token"):
        ac.encode_store(store, sae, SITE, space=SPACE)
    features = ac.encode_store(store, sae, SITE, space=SPACE, pooling="last_token")
    found = features.read(PROMPTS)
    assert found.shape == (40, N)
    with torch.no_grad():
        torch.testing.assert_close(found.to_dense(), sae.encode_of(last), rtol=1e-5, atol=1e-6)
    assert store.contains(features.space, PROMPTS, "features", pooling="last_token").all()
    assert ac.Features.open(store, features.space).pooling == "last_token"


def test_a_cache_of_a_model_by_text(tmp_path: Path) -> None:
    texts = ["one two three", "one", "something longer than the others"]
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    cache = ac.UnifiedCache(
        tiny_model("gpt2"), layers=[1], tokenizer=tiny_tokenizer(), store=store, cache_pooled=False,
        compute_perplexity=False,
    )  # fmt: skip
    sae = Sae(width=32)
    with pytest.raises(NotCachedError):
        ac.encode_store(cache, sae, "resid_post.1")
    cache.warmup(texts)
    features = ac.encode_store(cache, sae, "resid_post.1")
    activations, mask = cache.get_activations(texts)
    with torch.no_grad():
        for i, found in enumerate(features.read(texts)):
            expected = sae.encode_of(activations[i][mask[i]])
            torch.testing.assert_close(found.to_dense(), expected, rtol=1e-4, atol=1e-5)
    # What is stored of the model is found, and deleted, as if there were no features.
    names = [one.model_name for one in store.spaces()]
    assert sum(name == cache.model_name for name in names) == 1 and len(names) == 2
    with pytest.raises(NotCachedError, match=r"resid_post\.1"):
        ac.encode_store(cache, sae, "resid_post.2")


class Elsewhere(Sae):
    """One that was trained on something else than the stream as it is."""

    def __init__(self, **said: Any) -> None:
        super().__init__(width=32)
        self.cfg = {"metadata": said}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_vectors_are_prepared_as_the_model_does(tmp_path: Path, family: str) -> None:
    store = Store(tmp_path / "store", index_dir=tmp_path / "index")
    cache = ac.UnifiedCache(
        tiny_model(family), sites=["resid_pre"], layers=[1], tokenizer=tiny_tokenizer(), store=store,
        cache_pooled=False, compute_perplexity=False,
    )  # fmt: skip
    texts = ["one two three", "four"]
    cache.warmup(texts)
    site, (space,) = "resid_pre.1", store.spaces()
    rows = store.read(space, texts, site)
    plain = Elsewhere()
    centred = Elsewhere(model_from_pretrained_kwargs={"center_writing_weights": True})
    normalised = Elsewhere(hook_name="blocks.1.ln1.hook_normalized")
    for sae in (centred, normalised):
        with pytest.raises(OptionError, match="model="):
            ac.encode_store(store, sae, site, space=space)
    kinds = {"plain": plain, "centred": centred, "normalised": normalised}
    found = {name: ac.encode_store(cache, sae, site) for name, sae in kinds.items()}
    # TransformerLens centres nothing where the norm would notice.
    means = [row.mean(-1, keepdim=True) * (family == "gpt2") for row in rows]
    epsilon = 1e-5 if family == "gpt2" else cache.model.config.rms_norm_eps
    scales = [((r - m).square().mean(-1, keepdim=True) + epsilon).sqrt() for r, m in zip(rows, means, strict=True)]
    expected = {
        "plain": rows,
        "centred": [row - mean for row, mean in zip(rows, means, strict=True)],
        "normalised": [(r - m) / s for r, m, s in zip(rows, means, scales, strict=True)],
    }
    for name, features in found.items():
        for got, row in zip(features.read(texts), expected[name], strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got.to_dense(), plain.encode_of(row), rtol=1e-3, atol=1e-4)
    assert len({features.space for features in found.values()}) == 3
    again = ac.encode_store(store, centred, site, space=space, model=cache.model)
    assert (again.space, again.encoded) == (found["centred"].space, 0)


def test_vectors_of_a_dataset_that_was_pulled(tmp_path: Path) -> None:
    store, there = Store(tmp_path / "store", index_dir=tmp_path / "index"), Store(tmp_path / "there")
    texts, rows = ["a b", "c d", "e f"], torch.randn(3, WIDTH)
    store.write(SPACE, texts, {SITE: list(rows)}, pooling="last_token")
    ac.push_dataset(tmp_path / "set", "org/model", None, store=store)
    ac.pull_dataset(tmp_path / "set", store=there, trust_names=True)
    (space,) = there.spaces()
    sae = Sae()
    features = ac.encode_store(there, sae, SITE, space=space, pooling="last_token")
    with torch.no_grad():
        found = features.read(texts).to_dense()
        torch.testing.assert_close(found, sae.encode_of(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_vectors_are_encoded_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    store, sae = new_store(tmp_path, dtype=dtype), Sae()
    features = ac.encode_store(store, sae, SITE, space=SPACE)
    with torch.no_grad():
        for found, rows in zip(features.read(PROMPTS), store.read(SPACE, PROMPTS, SITE), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.to_dense(), sae.encode_of(rows.float()), rtol=1e-5, atol=1e-6)


def test_an_autoencoder_of_another_dtype_gives_features_of_that(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae(dtype=torch.bfloat16)
    (found, *_) = ac.encode_store(store, sae, SITE, space=SPACE).read(PROMPTS[5:6])
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        expected = sae.encode_of(vectors(PROMPTS[5]).bfloat16())
    torch.testing.assert_close(found.to_dense(), expected, rtol=0.02, atol=0.02)


def test_only_the_same_autoencoder_finds_its_features(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    store.write(SPACE, PROMPTS, {"resid_post.2": [vectors(p) for p in PROMPTS]})
    one = Sae()
    moved = Sae()
    with torch.no_grad():
        moved.encoder.bias[0] += 1e-6
    wide = Sae()
    wide.cfg = {"device": "cpu", "k": 3}
    other_config = Sae()
    other_config.cfg = {"device": "cpu", "k": 4}
    spaces = [ac.encode_store(store, sae, SITE, space=SPACE).space for sae in (one, moved, Sae(threshold=0.4), wide)]
    spaces.append(ac.encode_store(store, other_config, SITE, space=SPACE).space)
    spaces.append(ac.encode_store(store, one, "resid_post.2", space=SPACE).space)
    assert len(set(spaces)) == len(spaces)
    elsewhere = Sae().eval()
    elsewhere.cfg = {"device": "cuda:1", "k": 3}
    assert autoencoder_digest(elsewhere, None) == autoencoder_digest(wide, None)


def test_functions_need_a_name(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    function: Callable[[Tensor], Tensor] = lambda x: (x - 1).relu()  # noqa: E731
    with pytest.raises(OptionError, match=r"<lambda>.*digest="):
        ac.encode_store(store, function, SITE, space=SPACE)
    with pytest.raises(OptionError, match=r"SimpleNamespace.*digest="):
        ac.encode_store(store, SimpleNamespace(encode=SimpleNamespace), SITE, space=SPACE)
    with pytest.raises(OptionError, match="digest is ''"):
        ac.encode_store(store, function, SITE, space=SPACE, digest="")
    with pytest.raises(OptionError, match=r"Linear has no encode"):
        ac.encode_store(store, nn.Linear(8, 8), SITE, space=SPACE)
    assert len(store.spaces()) == 1, "nothing was written"
    features = ac.encode_store(store, function, SITE, space=SPACE, digest="shifted-1")
    for found, prompt in zip(features.read(PROMPTS), PROMPTS, strict=True):
        assert torch.equal(found.to_dense(), (vectors(prompt) - 1).relu())
    assert ac.encode_store(store, function, SITE, space=SPACE, digest="shifted-2").encoded == 40


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, sae = new_store(tmp_path), Sae()
    wrong = Sae()
    wrong.cfg = {"metadata": {"hook_name": "blocks.3.hook_resid_post"}}
    with pytest.raises(WrongSiteError, match=r"blocks\.3"):
        ac.encode_store(store, wrong, SITE, space=SPACE)
    with pytest.raises(OptionError, match="vectors of 8 numbers"):
        ac.encode_store(store, Sae(width=9), SITE, space=SPACE)
    with pytest.raises(NotCachedError, match=r"resid_post\.1"):
        ac.encode_store(store, sae, "resid_post.7", space=SPACE)
    with pytest.raises(OptionError, match="space="):
        ac.encode_store(store, sae, SITE)
    with pytest.raises(NotCachedError, match="has no space"):
        ac.encode_store(store, sae, SITE, space="0" * 32)
    with pytest.raises(OptionError, match="str"):
        ac.encode_store("somewhere", sae, SITE)
    with pytest.raises(OptionError, match="limit of 0"):
        ac.encode_store(Store(store.folder, limit_gb=0, index_dir=tmp_path / "index"), sae, SITE, space=SPACE)

    class BatchTopK(Sae):
        def encode(self, x: Tensor) -> Tensor:
            found = self.encode_of(x)
            return found * (found >= found.flatten().topk(2 * x.shape[1]).values.min())

    with pytest.raises(OptionError, match="beside it"):
        ac.encode_store(store, BatchTopK(), SITE, space=SPACE)
    assert len(store.spaces()) == 1


def test_memory_does_not_grow_with_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_NUMBERS_AT_ONCE", 10 * N)
    store, sae = new_store(tmp_path), Sae()
    same(ac.encode_store(store, sae, SITE, space=SPACE), sae)
    # All but the trial, which is made before it is known how many features there are.
    assert max(b * t for b, t, _ in sae.seen[encoding._TRIED + 1 :]) <= 10


def test_texts_of_several_tokenizers(tmp_path: Path) -> None:
    store, sae = Store(tmp_path / "store", index_dir=tmp_path / "index"), Sae()
    for context, words in (("one", ["a", "b"]), ("two", ["c", "d"])):
        rows = [torch.full((2, WIDTH), float(ord(w))) for w in words]
        store.write(SPACE, words, {SITE: rows}, text_context=context)
    features = ac.encode_store(store, sae, SITE, space=SPACE)
    with torch.no_grad():
        for found, word in zip(features.read(["d", "a", "c"]), "dac", strict=True):
            expected = sae.encode_of(torch.full((2, WIDTH), float(ord(word))))
            torch.testing.assert_close(found.to_dense(), expected, rtol=1e-5, atol=1e-5)
    for path in (store.root / features.space).glob("*.safetensors"):
        assert segment.validate(path) == []
