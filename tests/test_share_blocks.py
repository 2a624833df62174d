"""Bytes of a dataset that are not what was pushed: whoever reads them gets right numbers or an error, never others."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil

import numpy as np
import pytest

import actcache as ac
from actcache.errors import ActCacheError, DatasetFormatError

pytest.importorskip("pyarrow")

import pyarrow.parquet as pq

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
    has_right_digests,
    new_space,
    new_store,
    rows,
    text,
)

N = range(12)
TEXTS = [text(i) for i in N]
SITES = ("resid_post.0", "resid_post.1", "attn_out.1")
# Of blocks of 64 KiB each: rows of 8 KiB, six blocks in a file.
MANY, WIDE = range(45), 2048


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


@pytest.fixture(scope="module")
def wide_set(tmp_path_factory):
    """A dataset whose files have several blocks, in one shard."""
    home = tmp_path_factory.mktemp("wide")
    store = new_store(home)
    fill_pooled(store, new_space(store), MANY, dim=WIDE)
    ac.push_dataset(home / "set", MODEL, None, store=store, shuffle=False)
    return home / "set"


@pytest.fixture
def wide(wide_set, tmp_path):
    shutil.copytree(wide_set, tmp_path / "set")
    return tmp_path / "set"


def flipped(path, at, bit=0):
    """Change one bit of a file, whose time stays."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


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


def place(folder, number, layer):
    """The file, and byte in it, of the first number of a prompt."""
    found = Published(folder)
    where = found.by_text[text(number)]
    path = folder / found.tensors["hidden_layers"]["file_pattern"].format(layer=layer, shard=where["shard_index"])
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path, header + where["row_offset"] * WIDE * 4


def test_the_rows_that_are_damaged_are_named_and_all_others_are_read(wide):
    path, at = place(wide, 20, 1)
    flipped(path, at)
    with pytest.raises(
        DamagedFileError, match=rf"{path.name} of .* is damaged.*rows 1\d to 2\d of hidden.layer_1"
    ) as e:
        ac.load_activations(wide, prompts=[text(20)], layers=[1])
    first, last = (int(word) for word in str(e.value).split("rows ")[1].split(" of ")[0].split(" to "))
    assert first <= 20 <= last and last - first <= 8 and e.value.span[0] <= at < e.value.span[1]
    others = [i for i in MANY if not first <= i <= last]
    found = ac.load_activations(wide, prompts=[text(i) for i in others], layers=[1])[1]
    assert np.array_equal(found, np.stack([rows(i, "resid_post.1", dim=WIDE)[-1] for i in others]))
    for options in ({}, {"layers": [1]}, {"prompts": [text(20), text(3)]}):
        with pytest.raises(DamagedFileError, match="is damaged"):
            ac.load_activations(wide, **options)
    ac.load_activations(wide, layers=[0])


def test_nothing_of_a_damaged_block_is_stored_when_it_is_pulled(wide, tmp_path):
    path, at = place(wide, 20, 1)
    with new_store(tmp_path) as store:
        ac.pull_dataset(wide, store=store)
        (space,) = store.spaces()
        store.read(space, [text(3)], "resid_post.1", pooling="last_token")
        flipped(path, at)
        for asked in ([text(20)], [text(19), text(20)], [text(i) for i in MANY]):
            with pytest.raises(DamagedFileError, match=path.name):
                store.read(space, asked, "resid_post.1", pooling="last_token")
        # What was read before is right, and is no longer asked for.
        assert store.prompts(space, site="resid_post.1", layout="last_token").texts == [text(3)]
        assert store.verify(space).ok
        flipped(path, at)
        found = store.read(space, [text(20), text(3)], "resid_post.1", pooling="last_token")
        assert np.array_equal(found, np.stack([rows(i, "resid_post.1", dim=WIDE)[-1] for i in (20, 3)]))


class Counted(Folder):
    """A folder that tells which ranges of which files are read."""

    def __init__(self, folder, seen):
        super().__init__(folder)
        self.seen = seen

    def open(self, path, start=0, stop=None):
        stream = super().open(path, start, stop)
        self.seen.append((path, start, min(stream.size if stop is None else stop, stream.size)))
        return stream


