"""A dataset is brought to another form: what is planned, and done as one change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from actcache.config import user_cache
from actcache.errors import OptionError
from actcache.share import folder_change, hub_change
from actcache.share.change import Change, Report
from actcache.share.hub_errors import check_token
from actcache.share.index import Index
from actcache.share.index_file import require_pyarrow
from actcache.share.location import local_folder
from actcache.share.source import open_source
from actcache.store.files import log


@dataclass(frozen=True)
class Plan:
    """What will be done: `report` says it, `apply` does it and returns where the dataset is. `change`: None of none;
    `before`: how the files of a folder were before any was read."""

    report: Report
    _job: Job
    change: Change | None
    before: folder_change.Snapshot = field(default_factory=dict)

    def apply(self) -> str:
        job = self._job
        if self.change is None:
            # The answer to its last step may never have come.
            if job.folder is None:
                hub_change.forget(self.report.url)
            else:
                folder_change.forget(job.folder)
            return self.report.url
        if job.folder is not None:
            return folder_change.apply(self.change, job.folder, self.before, doing=job.doing)
        return hub_change.apply(
            self.change, token=job.token, private=job.private, doing=job.doing, message=self.report.summary
        )


class Job:
    """One of the two, on one dataset."""

    doing: str

    def __init__(
        self, repo_id: str | os.PathLike[str], *, token: str | bool | None, private: bool | None = None
    ) -> None:
        require_pyarrow()
        check_token(token)
        self.folder = local_folder(repo_id)
        self.token, self.private = token, private
        if private is not None and (self.folder is not None or not isinstance(private, bool)):
            raise OptionError(f"private is {private!r}: expected True or False for a repository, nothing for a folder.")
        self._repo_id = repo_id

    @contextmanager
    def planned(self) -> Iterator[Plan]:
        """The plan; what it needs on disk is there as long as the block runs."""
        source = open_source(self._repo_id, token=self.token)
        before = folder_change.snapshot(self.folder) if self.folder is not None and self.folder.is_dir() else {}
        index = Index(source)
        name = index.source.name
        url = str(self.folder) if self.folder is not None else hub_change.address(name)
        nothing = self._nothing(index)
        seen = {None: "", True: ", in a private repository", False: ", in a public repository"}[self.private]
        if nothing is not None:
            # What cannot be read is not as it should be, whatever its form.
            index.checksums.require()
            nothing += ", nor who may see it" if self.private is not None else ""
            yield Plan(Report(name, url, index.source.commit, nothing, False), self, None)
            return
        shown = f"./{self.folder.name}" if self.folder is not None else name
        with tempfile.TemporaryDirectory(prefix="planned-", dir=_room()) as folder:
            change, summary = self._change(index, Path(folder), shown)
            yield Plan(change.report(url, summary + seen), self, change, before)

    def _nothing(self, index: Index) -> str | None:
        """What to say of a dataset that stays as it is."""
        raise NotImplementedError

    def _change(self, index: Index, folder: Path, shown: str) -> tuple[Change, str]:
        raise NotImplementedError


def _room() -> Path | None:
    """Where an index may lie: the folder for temporary files is memory on many machines."""
    place = user_cache()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return place if os.access(place, os.W_OK | os.X_OK) else None


def run(job: Job, dry_run: bool) -> str:
    """Do `job`, or with `dry_run` only say what it would do; where the dataset is, or that text."""
    with job.planned() as plan:
        if dry_run:
            return str(plan.report)
        if not plan.report.changed:
            log.warning("%s: %s", plan.report.dataset, plan.report.summary)
        return plan.apply()
