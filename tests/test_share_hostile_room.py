"""How much memory a little file may make a reader of datasets take, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from made_datasets import INDEX, make, pa, pq

# What a little file may make a reader take, measured in a process of its own.

_MEASURE = """
import resource, sys
import numpy, pyarrow.parquet
import actcache as ac
from actcache.store import tensors
from actcache.errors import DatasetFormatError
ac.load_activations; ac.fetch_dataset_metadata
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
    print("read", end=" ")
except DatasetFormatError as error:
    print("refused", end=" ")
    print(error, file=sys.stderr)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def measured(folder, call="ac.load_activations(folder, pooling='max')"):
    """What became of a call, the megabytes it took at its peak, and its error."""
    code = f"folder = {str(folder)!r}\n" + _MEASURE.format(call=call)
    # Where it takes all it can get, the test fails and not the machine.
    limit = 12 << 30
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    what, grown = ran.stdout.split()
    return what, int(grown), ran.stderr


def test_a_gigabyte_of_json(tmp_path):
    made = make(tmp_path / "set", "1.1 pooled")
    with (made.folder / "lmprobe_info.json").open("r+b") as file:
        file.truncate(1 << 30)
    what, grown, error = measured(made.folder)
    assert what == "refused" and grown < 40 and "1,073,741,824 bytes" in error


def test_metadata_of_megabytes_in_the_schema(tmp_path):
    made = make(tmp_path / "set")
    made.metadata["padding"] = "x" * (17 << 20)
    made.write()
    what, grown, error = measured(made.folder)
    assert what == "refused" and "of its metadata has" in error and grown < 300


def bomb(tmp_path, columns, *, n=None, **options):
    """A dataset whose index has `columns` in place of its own, in a small file."""
    made = make(tmp_path / "set", "2.0 split", k=0)
    table = pa.table(columns if n is not None else {**made.columns, **columns})
    if n is not None:
        made.metadata["num_prompts"] = n
        made.hidden["shards"] = [{"num_prompts": n, "num_tokens": n}]
        made.hidden["last_token_shards"] = 1
    said = {f"lmprobe:{key}": json.dumps(value) for key, value in made.metadata.items()}
    pq.write_table(table.replace_schema_metadata(said), made.folder / INDEX, **options)
    size = (made.folder / INDEX).stat().st_size
    return made.folder, size


@pytest.mark.parametrize("call", ["ac.load_activations(folder)", "ac.fetch_dataset_metadata(folder)"])
def test_a_parquet_file_of_many_rows_in_few_bytes(tmp_path, call):
    n = 8_000_000
    zeros = pa.array(np.zeros(n, np.int8)).cast(pa.int8())
    columns = {
        "text": pa.DictionaryArray.from_arrays(zeros, ["a"]), "shard_index": zeros, "row_offset": zeros,
    }  # fmt: skip
    folder, size = bomb(tmp_path, columns, n=n, compression="zstd")
    assert size < 400_000
    what, grown, error = measured(folder, call)
    assert what == "refused" and "cannot hold" in error and grown < 40


def test_a_parquet_file_that_unpacks_to_much(tmp_path):
    texts = ["x" * 40_000_000, *map(str, range(10))]
    folder, size = bomb(tmp_path, {"text": texts}, compression="zstd", use_dictionary=False)
    assert size < 1_000_000
    what, grown, error = measured(folder, "ac.fetch_dataset_metadata(folder)")
    assert what == "refused" and "would unpack" in error and grown < 40


def test_a_long_text_that_recurs_is_in_memory_once(tmp_path):
    n = 20_000
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["x" * 1_000_000])
    random = np.random.default_rng(0).integers(0, n, n)
    columns = {"text": texts, "label": texts, "shard_index": np.zeros(n, np.int32), "row_offset": random}
    folder, size = bomb(tmp_path, columns, n=n, compression="none")
    assert size < 5_000_000, "and 20 GB where every row has its text"
    what, grown, _ = measured(folder, "ac.fetch_dataset_metadata(folder)")
    assert what == "read" and grown < 150


def test_a_list_of_many_numbers_in_few_bytes(tmp_path):
    long = [[0] * 5_000_000, *[[0]] * 10]
    lists = pa.array(long, pa.list_(pa.int64()))
    folder, size = bomb(tmp_path, {"token_shard_ids": lists, "token_shard_offsets": lists}, compression="zstd")
    assert size < 200_000
    what, grown, error = measured(folder)
    assert what == "refused" and "cannot hold" in error and grown < 40


def test_many_prompts_that_share_one_row(tmp_path):
    """Far more rows than the shards hold would be a result without limit."""
    made = make(tmp_path / "set", n=2, dim=100_000, layers=(0,), k=0, per_shard=1)
    n = 200_000
    columns = {
        "text": [str(i) for i in range(n)],
        "shard_index": np.zeros(n, np.int32),
        "row_offset": np.zeros(n, np.int32),
    }
    made.columns = columns
    made.metadata["num_prompts"] = n
    made.hidden["shards"] = [{"num_prompts": n}]
    made.write()
    what, grown, error = measured(made.folder, "ac.load_activations(folder)")
    assert what == "refused" and "the dataset says 200,000" in error and grown < 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """Beside the result: of means over sequences it is small, whatever their length and number."""
    grown = []
    for n in (100, 1000):
        made = make(
            tmp_path / str(n),
            "2.0 split",
            n=n,
            layers=(0, 1),
            dim=256,
            longest=200,
            per_shard=n,
            tokens_per_shard=10**9,
            k=0,
        )
        size = sum(file.stat().st_size for file in (made.folder / "tensors").iterdir())
        grown.append(measured(made.folder, "ac.load_activations(folder, pooling='mean')")[1])
    assert size > 175 << 20
    assert grown[1] < 120 and grown[1] < grown[0] + 50, grown


def _varint(value: int, length: int) -> bytes:
    """A number as Thrift writes it (zigzag, 7 bits a byte), in exactly so many bytes."""
    value <<= 1
    return bytes((value >> (7 * i) & 0x7F) | (0x80 if i < length - 1 else 0) for i in range(length))


def test_a_page_that_says_more_than_its_footer(tmp_path):
    """A reader of lists believes its pages: this one is of a million values and says 130 million."""
    count = 2**20
    long = [[0] * (count - 10), *[[0]] * 10]
    lists = pa.array(long, pa.list_(pa.int64()))
    noise = np.random.default_rng(0).bytes(200_000).hex()
    columns = {"text": [noise, *map(str, range(10))], "token_shard_ids": lists, "token_shard_offsets": lists}
    folder, _ = bomb(tmp_path, columns, compression="none", data_page_size=1 << 30, write_statistics=False)
    what, grown, error = measured(folder)
    assert what == "refused" and "have 1,048,576 tokens" in error and grown < 300
    data = (folder / INDEX).read_bytes()
    honest, forged = _varint(count, 4), _varint(2**27 - 1, 4)
    # In the header of a page: field 5, a struct, whose field 1 is the number.
    marks = [at for at in range(len(data)) if data[at : at + 6] == b"\x2c\x15" + honest]
    assert len(marks) == 2
    for at in marks:
        data = data[: at + 2] + forged + data[at + 6 :]
    (folder / INDEX).write_bytes(data)
    what, grown, error = measured(folder)
    assert what == "refused" and "pages that say other than its footer" in error and grown < 40
