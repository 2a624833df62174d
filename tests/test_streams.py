"""`ac.stream_activations` out of a store on disk: every token once, with its own values; what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import actcache as ac
from actcache.store.records import Records
from store_helpers import SITES, every_token, make_store, make_table, pooled, segment_files, vector
from stream_helpers import ALL, SITE, stream_of, streamed, taken, values_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ac.Store, str]:
    return streamed(tmp_path_factory.mktemp("store"))


def test_batches_have_their_size(made: tuple[ac.Store, str]) -> None:
    sizes = [len(batch) for batch, _ in stream_of(made, batch_size=50)]
    assert sizes == [50] * (len(ALL) // 50) + [len(ALL) % 50]
    dropping = stream_of(made, batch_size=50, drop_last=True)
    assert [len(batch) for batch, _ in dropping] == [50] * (len(ALL) // 50)
    assert len(dropping) == len(ALL) // 50
    (one,) = stream_of(made, batch_size=10**6)
    assert len(one[0]) == len(ALL)


def test_a_stream_of_no_batch_is_refused(made: tuple[ac.Store, str]) -> None:
    """Trainers ask for epoch after epoch, and would wait for ever."""
    with pytest.raises(ac.errors.OptionError, match="drop_last=True give no batch"):
        next(itertools.chain.from_iterable(itertools.repeat(stream_of(made, batch_size=len(ALL) + 1, drop_last=True))))
    (whole,) = stream_of(made, batch_size=len(ALL), drop_last=True)
    assert len(whole[0]) == len(ALL)
    assert len(list(stream_of(made, batch_size=len(ALL), rank=0, world_size=2))) == 1
    with pytest.raises(ac.errors.OptionError, match="for rank 1 of 2"):
        iter(stream_of(made, batch_size=len(ALL), rank=1, world_size=2))


def test_sites_are_aligned(made: tuple[ac.Store, str]) -> None:
    stream = stream_of(made, SITES)
    assert sorted(taken(stream)) == ALL
    assert [list(batch) for batch, _ in stream] == [SITES] * len(stream)


@pytest.mark.parametrize("shuffle", [True, False])
def test_sites_that_lie_in_different_segments_are_aligned(tmp_path: Path, shuffle: bool) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30), SITES[:1]))
    store.append(space, every_token([*range(29, 9, -1)], SITES[1:]))
    stream = stream_of((store, space), SITES, shuffle=shuffle, batch_size=7)
    assert sorted(taken(stream)) == [token for token in ALL if 10 <= token[0] < 30]


def test_only_the_prompts_that_were_asked_for(made: tuple[ac.Store, str]) -> None:
    wanted = [make_table([i]).text_of(0) for i in (50, 3, 17, 3)]
    stream = stream_of(made, shuffle=False, prompts=wanted)
    assert taken(stream) == [token for i in (50, 3, 17) for token in ALL if token[0] == i]
    with pytest.raises(ac.errors.NotCachedError, match=r"1 of 2 prompts .* prompt 1"):
        stream_of(made, prompts=[wanted[0], "never seen"])


def test_tokens_are_left_out(made: tuple[ac.Store, str]) -> None:
    assert sorted(taken(stream_of(made, exclude="first"))) == [token for token in ALL if token[1] > 0]
    ids = {(i, q): ([i, *range(i % 7)])[q] for i, q in ALL}
    for shuffle in (True, False):
        stream = stream_of(made, exclude=[0, 3, 59], shuffle=shuffle)
        assert sorted(taken(stream)) == [token for token in ALL if ids[token] not in (0, 3, 59)]
    assert sorted(taken(stream_of(made, exclude=["first", 1]))) == [t for t in ALL if t[1] > 0 and ids[t] != 1]
    with pytest.raises(ac.errors.OptionError, match="does not know"):
        stream_of(made, exclude="bos")
    with pytest.raises(ac.errors.OptionError, match=r"'frist'.*'first'"):
        stream_of(made, exclude="frist")
    with pytest.raises(ac.errors.OptionError, match="nothing is left"):
        stream_of(made, exclude=list(range(60)))


def test_pooled_vectors(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, pooled(range(20)))
    stream = stream_of((store, space), pooling="last_token", batch_size=6)
    found = []
    for batch, tokens in stream:
        assert set(tokens.position.tolist()) == set(tokens.token_id.tolist()) == {-1}
        names = [int(stream.prompts.tokens(p)[0]) for p in tokens.prompt.tolist()]
        np.testing.assert_array_equal(batch.numpy(), np.stack([vector(i, SITE) for i in names]))
        found += names
    assert sorted(found) == list(range(20))
    with pytest.raises(ac.errors.OptionError, match="exclude"):
        stream_of((store, space), pooling="last_token", exclude="first")
    with pytest.raises(ac.errors.NotCachedError, match="last_token"):
        stream_of((store, space))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_values_are_those_that_reading_gives(tmp_path: Path, dtype: str) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token([59]))
    store = ac.Store(store.location, index_dir=store.index_dir, dtype=dtype)
    store.append(space, every_token(range(40)))
    stream = stream_of((store, space), batch_size=33)
    rows = dict(enumerate(store.read(space, None, SITE)))
    for batch, tokens in stream:
        for value, p, q in zip(batch, tokens.prompt.tolist(), tokens.position.tolist(), strict=True):
            assert torch.equal(value, rows[p][q])
    wide = stream_of((store, space), batch_size=33, dtype=torch.float64)
    assert next(iter(wide))[0].dtype == torch.float64


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    rows = np.full((3, 4), 1e6, np.float32)
    store.append(space, Records.tokens(make_table([2]), {SITE: rows}))
    with pytest.raises(ac.errors.ValueOverflowError, match=SITE):
        list(stream_of((store, space), dtype="float16"))


@pytest.mark.parametrize("exclude", [None, "first", [2, 5]])
def test_statistics_are_those_of_the_tokens_that_come(made: tuple[ac.Store, str], exclude: Any) -> None:
    stream = stream_of(made, SITES, exclude=exclude)
    tokens = taken(stream)
    for site in SITES:
        rows, found = values_of(tokens, site), stream.statistics[site]
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, rows.std(0), rtol=1e-12)
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


@pytest.mark.parametrize("exclude", [None, "first"])
def test_normalized(made: tuple[ac.Store, str], exclude: Any) -> None:
    def rows(normalize: str | None, **options: Any) -> npt.NDArray[Any]:
        stream = stream_of(made, exclude=exclude, normalize=normalize, **options)
        return torch.cat([batch for batch, _ in stream]).numpy()

    plain = rows(None).astype(np.float64)
    np.testing.assert_allclose(rows("mean"), plain - plain.mean(0), atol=1e-5)
    np.testing.assert_allclose(rows("mean_std"), (plain - plain.mean(0)) / plain.std(0), atol=1e-5)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(rows("unit"), plain / lengths, atol=1e-6)
    assert rows("mean_std", dtype="float16").dtype == np.float16
    with pytest.raises(ac.errors.OptionError, match=r"normalize 'means'.*'mean'"):
        stream_of(made, normalize="means")


def test_what_does_not_vary_becomes_zero(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, Records.tokens(make_table([2]), {SITE: np.array([[3, 1], [3, 2], [3, 3]], np.float32)}))
    ((batch, _),) = stream_of((store, space), normalize="mean_std", shuffle=False)
    np.testing.assert_allclose(batch, [[0, -1.2247449], [0, 0], [0, 1.2247449]], atol=1e-6)


def test_what_is_stored_meanwhile_comes_in_another_stream(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    stream = stream_of((store, space))
    batches = iter(stream)
    first = [next(batches) for _ in range(3)]
    store.append(space, every_token(range(30, 60)))
    assert sorted(taken(stream, [*first, *batches])) == sorted(taken(stream)) == [t for t in ALL if t[0] < 30]
    assert sorted(taken(stream_of((store, space)))) == ALL


def test_what_is_removed_meanwhile_still_comes(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(30)))
    store.append(space, every_token(range(30, 60)))
    stream = stream_of((store, space), prefetch=0)
    batches = iter(stream)
    first = [next(batches)]
    assert ac.Store(store.location, index_dir=tmp_path / "other").evict(0).prompts == 60
    assert not segment_files(store, space)
    assert sorted(taken(stream, [*first, *batches])) == sorted(taken(stream)) == ALL
    with pytest.raises(ac.errors.NotCachedError):
        stream_of((store, space))


def test_damage_is_an_error_that_says_where(tmp_path: Path) -> None:
    store, space = make_store(tmp_path)
    store.append(space, every_token(range(60)))
    (path,) = segment_files(store, space)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    stream = stream_of((ac.Store(store.location, index_dir=tmp_path / "other"), space), SITES)
    with pytest.raises(ac.errors.NotCachedError, match=f"{path.name}.*{SITES[1]} is damaged"):
        list(stream)
    assert sorted(taken(stream_of((ac.Store(store.location, index_dir=tmp_path / "third"), space)))) == ALL


def test_batches_are_the_callers(made: tuple[ac.Store, str]) -> None:
    for options in ({}, {"shuffle": False}, {"exclude": "first"}):
        kept = [(batch, tokens) for batch, tokens in stream_of(made, **options)]
        before = [batch.clone() for batch, _ in kept]
        kept[0][0].zero_()
        assert all(torch.equal(a[0], b) for a, b in zip(kept[1:], before[1:], strict=True))
    assert sorted(taken(stream_of(made))) == ALL


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"batch_size": True}, {"seed": -1}, {"prefetch": -1}, {"dtype": "int32"}]
)
def test_options_that_are_none(made: tuple[ac.Store, str], option: dict[str, Any]) -> None:
    with pytest.raises(ac.errors.OptionError, match=next(iter(option)) if "dtype" not in option else "int32"):
        stream_of(made, **option)


def test_sites_that_are_none(made: tuple[ac.Store, str]) -> None:
    for sites in ([], [SITE, SITE], 5):
        with pytest.raises((ac.errors.OptionError, TypeError)):
            stream_of(made, sites)  # type: ignore[arg-type]
    with pytest.raises(ac.errors.NotCachedError, match=r"resid_post.7.*Did you mean 'resid_post"):
        stream_of(made, "resid_post.7")


def test_sites_have_the_names_of_other_libraries(made: tuple[ac.Store, str], tmp_path: Path) -> None:
    wanted = taken(stream_of(made))
    for name in (ac.Site.parse(SITE), "blocks.0.hook_resid_post", "layer_0"):
        assert taken(stream_of(made, name)) == wanted
    both = stream_of(made, ["blocks.0.hook_resid_post", ac.Site.parse(SITES[1])])
    assert list(next(iter(both))[0]) == SITES
    with pytest.raises(ac.errors.OptionError, match="sites="):
        stream_of(made, [SITE, "layer_0"])
    store, space = make_store(tmp_path)
    store.write(space, ["a b"], {"layer_0": [torch.ones(3, 2)]})
    (batch, _) = next(iter(stream_of((store, space), "layer_0")))
    assert torch.equal(batch, torch.ones(3, 2))


def test_numbers_of_numpy(made: tuple[ac.Store, str]) -> None:
    wanted = taken(stream_of(made, seed=3, rank=1, world_size=2))
    odd = stream_of(made, seed=np.int64(3), batch_size=np.int32(16), rank=np.int64(1), world_size=np.int64(2))
    assert taken(odd) == wanted
    assert json.loads(json.dumps(odd.state_dict()))["seed"] == 3
    with pytest.raises(ac.errors.OptionError, match="rank=True"):
        stream_of(made, rank=True, world_size=2)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", 3.5])
def test_devices_that_are_not_there(made: tuple[ac.Store, str], device: Any) -> None:
    with pytest.raises(ac.errors.OptionError, match=r"device"):
        stream_of(made, device=device)
    assert next(iter(stream_of(made, device="auto")))[0].device.type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("wrong", [-1, len(ALL), 1 << 40])
def test_rows_that_there_are_not_are_never_read(made: tuple[ac.Store, str], wrong: int) -> None:
    rows = made[0].numbered(made[1], made[0].common_prompts(made[1], SITES), SITES)
    with pytest.raises(ac.errors.NotCachedError, match=str(wrong)):
        rows.take(np.array([3, wrong]), SITE)
    assert rows.take(np.array([], np.int64), SITE).shape == (0, 8)