def test_whole_blocks_are_read_and_no_more(wide, monkeypatch):
    seen = []
    monkeypatch.setattr("actcache.share.load.open_source", lambda *args, **options: Counted(wide, seen))
    layer = len(MANY) * WIDE * 4
    ac.load_activations(wide, layers=[1])
    index = (wide / INDEX).stat().st_size + (wide / BLOCKS).stat().st_size
    assert sum(stop - start for _, start, stop in seen) <= 1.1 * layer + index
    seen.clear()
    ac.load_activations(wide, layers=[1], prompts=[text(20)])
    ranges = {(path, start, stop) for path, start, stop in seen if path not in (INDEX, BLOCKS)}
    # The header, and the row with the blocks around it.
    assert len(ranges) == 2 and sum(stop - start for _, start, stop in ranges) <= 3 * 65536
    assert [path for path, _, _ in seen].count(BLOCKS) == 1
    seen.clear()
    ac.fetch_dataset_metadata(wide)
    assert BLOCKS not in {path for path, _, _ in seen}


@pytest.mark.parametrize("prompts", [None, [text(20)]])
def test_damaged_digests_are_not_taken_for_rows(wide, monkeypatch, prompts):
    of = blocks.Blocks.of

    def damaged_later(self, path, first, many):
        if first or many > 1:
            raise blocks.damaged(BLOCKS, "the dataset", (0, 65536))
        return of(self, path, first, many)

    monkeypatch.setattr(blocks.Blocks, "of", damaged_later)
    with pytest.raises(DamagedFileError, match=BLOCKS) as caught:
        ac.load_activations(wide, layers=[1], prompts=prompts)
    assert caught.value.path == BLOCKS and "rows" not in str(caught.value)


def test_of_many_digests_only_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_FEW", 1 << 10)
    monkeypatch.setattr(blocks, "_KEPT", 2)
    (tmp_path / "tensors").mkdir()
    # Sparse files of a gigabyte each, of which nothing is read here.
    drawn = np.random.default_rng(0).integers(0, 2**63, (3, 1 << 14), dtype=np.uint64)
    said = blocks.write(tmp_path / BLOCKS, [digests.tobytes() for digests in drawn])
    sizes = {f"tensors/{name}.safetensors": 1 << 30 for name in "cab"}
    assert (tmp_path / BLOCKS).stat().st_size == blocks.size(sizes.values())
    seen = []
    found = blocks.Blocks(Counted(tmp_path, seen), said, sizes)
    for file, first, many in [("b", 0, 3), ("a", 8190, 4), ("c", (1 << 14) - 1, 1), ("a", 0, 1 << 14), ("b", 1, 2)]:
        wanted = drawn["abc".index(file)][first : first + many]
        assert found.of(f"tensors/{file}.safetensors", first, many) == wanted.tolist()
    assert max(stop - start for _, start, stop in seen) == 1 << 16
    # A damaged block of digests is found where it is read, and nowhere else.
    flipped(tmp_path / BLOCKS, 3 << 16)
    found = blocks.Blocks(Folder(tmp_path), said, sizes)
    assert found.of("tensors/a.safetensors", 5, 1) == drawn[0][5:6].tolist()
    with pytest.raises(DamagedFileError, match=f"{BLOCKS} of .* is damaged"):
        found.of("tensors/b.safetensors", 1 << 13, 1)


def says(folder, **keys):
    """Let the index say other things under our keys; None: nothing."""
    table = pq.read_table(folder / INDEX)
    metadata = dict(table.schema.metadata)
    for key, value in keys.items():
        metadata.pop(f"actcache:{key}".encode())
        if value is not None:
            metadata[f"actcache:{key}".encode()] = json.dumps(value).encode()
    pq.write_table(table.replace_schema_metadata(metadata), folder / INDEX)


def without_one(folder):
    files = Published(folder).ours["files"]
    files.pop(sorted(files)[0])
    says(folder, files=files)


