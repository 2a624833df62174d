"""Arrays, and activations of other libraries, come in with their prompts, or what does not fit is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import actcache as ac
from actcache.errors import FormatError, OptionError, UnknownSiteError
from actcache.store.store import Store
from cli_helpers import Cli


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", index_dir=tmp_path / "index")


def test_arrays_with_a_list_of_prompts(tmp_path: Path, store: Store, cli: Cli) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((3, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", matrix)
    texts = ["a", "b", "c"]
    report = ac.import_arrays(tmp_path / "x.npy", "org/m", texts, site="resid_post.5", pooling="mean", store=store)
    assert report.models == {"org/m": 3}
    assert np.array_equal(store.read(report.spaces["org/m"], texts, "resid_post.5", pooling="mean"), matrix)
    with pytest.raises(OptionError, match="site="):
        ac.import_arrays(tmp_path / "x.npy", "org/m", texts, pooling="mean", store=store)
    with pytest.raises(OptionError, match=r"\[3, 8\].*pooling="):
        ac.import_arrays({"embed": matrix}, "org/m", texts, store=store)
    both = {"blocks.0.hook_resid_post": matrix, "resid_post.0": matrix + 1}
    with pytest.raises(OptionError, match=r"'blocks.0.hook_resid_post' and 'resid_post.0' are the same site"):
        ac.import_arrays(both, "org/m", texts, pooling="mean", store=store)
    with pytest.raises(OptionError, match=r"expected \[2, D\]"):
        ac.import_arrays({"embed": matrix}, "org/m", ["a", "b"], pooling="mean", store=store)
    for name, error, words in (
        ("resid_pots.5", UnknownSiteError, "Did you mean 'resid_post'"),
        ("resid_post", OptionError, "as in 'resid_post.5'"),
        ("resid_post.-1", OptionError, "count from 0"),
    ):
        with pytest.raises(error, match=words):
            ac.import_arrays(tmp_path / "x.npy", "org/n", texts, site=name, pooling="mean", store=store)
        with pytest.raises(error, match=words):
            ac.import_arrays({name: matrix}, "org/n", texts, pooling="mean", store=store)
        said = ("--model", "org/n", "--prompts", str(tmp_path / "p.txt"), "--store", str(tmp_path / "none"))
        (tmp_path / "p.txt").write_text("a\n")
        status, out, err = cli("import", str(tmp_path / "x.npy"), "--site", name, *said)
        assert (status, out, err.count("\n")) == (2, "", 1) and name in err
        assert not (tmp_path / "none").exists()
    # As others call it, it is the same one.
    given = {"blocks.5.hook_resid_post": matrix + 1}
    other = ac.import_arrays(given, "org/tl", texts, pooling="mean", store=store)
    assert np.array_equal(store.read(other.spaces["org/tl"], texts, "resid_post.5", pooling="mean"), matrix + 1)
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(FormatError, match="neither"):
        ac.import_arrays(tmp_path / "x.txt", "m", ["a"], store=store)

    whole = torch.from_numpy(rng.standard_normal((2, 4, 8)).astype(np.float32))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    save_file({"resid_post.0": whole, "attn_out.0": whole.bfloat16(), "mask": mask}, tmp_path / "y.safetensors")
    (tmp_path / "p.jsonl").write_text('[1, 2, 3, 4]\n"text"\n')
    arguments = ("--model", "org/m", "--prompts", str(tmp_path / "p.jsonl"), "--store", str(store.location))
    status, out, err = cli("import", str(tmp_path / "y.safetensors"), *arguments)
    assert (status, out) == (0, "org/m: 2 prompts imported.\n"), err
    store.refresh()
    rows = store.read(report.spaces["org/m"], [[1, 2, 3, 4], "text"], "resid_post.0")
    assert torch.equal(rows[0], whole[0])
    assert torch.equal(rows[1], whole[1, 2:])
    assert store.read(report.spaces["org/m"], ["text"], "attn_out.0")[0].dtype == torch.bfloat16
    assert cli("import", str(tmp_path / "y.safetensors"))[0] == 2
    with pytest.raises(OptionError, match="padding cannot be told"):
        ac.import_arrays({"embed": whole}, "m", ["a", "b"], store=store)
    with pytest.raises(OptionError, match="3 token ids and 4 rows"):
        ac.import_arrays({"embed": whole, "mask": np.ones((2, 4))}, "m", [[1, 2, 3], [1, 2, 3, 4]], store=store)


class FakeCache(dict[str, torch.Tensor]):
    """Has what an ActivationCache of TransformerLens shows to the outside."""

    has_batch_dim = True


def test_activation_caches_of_transformer_lens(store: Store) -> None:
    generator = torch.Generator().manual_seed(0)
    cache = FakeCache(
        {
            "blocks.0.hook_resid_post": torch.randn(2, 3, 8, generator=generator),
            "blocks.1.attn.hook_z": torch.randn(2, 3, 4, 2, generator=generator),
            "blocks.1.attn.hook_pattern": torch.randn(2, 4, 3, 3, generator=generator),
            "blocks.0.ln1.hook_scale": torch.randn(2, 3, 1, generator=generator),
        }
    )
    ids = [[1, 2, 3], [4, 5, 6]]
    report = ac.import_transformer_lens(cache, "gpt2", torch.tensor(ids).tolist(), store=store)
    assert report.models == {"gpt2": 2}
    assert {name for name, _ in report.skipped} == {"blocks.1.attn.hook_pattern", "blocks.0.ln1.hook_scale"}
    rows = store.read(report.spaces["gpt2"], ids, "z.1")
    assert torch.equal(rows[1], cache["blocks.1.attn.hook_z"][1].reshape(3, 8))
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    ac.import_transformer_lens(cache, "gpt2", ["long text", "short"], mask=mask, store=store)
    short = store.read(report.spaces["gpt2"], ["short"], "resid_post.0")[0]
    assert torch.equal(short, cache["blocks.0.hook_resid_post"][1, 1:])
    single = FakeCache({"blocks.0.hook_resid_post": cache["blocks.0.hook_resid_post"][0]})
    single.has_batch_dim = False
    assert ac.import_transformer_lens(single, "gpt2", ["one"], store=store).prompts == 1
    with pytest.raises(OptionError, match="nothing that could be imported"):
        ac.import_transformer_lens(FakeCache(), "gpt2", ["one"], store=store)
    with pytest.raises(OptionError, match=r"expected \[3, S"):
        ac.import_transformer_lens(cache, "gpt2", ["a", "b", "c"], store=store)


def test_values_that_do_not_fit_leave_their_prompt_out(tmp_path: Path) -> None:
    half = Store(tmp_path / "store", dtype="float16", index_dir=tmp_path / "index")
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = 1e6
    report = ac.import_arrays({"resid_post.0": rows}, "m", ["a", "b", "c"], pooling="mean", store=half)
    assert report.models == {"m": 2}
    ((what, why),) = report.skipped
    assert what == "'b'"
    assert "bfloat16" in why


def test_texts_of_one_token_whose_ids_are_unknown_stay_two(store: Store) -> None:
    # 31 bits of their digests agree, which is all that a single stand-in for a token id holds.
    texts = ["word 17675", "word 126757"]
    for i, text in enumerate(texts):
        arrays = {"resid_post.0": np.full((1, 1, 3), i, np.float32)}
        report = ac.import_arrays(arrays, "some/model", [text], store=store)
    (space,) = report.spaces.values()
    assert store.spaces()[0].num_prompts == 2
    np.testing.assert_array_equal(torch.cat(store.read(space, texts, "resid_post.0"))[:, 0], [0, 1])
    store.merge(space)
    assert sorted(text or "" for text in store.prompts(space).texts) == sorted(texts)
    assert store.verify().ok
    store.invalidate(space, [texts[0]])
    assert store.contains(space, texts, "resid_post.0").tolist() == [False, True]


def test_a_saved_cache_of_transformer_lens_comes_in_by_the_verb(tmp_path: Path, store: Store, cli: Cli) -> None:
    """With every hook point that there is, and heads apart, as `run_with_cache` gives them."""
    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(2, 3, 4, 2, generator=generator)
    saved = {
        "blocks.0.attn.hook_attn_scores": torch.randn(2, 4, 3, 3, generator=generator),
        "blocks.0.attn.hook_pattern": torch.randn(2, 4, 3, 3, generator=generator),
        "blocks.0.ln1.hook_scale": torch.randn(2, 3, 1, generator=generator),
        "hook_pos_embed": torch.randn(2, 3, 8, generator=generator),
    }
    wanted = {"blocks.0.attn.hook_z": heads, "blocks.0.hook_resid_post": torch.randn(2, 3, 8, generator=generator)}
    save_file({**saved, **wanted}, tmp_path / "cache.safetensors")
    save_file(saved, tmp_path / "none.safetensors")
    save_file({"resid_posst.0": heads[..., 0].contiguous()}, tmp_path / "misspelt.safetensors")
    ids = [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "p.jsonl").write_text("[1, 2, 3]\n[4, 5, 6]\n")
    arguments = ("--model", "org/m", "--prompts", str(tmp_path / "p.jsonl"), "--store", str(store.location))
    status, out, err = cli("import", str(tmp_path / "cache.safetensors"), *arguments)
    assert status == 0 and "org/m: 2 prompts imported." in out, err
    assert all(name in out + err for name in saved)
    store.refresh()
    (space,) = store.spaces()
    for site, hook in (("z.0", "blocks.0.attn.hook_z"), ("resid_post.0", "blocks.0.hook_resid_post")):
        for i, rows in enumerate(store.read(space, ids, site)):
            assert torch.equal(rows, wanted[hook][i].reshape(3, 8))
    status, _, err = cli("import", str(tmp_path / "none.safetensors"), *arguments)
    assert status == 2 and "hook_attn_scores" in err and "pattern.0" in err
    status, _, err = cli("import", str(tmp_path / "misspelt.safetensors"), *arguments)
    assert status == 2 and "resid_post" in err
    with pytest.raises(OptionError, match="expected"):
        # Nothing is joined that may be tokens.
        ac.import_arrays({"blocks.0.attn.hook_z": heads}, "m", ids, pooling="mean", store=store)
