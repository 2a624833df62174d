"""The card of a dataset that is pushed: what it says, and that what it says to do works."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from share_helpers import N, fill_logits, fill_pooled, fill_tokens, new_space, push, rows, text


class TestCard:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("form", ["pooled", "tokens", "site", "logits"])
    def test_what_it_says_to_load_with_loads(self, store, space, tmp_path, form, dtype, monkeypatch):
        fill = {"pooled": fill_pooled, "tokens": fill_tokens}
        if form == "logits":
            fill_logits(store, space, N)
        elif form == "site":
            fill_pooled(store, space, N, ("final_norm",), dtype=dtype)
        else:
            fill[form](store, space, N, dtype=dtype)
        found = push(store, tmp_path / "set", shard_max_bytes=100)
        _, snippet = re.findall(r"```python\n(.*?)```", (found.folder / "README.md").read_text(), re.DOTALL)
        imported = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
        assert imported == ["json", "pyarrow", "safetensors"]
        monkeypatch.chdir(found.folder)
        names: dict = {}
        exec(snippet, names)
        i = next(i for i in N if text(i) == found.index[0]["text"])
        site = {"site": "final_norm", "logits": "logits"}.get(form, "resid_post.1")
        wanted = torch.from_numpy(rows(i, site, dim=3 if form == "logits" else 8)).to(getattr(torch, dtype))
        if form == "logits":
            wanted = torch.from_numpy(rows(i, site, dim=3)).sort(descending=True).values
        assert torch.equal(torch.as_tensor(names["vector"]), wanted[-1])
        if form == "tokens":
            assert torch.equal(torch.stack([torch.as_tensor(t) for t in names["tokens"]]), wanted)

    @pytest.mark.parametrize("site", ["resid_post.1", "attn_out.1", "final_norm"])
    @pytest.mark.parametrize("layout", ["last_token", "mean"])
    def test_what_it_says_for_actcache_works(self, store, space, tmp_path, monkeypatch, site, layout):
        fill_pooled(store, space, N, (site,), layout=layout)
        found = push(store, tmp_path / "set")
        snippet, _ = re.findall(r"```python\n(.*?)```", (found.folder / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(snippet, names)
        assert np.array_equal(
            names["vectors"], np.stack([rows(int(r["text"].split()[1]), site)[-1] for r in found.index])
        )

    def test_says_what_it_is(self, pooled, tmp_path):
        found = push(pooled, tmp_path / "set", license="mit", description="About *cats*.")
        card = (found.folder / "README.md").read_text()
        front = card.split("---")[1]
        assert "license: mit" in front and "path: index/train-*.parquet" in front
        for part in ("org/model", "`r1`", "About *cats*.", "| hidden_layers | resid_post | 0 to 1 | 8 | float32 |"):
            assert part in card

    @pytest.mark.parametrize(("name", "linked"), [("org/gpt", True), ("/home/me/models/gpt2", False)])
    def test_links_to_models_of_the_hub_alone(self, store, tmp_path, name, linked):
        fill_pooled(store, new_space(store, name=name), N)
        card = (push(store, tmp_path / "set", model=name).folder / "README.md").read_text()
        assert (
            ("](https://huggingface.co/" in card) is linked and name.rpartition("/")[2] in card and "/home" not in card
        )

    def test_nobody_s_name_breaks_it(self, store, tmp_path):
        name = "evil`\n---\n| x | [a](http://b) <script>"
        fill_pooled(store, new_space(store, name=name), N)
        card = (push(store, tmp_path / "set", model=name).folder / "README.md").read_text()
        body = card.split("---\n", 2)[2]
        assert "<script>" not in card and "](http://b)" not in card and "\n---\n" not in body
        assert "evil" in card
