"""Lines of the package that `scripts/mutate.py` breaks, one at a time, and the tests that have to notice.

What is broken is what decides whether results are right: which activations count as the same (keys), which prompts
share a pass and where their numbers go (batching), and what of a file is believed (segments, in a file of their own).
"""

from __future__ import annotations

from mutation import Mutation
from mutations_segments import SEGMENTS

_BATCHING = ("tests/test_batching.py",)
_EXTRACTOR = ("tests/test_extractor.py",)
_IDENTITY = ("tests/test_identity.py",)
_OPTIONS = ("tests/test_loading_options.py",)
_SEGMENT = ("tests/test_segment_keys.py", "tests/test_segment.py", "tests/test_segment_damage.py")
_CONTENTS = ("tests/test_contents.py",)

BATCHING = (
    Mutation(
        "shortest prompts first",
        "extract/batching.py",
        "sorted(by_length, reverse=True)",
        "sorted(by_length)",
        _BATCHING,
    ),
    Mutation(
        "equal lengths are joined with others where they must not be",
        "extract/batching.py",
        'full = len(same) if together == "equal" else len(same)',
        "full = len(same)",
        _BATCHING,
    ),
    Mutation(
        "two prompts where each has to be alone",
        "extract/batching.py",
        "        batch_size = 1\n",
        "        batch_size = 2\n",
        _BATCHING,
    ),
    Mutation(
        "a prompt behind each batch is left out",
        "extract/batching.py",
        "start += len(chosen)",
        "start += len(chosen) + 1",
        _BATCHING,
    ),
    Mutation(
        "batches of different lengths pass for even ones",
        "extract/batching.py",
        "lengths[chosen[-1]] != length",
        "False",
        _BATCHING,
    ),
    Mutation(
        "shortest batches first", "extract/batching.py", "key=lambda b: -b.length", "key=lambda b: b.length", _BATCHING
    ),
    Mutation(
        "one prompt more than the token budget takes",
        "extract/batching.py",
        "max(1, max_tokens // max(1, length))",
        "max_tokens // max(1, length) + 1",
        _BATCHING,
    ),
    Mutation(
        "the larger of two limits counts",
        "extract/batching.py",
        "min(room, batch_size)",
        "max(room, batch_size)",
        _BATCHING,
    ),
    Mutation(
        "the first of what is left over is lost", "extract/batching.py", "same[full:]", "same[full + 1 :]", _BATCHING
    ),
    Mutation(
        "one token of padding is taken for a real one",
        "model/forward_inputs.py",
        "np.arange(longest)[None, :] < lengths[:, None]",
        "np.arange(longest)[None, :] <= lengths[:, None]",
        _EXTRACTOR,
    ),
    Mutation(
        "no mask where lengths differ",
        "model/forward_inputs.py",
        "int(lengths.min()) != longest",
        "int(lengths.max()) != longest",
        _EXTRACTOR,
    ),
    Mutation(
        "positions begin with 1",
        "model/forward_inputs.py",
        "torch.arange(longest, device=device)",
        "torch.arange(1, longest + 1, device=device)",
        _EXTRACTOR,
    ),
    Mutation(
        "the last tokens of the padded row are kept, not the prompt's",
        "extract/backends/reducing.py",
        "rows = [h[:n] for h, n in zip(hidden, lengths, strict=True)]",
        "rows = [h[-n:] for h, n in zip(hidden, lengths, strict=True)]",
        _EXTRACTOR,
    ),
    Mutation(
        "padding is pooled, too",
        "extract/backends/local.py",
        "self.lengths = [len(s) for s in sequences]",
        "self.lengths = [max(map(len, sequences)) for _ in sequences]",
        _EXTRACTOR,
    ),
    Mutation(
        "rows go to the prompts in the order of the batches",
        "extract/extractor.py",
        "for i, part in zip(batch.indices, self._split(tensor, counts), strict=True):",
        "for i, part in zip(sorted(batch.indices), self._split(tensor, counts), strict=True):",
        _EXTRACTOR,
    ),
)

