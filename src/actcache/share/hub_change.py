"""A change of a dataset of the Hub: one commit on top of the one that was read, large files sent before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actcache.config import user_cache
from actcache.errors import ActCacheError, DatasetAccessError, DatasetNotFoundError, DiskFullError, OptionError
from actcache.progress import progress
from actcache.share.change import AT_ONCE, Change, damaged, made
from actcache.share.format import CARD
from actcache.share.hub_target import HubTarget, quiet_client
from actcache.share.staging import Staged, Staging, writing_to
from actcache.share.transfer import needs_plain_requests
from actcache.store.files import log

_ROOM = 16 << 20


def apply(change: Change, *, token: str | bool | None, private: bool | None, doing: str, message: str) -> str:
    """Make the change; the dataset's address.

    Raises:
        DatasetAccessError: no token, or one that may not write; the Hub cannot be reached, or somebody has changed the
            dataset since it was read.
        DiskFullError: no room for the few files that are on their way.
    """
    target = _Target(change.source.name, token=token, doing=doing)
    with quiet_client():
        target.look_at(change.source.commit)
        target.check_write(change.small.get(CARD), [*(file.path for file in change.files), *change.small])
        used = target.digests(change.used)
        with Staging(staging_root(), target.url, change.digest(used)) as staging:
            _send(change, target, staging)
            files = {f.path: staging.sent.get(f.path) or staging.done[f.path] for f in change.files}
            small = change.finish(files, staging)
            with target.hidden(bool(private)):
                target.publish(list(files.values()), small, change.removed, message, staging)
            staging.remove()
    if private is False:
        target.show()
    return target.url


def staging_root() -> Path:
    """Where files on their way to the Hub lie."""
    return user_cache() / "migrating"


def forget(url: str) -> None:
    """Remove what is left of a change that is done: its last answer may never have come."""
    if not staging_root().is_dir():
        return
    try:
        with Staging(staging_root(), url, "done") as staging:
            staging.drop_others()
            staging.remove()
    except ActCacheError:
        log.info("%s: another process is at work on it, whose files stay", url)


def address(name: str) -> str:
    """Where people find a dataset."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{name}"


def _send(change: Change, target: _Target, staging: Staging) -> None:
    """Make and send all files of vectors; what has arrived is removed here."""
    staging.drop_others()
    wanted = {file.path: file for file in change.files}
    for path in [path for path in staging.sent if path not in wanted]:
        del staging.sent[path]
    left = [file.nbytes for file in change.files if file.path not in staging.sent]
    aside = max((layer.aside_bytes for layer in change.layers), default=0)
    _check_room(staging.folder, sum(sorted(left)[-AT_ONCE:]) + aside)
    with progress(len(wanted), f"{target.doing} {target.name}", unit="file") as bar:
        bar.update(len(wanted) - len(left))
        for batch in made(staging, change.layers, change.source):
            part: Sequence[Staged] = batch
            for _ in range(3):
                spoilt = target.send(part)
                part = [staging.remake(wanted[staged.path]) for staged in spoilt]
                if not part:
                    break
            else:
                raise damaged(staging.folder)
            there = target.freed()
            for staged in batch:
                if staged.path in there:
                    staging.note_sent(staging.done[staged.path])
                    staging.forget(staged)
            bar.update(len(batch))


def _check_room(folder: Path, needed: int) -> None:
    with writing_to(folder, needed):
        free = shutil.disk_usage(folder).free
    if free < needed + _ROOM:
        raise DiskFullError(
            f"{folder} needs {needed:,} bytes for files on their way, and {free:,} are free: make room, or pass a "
            "smaller shard_max_bytes."
        )


