"""Lines of the package that `scripts/mutate.py` breaks: what of a file is believed, and where a row of it goes."""

from __future__ import annotations

from mutation import Mutation

_SEGMENT = ("tests/test_segment_keys.py", "tests/test_segment.py", "tests/test_segment_damage.py")
_READING = ("tests/test_store_reading.py",)
_GATHER = ("tests/test_gather.py",)
_REMOVAL = ("tests/test_store_removal.py",)
_QUANTIZE = ("tests/test_quantize.py",)

SEGMENTS = (
    Mutation("blocks are not checked", "store/checks.py", "_GOOD if right else _DAMAGED", "_GOOD", _SEGMENT),
    Mutation(
        "a block that is good stands for others",
        "store/block_groups.py",
        "nonzero()[0]) == len(rows)",
        "nonzero()[0]) > 0",
        ("tests/test_block_groups.py",),
    ),
    Mutation(
        "damage spoils no row",
        "store/checks.py",
        "before[high] == before[low]",
        "before[low] == before[low]",
        _SEGMENT,
    ),
    Mutation(
        "rows count as checked when one of them was",
        "store/block_groups.py",
        "(before[low] == before[high]).all()",
        "(before[low] == before[high]).any()",
        ("tests/test_block_groups.py",),
    ),
    Mutation(
        "a row's last block is not checked",
        "store/checks.py",
        "high = np.maximum(-(-(rows[1] * width) // BLOCK), low)",
        "high = np.maximum(rows[1] * width // BLOCK, low)",
        _SEGMENT,
    ),
    Mutation(
        "no checksum is written",
        "store/writing.py",
        'index["checksum"][:] = digests',
        "pass",
        _SEGMENT,
    ),
    Mutation(
        "blocks are a piece longer than they should be",
        "store/writing.py",
        "part = data[at : at + self._block - self._filled]",
        "part = data[at : at + self._block]",
        _SEGMENT,
    ),
    Mutation(
        "a damaged header is believed",
        "store/mapping.py",
        "if int(stored[0]) != xxhash.xxh3_64_intdigest(head):",
        "if False:",
        _SEGMENT,
    ),
    Mutation(
        "a damaged index is believed",
        "store/mapping.py",
        "if int(stored[1]) != xxhash.xxh3_64_intdigest(self._raw[digest.stop : start]):",
        "if False:",
        _SEGMENT,
    ),
    Mutation(
        "offsets that fall are believed",
        "store/mapping.py",
        "falls = (offset[1:] < offset[:-1]).any()",
        "falls = False",
        _SEGMENT,
    ),
    Mutation(
        "a matrix with rows that nobody has is believed",
        "store/mapping.py",
        "if tensor.shape[0] != rows:",
        "if tensor.shape[0] < rows:",
        _SEGMENT,
    ),
    Mutation(
        "keys are not held against their prompts",
        "store/segment.py",
        "    yield from problems_of_keys(segment)\n",
        "",
        _SEGMENT,
    ),
    Mutation(
        "moments are not held against their rows",
        "store/segment.py",
        "    if wrong.any():\n",
        "    if False:\n",
        _SEGMENT,
    ),
    Mutation(
        "the last row of a damaged block passes for a good one",
        "store/segment.py",
        "(np.minimum((mine + 1) * BLOCK, tensor.nbytes) - 1) // width + 1",
        "(np.minimum((mine + 1) * BLOCK, tensor.nbytes) - 1) // width",
        ("tests/test_verification.py",),
    ),
    Mutation(
        "the row behind the last is read",
        "store/gather.py",
        "if low < 0 or high >= length:",
        "if low < 0 or high > length:",
        _GATHER,
    ),
    Mutation(
        "neighbours are copied although they go to other places",
        "store/gather.py",
        "(np.diff(rows) != 1) | (np.diff(at) != 1)) + 1\n    if len(rows) * out",
        "np.diff(rows) != 1) + 1\n    if len(rows) * out",
        _GATHER,
    ),
    Mutation(
        "results come in the order of the segment",
        "store/placement.py",
        "members if at is None else at[members])",
        "np.sort(members) if at is None else np.arange(len(members)))",
        _READING,
    ),
    Mutation(
        "the scale of the next block",
        "store/quantize.py",
        'block = np.searchsorted(offsets, rows, "right") - 1',
        'block = np.minimum(np.searchsorted(offsets, rows, "right"), len(scales) - 1)',
        _QUANTIZE,
    ),
    Mutation(
        "tombs are ignored",
        "store/graves.py",
        "found |= True if keys is None else is_member(info.prompt_key, keys)",
        "found |= False",
        _REMOVAL,
    ),
    Mutation(
        "a tomb that cannot be read names nobody",
        "store/graves.py",
        "found |= True if keys is None else",
        "found |= False if keys is None else",
        _REMOVAL,
    ),
    Mutation(
        "tombs of segments that were merged are forgotten",
        "store/graves.py",
        "if t not in applied",
        "if False",
        _REMOVAL,
    ),
    Mutation(
        "a tomb names one prompt fewer",
        "store/tombs.py",
        "table.add(0, among)",
        "table.add(0, among[:-1])",
        _REMOVAL,
    ),
    Mutation(
        "a damaged tomb is believed",
        "store/tombs.py",
        "if stored != [",
        "if [] == [",
        _REMOVAL,
    ),
)