KEYS = (
    Mutation(
        "token ids before a prompt's are part of its key",
        "store/prompts.py",
        'digest(b"t" + data[a:b])',
        'digest(b"t" + data[:b])',
        _SEGMENT,
    ),
    Mutation(
        "text and chat of the same characters have one key",
        "store/prompts.py",
        "tuple(salt + bytes([kind]) for kind in (IDS, TEXT, CHAT))",
        "tuple(salt for kind in (IDS, TEXT, CHAT))",
        _SEGMENT,
    ),
    Mutation(
        "the tokenizer is no part of a text's key",
        "store/prompts.py",
        'context.encode("utf-8", "surrogatepass")',
        'b""',
        _SEGMENT,
    ),
    Mutation(
        "texts whose ids are not known are one prompt when their stand-ins agree",
        "store/prompts.py",
        "ids + bytes([kind]) + text",
        "ids + bytes([kind])",
        _SEGMENT,
    ),
    Mutation(
        "a selection takes the row behind",
        "store/prompts.py",
        "np.repeat(starts[a:b] - ends[a:b], lengths[a:b])",
        "np.repeat(starts[a:b] - ends[a:b] + 1, lengths[a:b])",
        _SEGMENT,
    ),
    Mutation(
        "joined tables keep the offsets of their parts",
        "store/prompts.py",
        "offsets(np.concatenate([np.diff(p) for p in parts]))",
        "offsets(np.concatenate([np.diff(p) for p in parts[::-1]]))",
        _SEGMENT,
    ),
    Mutation(
        "the order of a config's keys counts",
        "model/identity.py",
        "text = json.dumps(value, sort_keys=True,",
        "text = json.dumps(value, sort_keys=False,",
        _IDENTITY,
    ),
    Mutation(
        "lists in a config do not count",
        "model/identity.py",
        "return [strip(v) for v in value]",
        "return []",
        _IDENTITY,
    ),
    Mutation(
        "weights changed behind old time stamps pass for the old ones",
        "model/identity.py",
        r"{before.st_mtime_ns}\0{before.st_ctime_ns}",
        r"{before.st_mtime_ns}",
        _IDENTITY,
    ),
    Mutation(
        "the digest of a file that may still change is remembered",
        "model/identity.py",
        "time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _RACY_NS",
        "True",
        _IDENTITY,
    ),
    Mutation(
        "shards that the index names do not count",
        "model/identity.py",
        "found.update(folder / shard for shard in set(shards))",
        "found.update(())",
        _IDENTITY,
    ),
    Mutation(
        "every compute dtype is one model", "model/loading.py", '"dtype": self.dtype,', '"dtype": "float32",', _OPTIONS
    ),
    Mutation(
        "attention implementations are one model",
        "model/loading.py",
        'self._attn_implementation(digests.get("code")), probabilities=self.needs_probabilities',
        '"eager", probabilities=False',
        _OPTIONS,
    ),
    Mutation(
        "arguments of loading do not count",
        "model/loading.py",
        '"model_kwargs": self._extra or None,',
        '"model_kwargs": None,',
        _OPTIONS,
    ),
    Mutation(
        "a model that is edited is the model as it is",
        "model/loading.py",
        '"edits": list(self.edits),',
        '"edits": [],',
        ("tests/test_edits_stored.py::test_what_is_stored_is_kept_apart",),
    ),
    Mutation(
        "an adapter's weights do not count",
        "model/files.py",
        'found["adapter"] = {"weights": weights, "config"',
        'found["adapter"] = {"config"',
        ("tests/test_adapters.py::TestByPath::test_whatever_changes_in_its_files_is_noticed",),
    ),
    Mutation(
        "revisions of a model are one model",
        "model/files.py",
        'f"commit:{base.commit}" if base.commit else',
        '"commit:" if base.commit else',
        ("tests/test_loading.py::test_another_commit_of_a_hub_id_is_another_model",),
    ),
    Mutation(
        "special tokens are no part of a text's context",
        "extract/prompts.py",
        '"add_special_tokens": add_special_tokens}',
        '"add_special_tokens": True}',
        ("tests/test_unified_found.py::TestMisses::test_special_tokens",),
    ),
    Mutation(
        "tokenizers are one tokenizer",
        "extract/prompts.py",
        '{"tokenizer": source.tokenizer_source().digest(), ',
        "{",
        ("tests/test_staleness.py::TestFiles::test_a_tokenizer_replaced_under_its_path",),
    ),
    Mutation(
        "equal keys are enough: ids and texts are not compared",
        "store/contents.py",
        "return _mask([chars[a:b] == asked[i] for i, a, b in where])",
        "return None",
        _CONTENTS,
    ),
    Mutation(
        "equal keys are enough: kinds are not compared",
        "store/queries.py",
        "if isinstance(kinds, int) and kinds == segment.kind_of_all:",
        "if True:",
        _CONTENTS,
    ),
)

MUTATIONS = {"batching": BATCHING, "keys": KEYS, "segments": SEGMENTS}
