"""The card of a dataset that is migrated or upgraded: what people wrote stays."""

from __future__ import annotations

import pytest

import actcache as ac
from actcache.share.recard import updated
from made_datasets import make
from migrate_helpers import same_values


class TestTheCard:
    def card(self, text):
        described = {
            "hidden_layers": {"layers": [0, 1], "dim": 4, "storage": "pooled", "pooling": "mean", "shards": []}
        }
        return updated(
            text, repo_id="a/b", model="m", described=described, columns=["text"], count=3, note="upgraded"
        )  # fmt: skip

    def test_what_people_wrote_stays(self):
        text = (
            "---\nlicense: mit\nlanguage: [de]\n---\n# Title\n\nWhy we made this.\n\n## Contents\n\nstale\n\n"
            "## Load with lmprobe\n\n```sh\n## Contents of a comment\nstale\n```\n\n"
            "## Citation\n\n```\n## Contents\nkept\n```\n\n## Provenance\n\n- by us\n"
        )  # fmt: skip
        made = self.card(text)
        assert made.startswith("---\nlicense: mit\nlanguage: [de]\nconfigs:\n") and "stale" not in made
        assert "Why we made this." in made and "```\n## Contents\nkept\n```" in made
        assert made.index("## Contents\n\n| tensors") < made.index("## Load with actcache") < made.index("## Citation")
        assert made.endswith("## Provenance\n\n- by us\n- upgraded\n")
        assert self.card(made).count("## Contents\n\n|") == 1 and self.card(made).count("configs:") == 1

    @pytest.mark.parametrize("text", [None, "", "plain words", "---\nno end of it", "## Provenance\n- x"])
    def test_cards_of_any_kind(self, text):
        made = self.card(text)
        assert made.startswith("---\nconfigs:") and "| hidden_layers | resid_post | 0 to 1 |" in made
        assert "- upgraded\n" in made and (text or "").strip("- \n") in made

    def test_one_that_is_no_text_stays_as_it_is(self, tmp_path):
        made = make(tmp_path / "set", "1.0 full")
        (made.folder / "README.md").write_bytes(b"\xff\xfe\x00")
        ac.migrate_dataset(made.folder)
        assert (made.folder / "README.md").read_bytes() == b"\xff\xfe\x00" and same_values(made)
