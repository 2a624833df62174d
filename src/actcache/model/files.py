"""The files a named model consists of: its own, or an adapter's and those of the base model it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from actcache.errors import ModelLoadError
from actcache.model import adapters, identity
from actcache.model.folders import Place, fetch, find_folder
from actcache.model.options import LoadOptions
from actcache.model.tokenizer import tokenizer_files


class ModelFiles:
    """The files behind a local folder or a Hub id, found without reading any weights.

    Attributes:
        given: what the name leads to.

    Args:
        every: count every weight file, since other arguments of loading may choose others than usual.
    """

    def __init__(self, name: str, options: LoadOptions, *, every: bool) -> None:
        self.given = find_folder(name, options)
        self._options = options
        self._every = every
        self._bases: dict[tuple[str, Any], Place] = {}
        self._code: dict[str, Path] = {}
        self._config: tuple[object, Mapping[str, Any]] | None = None
        self.base()

    @property
    def adapter(self) -> Mapping[str, Any] | None:
        """The configuration of the adapter that the name leads to; None when it leads to a model."""
        folder, _, commit = self.given
        config = adapters.read_config(folder)
        if config is not None and commit is None and (folder / "config.json").is_file():
            weights = identity.weight_files(folder)
            if any(p.is_file() for p in weights):
                raise ModelLoadError(
                    f"{str(folder)!r} holds an adapter beside the weights of a model, and versions of transformers "
                    "disagree which model it is for: move the adapter to a folder of its own, or load the model and "
                    "pass it."
                )
        return config

    def base(self) -> Place:
        """Where the model itself is: the place given, or the one that an adapter names."""
        adapter = self.adapter
        place = self.given
        if adapter is not None:
            wanted = adapter["base_model_name_or_path"], adapter.get("revision")
            if wanted not in self._bases:
                local = Path(wanted[0]).expanduser().is_dir()
                options = replace(self._options, revision=None if local else wanted[1])
                self._bases[wanted] = find_folder(wanted[0], options)
            place = self._bases[wanted]
        if not (place.folder / "config.json").is_file():
            raise ModelLoadError(
                f"no config.json in {str(place.folder)!r}: expected a folder made by save_pretrained, or a Hub id."
            )
        return place

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json``."""
        path = self.base().folder / "config.json"
        try:
            signature = identity.stat_signature([path])
            if self._config is not None and self._config[0] == signature:
                return self._config[1]
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"cannot read {str(path)!r}: {error}. Save the model again.") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise ModelLoadError(f"{str(path)!r} names no model_type: it is not the config of a transformers model.")
        self._config = signature, config
        return config

    @property
    def trusted(self) -> bool:
        """Whether code of the repository may run: of the one the caller named, never of one that an adapter names."""
        return self._options.trust_remote_code and self.adapter is None

    def code(self) -> list[Path]:
        """The code that is run, when it may be."""
        if not self.trusted:
            return []
        own = sorted(self.base().folder.glob("*.py"))
        revision = self.code_revision()
        return own if revision is None else sorted(revision.glob("*.py"))

    def code_revision(self) -> Path | None:
        """The folder (named by its commit) of another repository's code, when ``auto_map`` names one."""
        if not self.trusted:
            return None
        named = self.config.get("auto_map")
        classes = [value for key, value in named.items() if "Tokenizer" not in key] if isinstance(named, dict) else []
        repos = {value.split("--")[0] if "--" in value else None for value in classes if isinstance(value, str)}
        if repos <= {None}:
            return None
        if len(repos) > 1:
            names = ", ".join(sorted(repo or "its own" for repo in repos))
            raise ModelLoadError(
                f"{self.given.name!r} takes its code from several repositories ({names}), which cannot be held at one "
                "revision: load the model and pass it."
            )
        (repo,) = repos
        assert repo is not None
        if repo not in self._code:
            self._code[repo] = fetch(repo, ["*.py"], revision=None, token=self._options.token, what="code")
        return self._code[repo]

    def weights(self) -> list[Path]:
        """The weight files of a local model; raises `ModelLoadError` when any is missing."""
        folder = self.base().folder
        try:
            weights = identity.weight_files(folder, every=self._every)
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelLoadError(
                f"the index of the weights in {str(folder)!r} cannot be read ({error}). Save the model again."
            ) from error
        if not weights:
            raise ModelLoadError(
                f"no weights in {str(folder)!r}: expected model.safetensors, its shards or pytorch_model.bin."
            )
        absent = [p.name for p in weights if not p.is_file()]
        if absent:
            raise ModelLoadError(
                f"{', '.join(absent)} of the weights in {str(folder)!r} is missing: copy or save the model again."
            )
        return weights

    def all(self) -> list[Path]:
        """Every file that the model's values depend on, as far as it can change under its name."""
        base = self.base()
        files = [base.folder / "config.json", *self.code()]
        if base.commit is None:
            files += self.weights()
        if self.adapter is not None:
            files += adapters.files(self.given.folder) if self.given.commit is None else []
        return files

    def digests(self) -> dict[str, Any]:
        """What the values depend on, by digest or commit: ``weights``, ``config``, and where there are such
        ``adapter`` and ``code``."""
        base = self.base()
        found: dict[str, Any] = {
            "weights": f"commit:{base.commit}" if base.commit else f"files:{identity.files_digest(self.weights())}",
            "config": identity.config_digest(self.config),
        }
        adapter = self.adapter
        if adapter is not None:
            folder, _, commit = self.given
            weights = f"commit:{commit}" if commit else f"files:{identity.file_digest(adapters.files(folder)[1])}"
            found["adapter"] = {"weights": weights, "config": adapters.config_digest(adapter)}
        if self.trusted:
            found["code"] = identity.files_digest(self.code())
        return found

    def adapter_folder(self) -> Path:
        """The local folder with the adapter's weights, fetched from the Hub where they are missing."""
        folder, name, commit = self.given
        if commit is None:
            return folder
        patterns = [adapters.CONFIG, *adapters.WEIGHTS]
        fetched = fetch(name, patterns, revision=commit, token=self._options.token)
        adapters.files(fetched)
        return fetched

    def files_outside_blocks(self) -> list[Path]:
        """The weight files that have more than blocks; those of a Hub model are fetched where they are missing."""
        from actcache.model.head_files import outside_blocks

        base = self.base()
        for single, index in identity.WEIGHT_FILES:
            wanted = [single]
            if not (base.folder / single).is_file() and (base.folder / index).is_file():
                placed = json.loads((base.folder / index).read_text(encoding="utf-8"))["weight_map"]
                wanted = sorted({placed[name] for name in outside_blocks(placed)})
            folder = base.folder
            if base.commit is not None and not all((folder / name).is_file() for name in wanted):
                folder = fetch(base.name, wanted, revision=base.commit, token=self._options.token)
            if all((folder / name).is_file() for name in wanted):
                return [folder / name for name in wanted]
        raise ModelLoadError(
            f"no weights of the usual names in {base.name!r}: expected {identity.WEIGHT_FILES[0][0]}, its shards or "
            f"{identity.WEIGHT_FILES[1][0]}."
        )

    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: an adapter may have been trained with one of its own."""
        return self.given.folder if tokenizer_files(self.given.folder) else self.base().folder

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files that are here; those of a Hub model come with the first run."""
        return sum(p.stat().st_size for p in identity.weight_files(self.base().folder) if p.is_file())