class _Target(HubTarget):
    do_it_again = "do it again"

    def __init__(self, repo_id: str, *, token: str | bool | None, doing: str) -> None:
        self.doing = doing
        self._status: int | None = None
        self._seen = False
        super().__init__(repo_id, token=token, private=False, exist_ok=True, num_threads=AT_ONCE)

    def look_at(self, commit: str | None) -> None:
        """List the files of the commit that was read, which must still be the last one."""
        info = self._patiently(self._info)
        if info is None:
            raise DatasetNotFoundError(f"dataset {self.name!r} is not to be had from the Hub with this token.")
        if info.sha != commit:
            raise self._overtaken()
        self._exists, self._head, self._seen = True, info.sha, not info.private
        self._tree = self._list()
        self._additions.plain = self._patiently(lambda: needs_plain_requests(self.name, self._token))

    def digests(self, paths: Iterable[str]) -> dict[str, str]:
        """What the Hub calls the bytes of files."""
        return {path: self._tree.get(path, "") for path in paths}

    def check_write(self, card: Path | None, paths: Sequence[str]) -> None:
        """Ask for an upload that sends nothing: a token that may not write, and files that the repository ignores,
        show before everything is fetched."""
        from huggingface_hub import CommitOperationAdd

        content = card.read_bytes() if card is not None else b"-"
        self._preupload([CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=content)])
        if ".gitignore" in self._tree:
            self._check_ignored(paths)

    def freed(self) -> set[str]:
        """Files that the Hub keeps, and that are needed here no more."""
        return {operation.path_in_repo for operation in self._pending if operation.path_or_fileobj == b""}

    def publish(
        self,
        files: Sequence[Staged],
        small: Mapping[str, Path],
        removed: Sequence[str],
        message: str,
        staging: Staging,
    ) -> None:
        """One commit of everything."""
        from huggingface_hub import CommitOperationDelete

        here = {operation.path_in_repo for operation in self._pending}
        before = [_arrived(staged) for staged in files if staged.path not in here]
        self._arrived = self._arrived or bool(before)
        operations: list[Any] = [*self._pending, *before]
        operations += [self._additions.make(path, file) for path, file in small.items()]
        operations += [CommitOperationDelete(path_in_repo=path) for path in removed if path in self._tree]
        try:
            self._commit(operations, message)
        except ActCacheError:
            if before and self._status in (400, 404, 409, 422):
                # Files that nobody refers to do not stay there for ever.
                log.warning("%s: the Hub no longer has what was sent before, and gets it again next time", self.name)
                staging.remove()
            raise

    @contextmanager
    def hidden(self, private: bool) -> Iterator[None]:
        """Where that is asked for, the repository is private from before the block on, unless the block changes
        nothing."""
        if not private:
            yield
            return
        self._set_private(True)
        try:
            yield
        except ActCacheError as error:
            if self._seen and not (self._is_refused(error) and self._is_shown_again()):
                log.warning("%s is private now, and may not have changed otherwise: %s", self.name, self.do_it_again)
            raise

    def show(self) -> None:
        """Make the repository a public one, after what it shows is there."""
        try:
            self._set_private(False)
        except ActCacheError:
            said = "" if self._status is None else f" (status {self._status})"
            raise DatasetAccessError(
                f"{self.name!r} is changed, and could not be made public{said}: do that in its settings on the Hub."
            ) from None

    def _is_shown_again(self) -> bool:
        try:
            self._set_private(False)
        except ActCacheError:
            return False
        return True

    def _set_private(self, private: bool) -> None:
        self._patiently(lambda: self._api.update_repo_settings(self.name, private=private, repo_type="dataset"))

    def _is_refused(self, error: ActCacheError) -> bool:
        """Whether the Hub has said that there is no commit, and not just said nothing."""
        return isinstance(error, OptionError) or (self._status or 0) in (400, 401, 403, 404, 409, 412, 413, 422, 429)

    def _failed(self, error: Exception, status: int | None) -> ActCacheError:
        self._status = status
        return super()._failed(error, status)

    def _overtaken(self) -> ActCacheError:
        self._status = 412
        return DatasetAccessError(
            f"somebody else has just committed to {self.name!r}, so that nothing was changed: look at it, then do it "
            "again."
        )


def _arrived(staged: Staged) -> Any:
    """What a commit says of a large file that an earlier process has sent."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(path_in_repo=staged.path, path_or_fileobj=b"")
    operation.upload_info.sha256 = bytes.fromhex(staged.sha256)
    operation.upload_info.size = staged.size
    # As the client leaves one that it has just sent.
    operation._upload_mode, operation._is_uploaded = "lfs", True
    return operation
