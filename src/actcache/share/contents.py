"""What a new dataset says of itself: its metadata and its card, and the digest of all that decides them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actcache._version import __version__
from actcache.model.source import package_version
from actcache.share import blocks, card, ours
from actcache.share.columns import Column
from actcache.share.format import CARD, INDEX
from actcache.share.format import VERSION as FORMAT_VERSION
from actcache.share.index_file import Index
from actcache.share.selection import Selection
from actcache.share.shard_files import Shards
from actcache.share.staging import Staged, Staging, writing_to
from actcache.share.target import Target

_AT_ONCE = 10_000


class Contents:
    """What a dataset says of itself."""

    def __init__(
        self,
        found: Selection,
        shards: Shards,
        index: Index,
        target: Target,
        license: str,
        description: str | None,
        shuffle: bool,
    ) -> None:
        self._found, self._shards, self._index, self._target = found, shards, index, target
        self._license, self._description = license, description
        self._ordering = "random" if shuffle else "given"
        self.tensors = shards.described()
        self.model = card.published_name(found.space)

    def digest(self, label: Column, columns: Sequence[Column]) -> str:
        """Of everything that decides what is sent."""
        found, digest = self._found, hashlib.sha256()
        settings = [__version__, found.space.space, self._ordering, self.tensors, self._license, self._description]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        digest.update(found.table.digest())
        for column in (label, *columns):
            digest.update(json.dumps([column.name, column.type]).encode())
            for start in range(0, len(column.values), _AT_ONCE):
                digest.update(json.dumps(column.values[start : start + _AT_ONCE]).encode())
        groups = [group.located for group in found.groups] + ([found.logits[1].located] if found.logits else [])
        for located in [*groups, *filter(None, [found.perplexity, found.token_nll])]:
            for places in (located.owner, located.local):
                for start in range(0, len(places), _AT_ONCE):
                    digest.update(places[start : start + _AT_ONCE].tobytes())
            for placement in located.placements:
                digest.update(placement.fingerprint())
        return digest.hexdigest()

    def write(self, staging: Staging, files: Sequence[Staged]) -> dict[str, Path]:
        """What says of `files` what they are, in the folder of `staging`: path -> file, the index last."""
        space = self._found.space
        label = {**space.label, "model_name": self.model} if os.path.isabs(space.model_name) else dict(space.label)
        provenance = self._provenance()
        written, now = provenance["written_with"], provenance["created_at"]
        described = {
            "format_version": FORMAT_VERSION,
            "model": {"name": self.model, "revision": space.revision},
            "num_prompts": len(self._found.given),
            "prompt_ordering": self._ordering,
            "tensors": self.tensors,
            "provenance": {
                "lmprobe_version": None,
                "extraction_backend": "local",
                "nnsight_version": None,
                "torch_version": written.get("torch"),
                "transformers_version": written.get("transformers"),
                "python_version": written["python"],
                "created_at": now,
            },
        }
        own = {
            "version": ours.VERSION,
            "space": {"space": space.space, "identity": dict(space.identity), "label": label},
            "text_context": self._index.text_context(),
            "files": {staged.path: [staged.size, staged.sha256] for staged in files},
            "provenance": provenance,
        }
        small = {CARD: staging.folder / CARD, INDEX: staging.folder / "index.parquet"}
        with writing_to(staging.folder):
            if files:
                small = {blocks.FILE: staging.folder / "blocks.xxh3", **small}
                own["blocks"] = staging.write_blocks(small[blocks.FILE], files)
            self._index.write(small[INDEX], described, own)
            small[CARD].write_text(self._card(provenance), encoding="utf-8")
        return small

    def check(self) -> None:
        """Make the card and throw it away: nothing of it may fail when everything else has arrived."""
        self._card(self._provenance())

    def _provenance(self) -> dict[str, Any]:
        written = {"actcache": __version__, "python": platform.python_version()}
        written |= {name: found for name in ("torch", "transformers") if (found := package_version(name))}
        return {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "written_with": written,
            "extracted_with": self._found.space.label.get("provenance"),
            "left_out": self._found.left_out,
        }

    def _card(self, provenance: Mapping[str, Any]) -> str:
        space = self._found.space
        identity = {"computed in": space.dtype, "attention": space.attn_implementation, "weights": None}
        identity["weights"] = space.identity.get("weights")
        identity["known by name only, imported from"] = space.imported
        shown = {**provenance, "identity": {key: value for key, value in identity.items() if value}}
        return card.build(
            repo_id=self._target.shown,
            model=self.model,
            on_hub=not os.path.isabs(space.model_name),
            revision=space.revision,
            described=self.tensors,
            columns=self._index.schema().names,
            count=len(self._found.given),
            provenance=shown,
            license=self._license,
            description=self._description,
        )