def larger(folder):
    files = Published(folder).ours["files"]
    path = sorted(files)[0]
    says(folder, files={**files, path: [1 << 61, files[path][1]]})


def of_size(size):
    def change(folder):
        files = Published(folder).ours["files"]
        says(folder, files={path: [size, digest] for path, (_, digest) in files.items()})

    return change


def saying(**told):
    return lambda folder: says(folder, blocks={**Published(folder).ours["blocks"], **told})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / BLOCKS).unlink(), f"has no {BLOCKS}.*Download that file"),
        (lambda folder: (folder / BLOCKS).write_bytes(b""), f"{BLOCKS} of .* has 0 bytes, and .* it would have"),
        (lambda folder: os.truncate(folder / BLOCKS, 1 << 40), f"{BLOCKS} of .* has 1,099,511,627,776 bytes"),
        (lambda folder: (folder / BLOCKS).write_bytes((folder / BLOCKS).read_bytes()[:-8]), f"{BLOCKS}.* bytes"),
        (lambda folder: flipped(folder / BLOCKS, 0), f"{BLOCKS} of .* is damaged"),
        (lambda folder: flipped(folder / BLOCKS, (folder / BLOCKS).stat().st_size - 1), f"{BLOCKS} of .* is damaged"),
        (lambda folder: says(folder, blocks=[]), "blocks of None bytes"),
        (lambda folder: says(folder, blocks="x"), "blocks of None bytes"),
        (lambda folder: says(folder, files=None), f"does not say how large .* {BLOCKS}"),
        (lambda folder: says(folder, files=[1]), f"does not say how large .* {BLOCKS}"),
        (saying(block=0), "blocks of 0 bytes: expected 65,536"),
        (saying(block=-1), "blocks of -1 bytes"),
        (saying(block=2**60), "blocks of 1152921504606846976 bytes"),
        (saying(block=True), "blocks of True bytes"),
        (saying(block=65536.0), "blocks of 65536.0 bytes"),
        (saying(digest="0" * 32), f"{BLOCKS} of .* is damaged"),
        (saying(digest="../x"), "as the digest of"),
        (saying(digest=None), "gives None as the digest of"),
        (without_one, f"{BLOCKS} of .* bytes, and"),
        (larger, "more than are read"),
        (of_size(0), "does not say how large"),
        (of_size(-5), "does not say how large"),
        (of_size(1 << 70), "does not say how large"),
        (of_size("x"), "does not say how large"),
        (of_size(1 << 45), "has 368,760 bytes, and the dataset says 35,184,372,088,832"),
    ],
)
def test_digests_that_cannot_be_are_refused_by_name(wide, tmp_path, change, message):
    change(wide)
    for read in (
        lambda: ac.load_activations(wide, layers=[1], prompts=[text(2)]),
        lambda: ac.load_activation_dataset(wide),
    ):
        with pytest.raises(DatasetFormatError, match=message) as error:
            read()
        assert str(wide) in str(error.value)


def test_a_dataset_without_them_is_read_as_before(wide):
    (wide / BLOCKS).unlink()
    says(wide, blocks=None)
    found = ac.load_activations(wide, prompts=[text(2)], layers=[1])[1]
    assert np.array_equal(found, rows(2, "resid_post.1", dim=WIDE)[-1:])
    flipped(*place(wide, 20, 1))
    with pytest.raises(DamagedFileError, match="the SHA-256"):
        ac.load_activations(wide, layers=[1])


class TestIndex:
    def test_others_read_it_and_one_that_they_write_is_read(self, small, tmp_path, caplog):
        table = pq.read_table(small / INDEX)
        assert table.num_rows == len(N) and pq.ParquetFile(small / INDEX).metadata.num_rows == len(N)
        shutil.copytree(small, tmp_path / "set")
        assert read_all(tmp_path / "set") and not caplog.records
        pq.write_table(table.append_column("more", [[1] * len(N)]), tmp_path / "set" / INDEX)
        assert read_all(tmp_path / "set") and "was written anew" in caplog.text

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
