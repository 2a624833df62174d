"""One bit of any file of a dataset is another: whoever reads it gets right numbers or an error, never others."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

import actcache as ac
from actcache.errors import ActCacheError, DatasetFormatError
from actcache.share import blocks, seal
from actcache.share.blocks import DamagedFileError
from actcache.share.folder import Folder
from actcache.share.index import Index
from made_datasets import make
from share_helpers import (
    BLOCKS,
    INDEX,
    MODEL,
    Published,
    fill_logits,
    fill_perplexity,
    fill_pooled,
    fill_tokens,
    flipped,
    has_right_digests,
    new_space,
    new_store,
    rows,
    text,
)

N = range(12)
TEXTS = [text(i) for i in N]
SITES = ("resid_post.0", "resid_post.1", "attn_out.1")


@pytest.fixture(scope="module", params=["pooled", "full"])
def small(request, tmp_path_factory):
    """A dataset of small files."""
    home = tmp_path_factory.mktemp(request.param)
    store = new_store(home)
    space = new_space(store)
    (fill_pooled if request.param == "pooled" else fill_tokens)(store, space, N, SITES)
    fill_logits(store, space, N)
    fill_perplexity(store, space, N)
    ac.push_dataset(home / "set", MODEL, None, store=store, shard_max_bytes=150)
    return home / "set"


def changes(folder, count, seed):
    """`count` files, bytes and bits: some of every file, and of the index and digests as many as of all others."""
    drawn = random.Random(seed)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    special = [p for p in files if p.suffix != ".safetensors"]
    for number in range(count):
        path = drawn.choice(special if number % 2 else files)
        yield path, drawn.randrange(path.stat().st_size), drawn.randrange(8)


def wanted(site, numbers, form=None):
    return np.stack([rows(i, site)[-1] for i in numbers])


def read_all(folder):
    found = ac.load_activations(folder, prompts=TEXTS)
    return all(np.array_equal(found[layer], wanted(f"resid_post.{layer}", N)) for layer in (0, 1))


def read_some(folder):
    found = ac.load_activations(folder, prompts=TEXTS[3:5], layers=[1], site="attn_out")[1]
    return np.array_equal(found, wanted("attn_out.1", (3, 4)))


def read_tensors(folder):
    found, told = ac.load_activation_dataset(folder)
    ids = [int(prompt.split()[1]) for prompt in ac.fetch_dataset_metadata(folder).prompts]
    last = slice(0, len(N))
    right = np.array_equal(found["logits_topk.indices"][:, 0].numpy(), ids)
    assert told["num_prompts"] == len(N)
    for layer in (0, 1):
        right &= np.array_equal(found[f"hidden.layer_{layer}"][last].numpy(), wanted(f"resid_post.{layer}", ids))
    return bool(right)


def pulled(folder, home, *, materialize):
    """Whether what is read of a pulled dataset is right: all of it, or two prompts that are fetched then."""
    with new_store(home) as store:
        ac.pull_dataset(folder, store=store, materialize=materialize)
        (space,) = store.spaces()
        right = True
        layers = (0, 1) if materialize else (1,)
        for numbers in (N, (7, 2)) if materialize else ((3, 4), (9,)):
            for layer in layers:
                asked = [text(i) for i in numbers]
                found = store.read(space, asked, f"resid_post.{layer}", pooling="last_token")
                right &= np.array_equal(np.asarray(found), wanted(f"resid_post.{layer}", numbers))
        return bool(right)


def outcomes(folder, drawn, read):
    """What `read` makes of each change; AssertionError for a wrong number, and what is no error of ours is raised."""
    found = []
    for number, (path, at, bit) in enumerate(drawn):
        flipped(path, at, bit)
        try:
            assert read(folder, number), (path, at, bit)
            found.append("right")
        except ActCacheError as error:
            found.append(type(error).__name__)
        finally:
            flipped(path, at, bit)
    return found


def test_one_bit_of_any_file_makes_no_number_a_wrong_one(small):
    def read(folder, number):
        return (read_all, read_some, read_tensors)[number % 3](folder)

    assert all(read(small, number) for number in range(3))
    found = outcomes(small, changes(small, 150, seed=1), read)
    # Of files that are not read nothing is known.
    assert set(found) == {"right", "DamagedFileError"} and found.count("DamagedFileError") > 75


def test_nor_one_that_is_pulled(small, tmp_path):
    def read(folder, number):
        return pulled(folder, tmp_path / str(number), materialize=bool(number % 2))

    assert all(read(small, number) for number in (1000, 1001))
    found = outcomes(small, changes(small, 16, seed=2), read)
    assert set(found) == {"right", "DamagedFileError"}


@pytest.mark.slow
def test_nor_one_of_every_few_bytes_of_all_files(small):
    drawn = random.Random(4)
    some = [
        (path, at, drawn.randrange(8))
        for path in sorted(small.rglob("*"))
        if path.is_file() and path.name != "README.md"
        for at in range(0, path.stat().st_size, 5)
    ]
    found = outcomes(small, some, lambda folder, number: (read_all, read_some, read_tensors)[number % 3](folder))
    assert set(found) <= {"right", "DamagedFileError", "DatasetFormatError"} and "DamagedFileError" in found


class TestIndex:
    def test_others_read_it_and_one_that_they_write_is_read(self, small, tmp_path, caplog):
        table = pq.read_table(small / INDEX)
        assert table.num_rows == len(N) and pq.ParquetFile(small / INDEX).metadata.num_rows == len(N)
        shutil.copytree(small, tmp_path / "set")
        assert read_all(tmp_path / "set") and not caplog.records
        pq.write_table(table.append_column("more", [[1] * len(N)]), tmp_path / "set" / INDEX)
        assert read_all(tmp_path / "set") and "was written anew" in caplog.text

    def test_a_damaged_mark_is_no_other_writer(self, small, tmp_path, caplog):
        shutil.copytree(small, tmp_path / "set")
        path = tmp_path / "set" / INDEX
        data = path.read_bytes()
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        mark = footer - seal.TAIL
        assert data[mark : mark + 5] == b"ACIDX"
        for byte in range(8):
            for bit in (1, 128):
                changed = bytearray(data)
                changed[mark + byte] ^= bit
                path.write_bytes(changed)
                with pytest.raises(DamagedFileError, match="its own checksums are damaged"):
                    Index(Folder(tmp_path / "set"))
        assert not caplog.records

    def test_a_whole_seal_of_another_kind_is_passed_by(self, small, tmp_path, caplog):
        shutil.copytree(small, tmp_path / "set")
        path = tmp_path / "set" / INDEX
        data = bytearray(path.read_bytes())
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        mark = footer - seal.TAIL
        body = int.from_bytes(data[mark + 8 : mark + 16], "little")
        data[mark : mark + 8] = b"ACIDX999"
        data[footer - 16 : footer] = xxhash.xxh3_128_digest(bytes(data[body : footer - 16]))
        path.write_bytes(data)
        assert read_all(tmp_path / "set")

    def test_of_a_large_one_only_what_is_read_is_checked(self, tmp_path):
        made = make(tmp_path / "set", n=40, k=0)
        table = pq.read_table(made.folder / INDEX)
        noise = np.random.default_rng(0).bytes
        for name in ("first", "second"):
            table = table.append_column(name, [[noise(20_000).hex() for _ in range(40)]])
        pq.write_table(table, made.folder / INDEX, use_dictionary=False, compression="none")
        seal.put(made.folder / INDEX)
        index = Index(Folder(made.folder))
        assert index.nbytes > 3_000_000
        right = index.read(["first"])["first"].to_pylist()
        found = pq.ParquetFile(made.folder / INDEX).metadata.row_group(0)
        at = {found.column(n).path_in_schema: found.column(n).data_page_offset for n in range(found.num_columns)}
        flipped(made.folder / INDEX, at["second"] + 700_000)
        index = Index(Folder(made.folder))
        assert index.read(["first"])["first"].to_pylist() == right
        with pytest.raises(DamagedFileError, match=f"{INDEX} of .* is damaged"):
            index.read(["second"])
        with pytest.raises(DamagedFileError):
            list(Index(Folder(made.folder)).batches(["second", "text"]))


class TestMigrated:
    def test_new_files_have_them(self, tmp_path):
        made = make(tmp_path / "set", "1.2 full", n=9)
        ac.migrate_dataset(made.folder, shard_max_bytes=100)
        found = Published(made.folder)
        assert has_right_digests(found) and not any("logits" in path for path in found.ours["files"])
        right = ac.load_activations(made.folder, as_dict=False)
        assert np.array_equal(right, np.stack(made.expected()))
        for path, at, bit in changes(made.folder, 30, seed=3):
            flipped(path, at, bit)
            with contextlib.suppress(DatasetFormatError):
                assert np.array_equal(ac.load_activations(made.folder, as_dict=False), right)
            flipped(path, at, bit)

    def test_those_of_files_that_stay_are_kept(self, tmp_path):
        made = make(tmp_path / "set", "2.0 full local", n=9)
        paths = sorted(f"tensors/{p.name}" for p in (made.folder / "tensors").iterdir())
        contents = {path: (made.folder / path).read_bytes() for path in paths}
        lists = []
        for path in paths:
            hasher = blocks.hasher()
            hasher.update(memoryview(contents[path]))
            lists.append(blocks.as_bytes(hasher.finish()))
        said = blocks.write(made.folder / BLOCKS, lists)
        table = pq.read_table(made.folder / INDEX)
        own = {"files": {path: [len(data), "0" * 64] for path, data in contents.items()}, "blocks": said}
        own = {f"actcache:{key}": json.dumps(value) for key, value in own.items()}
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **own}), made.folder / INDEX)
        victim = made.folder / next(path for path in paths if "hidden" in path)
        flipped(victim, victim.stat().st_size - 1)
        with pytest.raises(DamagedFileError, match=victim.name):
            ac.migrate_dataset(made.folder)
        assert sorted(f"tensors/{p.name}" for p in (made.folder / "tensors").iterdir()) == sorted([*paths, BLOCKS])
        flipped(victim, victim.stat().st_size - 1)
        ac.migrate_dataset(made.folder)
        found = Published(made.folder)
        assert has_right_digests(found) and any("logits" in path for path in found.ours["files"])
        assert np.array_equal(ac.load_activations(made.folder, as_dict=False), np.stack(made.expected()))


@pytest.mark.parametrize("spoil", ["gone", "cut", "of others"])
def test_a_push_that_lost_the_digests_of_a_file_makes_it_again(tmp_path, monkeypatch, spoil):
    from actcache.share.staging import Staging

    store = new_store(tmp_path)
    fill_pooled(store, new_space(store), N)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "write_blocks", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ac.push_dataset(tmp_path / "set", MODEL, None, store=store, shard_max_bytes=100)
    kept = sorted(tmp_path.glob(".set.pushing/*/blocks/**/*.xxh3"))
    assert len(kept) > 3
    if spoil == "gone":
        kept[1].unlink()
    elif spoil == "cut":
        kept[1].write_bytes(kept[1].read_bytes()[:-1])
    else:
        shutil.copy(kept[2], kept[1])
    ac.push_dataset(tmp_path / "set", MODEL, None, store=store, shard_max_bytes=100)
    assert has_right_digests(Published(tmp_path / "set"))
