"""A damaged block of a dataset: its rows are named, all others read, and the digests themselves are not believed."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError
from actcache.share import blocks
from actcache.share.blocks import DamagedFileError
from actcache.share.folder import Folder
from share_helpers import BLOCKS, INDEX, MODEL, Published, fill_pooled, flipped, new_space, new_store, rows, text

# Of blocks of 64 KiB each: rows of 8 KiB, six blocks in a file.
MANY, WIDE = range(45), 2048


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
