"""The columns of a dataset that is pushed: labels, metadata and texts, and what no column holds."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import actcache as ac
from actcache.errors import OptionError, PromptError, PromptTypeError
from actcache.share.columns import label_column, metadata_columns
from actcache.store import given as said
from actcache.store.records import LABEL, METADATA
from share_helpers import INDEX, MODEL, TEXTS, N, fill_perplexity, push, table, text


class TestColumns:
    @pytest.mark.parametrize(
        ("labels", "type_", "values"),
        [
            ([1, None, 3], "int32", [1, None, 3]),
            ([1, 2**40, None], "int64", [1, 2**40, None]),
            (["a", None, "b"], "string", ["a", None, "b"]),
            ([None, None, None], "int32", [None, None, None]),
            ([True, False, None], "int32", [1, 0, None]),
            (np.array([3, 4, 5]), "int32", [3, 4, 5]),
        ],
    )
    def test_labels(self, pooled, tmp_path, labels, type_, values):
        found = push(pooled, tmp_path / "set", TEXTS[:3], labels=labels)
        assert str(found.table.schema.field("label").type) == type_
        assert [found.by_text[t]["label"] for t in TEXTS[:3]] == values

    @pytest.mark.parametrize("labels", [[1.5, 1, 2], [1, 2], [[1], 1, 1], "abc", [2**70, 1, 1], {"a": 1}, {1, 2, 3}, 5])
    def test_labels_that_cannot_be(self, labels):
        with pytest.raises(OptionError, match="labels"):
            label_column(labels, 3)

    def test_labels_of_both_types_are_named(self, pooled, tmp_path):
        with pytest.raises(OptionError, match=r"labels\[2\] is 7, an int, and labels\[1\] is 'a', a str"):
            push(pooled, tmp_path / "set", TEXTS[:3], labels=[None, "a", 7])
        with pytest.raises(OptionError, match=r"labels\[0\] is 1, an int, and labels\[1\] is 'a', a str"):
            label_column([True, "a"], 2)
        assert not (tmp_path / "set").exists()

    def test_prompts_without_an_order_are_refused(self, pooled, tmp_path):
        with pytest.raises(PromptTypeError, match="prompts is a set"):
            push(pooled, tmp_path / "set", set(TEXTS[:3]), labels=[1, 2, 3])
        assert not (tmp_path / "set").exists()

    def test_metadata_keeps_its_types(self, pooled, tmp_path):
        given = [
            {"f": 1.0, "g": None, "i": 2**40, "b": True, "s": "x", "l": [1, 2], "m": [1.0, None], "n": None, "mix": 1},
            {"f": 2.0, "g": 0.1, "i": None, "b": False, "s": "é", "l": [], "m": None, "n": None, "mix": 2.5},
        ]
        found = push(pooled, tmp_path / "set", TEXTS[:2], metadata=given)
        types = {name: str(found.table.schema.field(name).type).replace("element: ", "") for name in given[0]}
        assert types == {
            "f": "double", "g": "double", "i": "int64", "b": "bool", "s": "string", "l": "list<int64>",
            "m": "list<double>", "n": "string", "mix": "double",
        }  # fmt: skip
        for i in range(2):
            assert {name: found.by_text[text(i)][name] for name in given[i]} == given[i]
        assert isinstance(found.by_text[text(0)]["f"], float)

    def test_metadata_as_columns(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", TEXTS[:2], metadata={"f": np.array([1.5, 2.0]), "s": ["a", "b"]})
        assert [(found.by_text[t]["f"], found.by_text[t]["s"]) for t in TEXTS[:2]] == [(1.5, "a"), (2.0, "b")]

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ([{"text": "x"}] * 2, "a column 'text' of its own"),
            ([{"shard_index_logits": 1}] * 2, "of its own"),
            ([{"a": 1}, {"b": 1}], r"metadata\[1\] has other keys"),
            ([{"a": 1}, {"a": "x"}], r"several types \(int, str\)"),
            ([{"a": True}, {"a": 1}], "several types"),
            ([{"a": [1]}, {"a": 1}], "lists for some"),
            ([{"a": float("nan")}] * 2, "finite"),
            ([{"a": {"b": 1}}] * 2, "expected a string"),
            ([{"a": 2**64}] * 2, "64 bits"),
            ([{"a": 2**53 + 1}, {"a": 0.5}], r"metadata\['a'\] has .*9007199254740993, which becomes another"),
            ([{"a": [0.5, 10**400]}] * 2, "becomes another"),
            ([{"a": "\ud800"}] * 2, "Unicode"),
            ([{"": 1}] * 2, "name of a column"),
            ([{"a": 1}], "1 values for 2 prompts"),
            ({"a": [1]}, "1 values for 2 prompts"),
            ([1, 2], "expected a dict"),
        ],
    )
    def test_metadata_that_cannot_be(self, metadata, message):
        with pytest.raises(OptionError, match=message):
            metadata_columns(metadata, 2)

    def test_stored_labels_that_no_dataset_holds(self, pooled, space, tmp_path):
        for records in said.records(LABEL, table(N), [said.encoded(i / 2) for i in N]):
            pooled.append(space, records)
        with pytest.raises(OptionError, match=r"labels that are stored.*pass labels="):
            push(pooled, tmp_path / "set")
        assert push(pooled, tmp_path / "set", labels=list(N)).by_text[text(3)]["label"] == 3

    def test_stored_metadata_that_no_dataset_holds(self, pooled, space, tmp_path):
        values = [said.encoded({"topic": i if i % 2 else str(i)}) for i in N]
        for records in said.records(METADATA, table(N), values):
            pooled.append(space, records)
        with pytest.raises(OptionError, match=r"metadata that is stored.*several types.*pass metadata="):
            push(pooled, tmp_path / "set")
        assert push(pooled, tmp_path / "set", metadata={}).by_text[text(3)]["label"] is None

    def test_a_text_that_no_index_can_hold(self, store, space, tmp_path):
        store.write(space, ["fine", "half of a pair \ud83d"], {"resid_post.0": [torch.ones(8)] * 2}, pooling="mean")
        with pytest.raises(PromptError, match="no valid Unicode"):
            ac.push_dataset(tmp_path / "set", MODEL, None, store=store)
        assert not (tmp_path / "set").exists()

    def test_many_row_groups(self, pooled, space, tmp_path, monkeypatch):
        monkeypatch.setattr("actcache.share.index_file._ROWS", 3)
        fill_perplexity(pooled, space, N[:9])
        found = push(pooled, tmp_path / "set", labels=list(N))
        assert pq.ParquetFile(found.folder / INDEX).num_row_groups == 7
        assert [found.by_text[text(i)]["label"] for i in N] == list(N)

    def test_what_is_stored_with_prompts_goes_along(self, pooled, space, tmp_path):
        for kind, values in ((LABEL, list(N)), (METADATA, [{"score": i / 2} for i in N])):
            for records in said.records(kind, table(N), [said.encoded(v) for v in values]):
                pooled.append(space, records)
        found = push(pooled, tmp_path / "set")
        assert all(found.by_text[text(i)]["label"] == i and found.by_text[text(i)]["score"] == i / 2 for i in N)
        # What the caller says counts instead.
        again = push(pooled, tmp_path / "b", labels=["x"] * 20)
        assert {row["label"] for row in again.index} == {"x"}

    def test_people_see_first_what_people_read(self, pooled, space, tmp_path):
        fill_perplexity(pooled, space, N)
        found = push(pooled, tmp_path / "set", metadata=[{"topic": "x"}] * 20)
        names = found.table.schema.names
        assert names[:7] == [
            "text",
            "label",
            "num_tokens",
            "perplexity_mean",
            "perplexity_min",
            "perplexity_max",
            "topic",
        ]
