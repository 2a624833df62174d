"""A dataset repository of the Hub as the place that a dataset is pushed to.

Large files are sent first, each once: the Hub keeps what has arrived under its digest, so that a push that was cut goes
on where it was. A repository that shows a dataset already is changed by one commit; a new one may grow by several, the
index comes with the last. Every commit names the one before it, so that of two pushes one learns of the other.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from actcache.errors import ActCacheError, DatasetAccessError, DatasetExistsError, OptionError
from actcache.share.format import CARD, INDEX
from actcache.share.hub_errors import check_token, endpoint, is_connection, reason_of, retry_after, status_of
from actcache.share.location import check_repo_id
from actcache.share.staging import Staged, Staging
from actcache.share.target import Target, is_stale
from actcache.share.transfer import Additions, needs_plain_requests
from actcache.store.files import log

T = TypeVar("T")
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_ATTEMPTS = 6
_LONGEST_WAIT_S = 300.0
# No larger file is kept as an ordinary one.
_ORDINARY = 16 << 20
_OWN_FILES = (".gitattributes",)


class HubTarget(Target):
    """`token`: as the Hub's client takes it; it is never part of an error, a log or a commit."""

    doing, do_it_again = "pushing to", "push again"
    """What errors call it, and how it goes on."""

    def __init__(
        self, repo_id: str, *, token: str | bool | None, private: bool, exist_ok: bool, num_threads: int
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.name = check_repo_id(repo_id)
        self.exist_ok = exist_ok
        self._private = private
        self._threads = num_threads
        self._token = check_token(get_token(), stored=True) if token in (None, True) else check_token(token)
        if not self._token:
            raise DatasetAccessError(
                f"{self.doing} {repo_id!r} needs a token of the Hub that may write: log in with `hf auth login`, or "
                "pass token=. A folder is written ./folder."
            )
        self._api = HfApi(token=self._token, library_name="actcache")
        self._endpoint = constants.ENDPOINT
        self._exists = False
        self._arrived = False
        self._head: str | None = None
        self._tree: dict[str, str] = {}
        self._pending: list[Any] = []
        self._additions = Additions()

    def keep_out(self, text: str | None, what: str) -> None:
        """`OptionError` where the token is part of what would be published."""
        if text is not None and str(self._token) in text:
            raise OptionError(f"{what} holds the token of the Hub, which would be published with it. Take it out.")

    @property
    def shown(self) -> str:  # type: ignore[override]
        return self.name

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"{self._endpoint}/datasets/{self.name}"

    def staging_root(self, store: Path) -> Path:
        return store / "pushing"

    def look(self, staging: Staging) -> None:
        self._refuse_readers(self._account())
        # Of a push that was cut before.
        self._arrived = bool(staging.sent_before)
        info = self._patiently(self._info)
        if info is None:
            self.incremental = True
            return
        self._exists = True
        self._head = info.sha
        self._tree = self._list()
        ours = staging.sent_before
        others = [p for p, digest in self._tree.items() if p not in _OWN_FILES and (p, digest) not in ours]
        # With its index a dataset is published, whoever did that: of other content it is another one.
        shown = {path for path in (INDEX, CARD) if path in self._tree}
        others += [p for p in shown - set(others) if (p, self._tree[p]) not in staging.sent_here]
        self.finished = shown == {INDEX, CARD} and not shown & set(others)
        if others and not self.exist_ok:
            raise DatasetExistsError(
                f"dataset {self.name!r} exists on the Hub and holds {len(others)} files, such as {sorted(others)[0]}: "
                "pass exist_ok=True to replace it, or choose another name."
            )
        if self._private and not info.private:
            raise DatasetExistsError(
                f"dataset {self.name!r} exists and is public, and private=True is asked for: make it private on the "
                "Hub first, or choose another name."
            )
        self.incremental = not any(is_stale(path, ()) for path in others) and not any(
            path.startswith("index/") for path in self._tree
        )

    def _account(self) -> Any:
        """What the Hub says of the token; None where it says nothing."""
        try:
            return self._api.whoami()
        except Exception as error:
            # It is asked rarely where many ask: the push itself will tell.
            log.debug("%s: what the token may do is not known: %s", self.name, reason_of(error, status_of(error)))
            return None

    def _refuse_readers(self, account: Any) -> None:
        """`DatasetAccessError` for a token that may only read, before files are made for it."""
        try:
            role = account["auth"]["accessToken"]["role"]
        except (KeyError, TypeError):
            # Of other tokens nothing is said here.
            return
        if role == "read":
            raise DatasetAccessError(
                f"{self.doing} {self.name!r}: this token may only read, and may not write. Pass one that may, made at "
                f"{self._endpoint}/settings/tokens."
            )

    def _info(self) -> Any:
        """What the Hub says of the repository; None where there is none, for this token."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            return self._api.repo_info(self.name, repo_type="dataset")
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None

    def _list(self) -> dict[str, str]:
        """Path -> digest of its bytes: SHA-256 of a large file, git's name of another."""

        from huggingface_hub.hf_api import RepoFile

        def ask() -> dict[str, str]:
            found = self._api.list_repo_tree(self.name, repo_type="dataset", recursive=True, revision=self._head)
            return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in found if isinstance(f, RepoFile)}

        return self._patiently(ask)

    def begin(self, paths: Sequence[str]) -> None:
        if not self._exists:
            from huggingface_hub.errors import HfHubHTTPError

            def create() -> None:
                try:
                    self._api.create_repo(self.name, repo_type="dataset", private=self._private)
                except HfHubHTTPError as error:
                    # Made by an attempt whose answer was lost, or by somebody else: a look will tell.
                    if status_of(error) != 409:
                        raise

            self._patiently(create)
            info = self._patiently(self._info)
            if info is None:
                raise DatasetAccessError(
                    f"{self.name!r} exists on the Hub, and this token may not see it: choose another name."
                )
            self._head = info.sha
            self._tree = self._list()
            others = [path for path in self._tree if path not in _OWN_FILES]
            if others or (self._private and not info.private):
                raise DatasetExistsError(f"somebody else has just made {self.name!r} on the Hub: look at it first.")
            self._exists = True
        if ".gitignore" in self._tree:
            # Some files of a new dataset are committed long before others.
            self._check_ignored([*paths, INDEX, CARD])
        self._additions.plain = self._patiently(lambda: needs_plain_requests(self.name, self._token))

    def _check_ignored(self, paths: Sequence[str]) -> None:
        """`OptionError` where the Hub would leave out files of these names; an upload that sends nothing asks it."""
        from huggingface_hub import CommitOperationAdd

        # What is empty is no large file, of which bytes would be sent.
        self._preupload([CommitOperationAdd(path_in_repo=path, path_or_fileobj=b"") for path in paths])

    def _preupload(self, operations: Sequence[Any], *, free_memory: bool = False, attempts: int = _ATTEMPTS) -> None:
        """Send large files, and refuse what the client would leave out of a commit without a word."""
        self._patiently(
            lambda: self._api.preupload_lfs_files(
                self.name,
                additions=operations,
                repo_type="dataset",
                num_threads=self._threads,
                free_memory=free_memory,
            ),
            attempts=attempts,
        )
        self._refuse_ignored(operations)

    def _refuse_ignored(self, operations: Sequence[Any]) -> None:
        ignored = [o.path_in_repo for o in operations if getattr(o, "_should_ignore", False)]
        if ignored:
            more = f" and {len(ignored) - 1} more of the files" if len(ignored) > 1 else ""
            raise OptionError(
                f"{self.doing} {self.name!r}: the .gitignore of the repository excludes {ignored[0]}{more}, and the "
                f"dataset would be published without: remove what matches from .gitignore, then {self.do_it_again}."
            )

    def has(self, staged: Staged) -> bool:
        return self._tree.get(staged.path) == staged.sha256

    def send(self, batch: Sequence[Staged]) -> list[Staged]:
        operations = []
        for staged in batch:
            assert staged.file is not None
            operation = self._additions.make(staged.path, staged.file)
            if staged.fresh:
                # Known from writing it; else the client reads the file for it, which shows what a crash did to it.
                operation.upload_info.sha256 = bytes.fromhex(staged.sha256)
            operations.append(operation)
        # Some may have arrived where others fail.
        self._arrived = True
        # Each of its requests the client tries several times by itself.
        self._preupload(operations, free_memory=True, attempts=2)
        self._additions.close(sent_only=True)
        damaged = []
        for staged, operation in zip(batch, operations, strict=True):
            if operation.upload_info.sha256.hex() == staged.sha256:
                self._pending.append(operation)
            else:
                damaged.append(staged)
        return damaged

    def commit(self, message: str) -> list[str]:
        # Of what the Hub keeps as an ordinary file the bytes go with the commit itself.
        gone = [o.path_in_repo for o in self._pending if self.incremental or o.path_or_fileobj == b""]
        if self.incremental and self._pending:
            self._commit(self._pending, message)
            self._pending = []
        return gone

    def finish(self, small: Mapping[str, Path], wanted: Sequence[str], staging: Staging) -> None:
        from huggingface_hub import CommitOperationDelete

        operations = list(self._pending)
        for path, file in small.items():
            operations.append(self._additions.make(path, file))
            # Known before: when the answer is lost, the next look still knows whose files these are.
            for digest in _digests(file):
                staging.note_sent(Staged(path, file.stat().st_size, digest))
        stale = [path for path in self._tree if is_stale(path, {*wanted, *small})]
        operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
        self._commit(operations, "Add the index and the card" if self.incremental else "Replace the dataset")
        self._pending = []

    def _commit(self, operations: Sequence[Any], message: str) -> None:
        wanted = {o.path_in_repo: o for o in operations if hasattr(o, "upload_info")}

        def attempt() -> None:
            # By itself it would leave out files that are ignored, and still delete those that they replace.
            self._api.preupload_lfs_files(
                self.name,
                additions=list(wanted.values()),
                repo_type="dataset",
                num_threads=self._threads,
                free_memory=False,
            )
            self._refuse_ignored(operations)
            made = self._api.create_commit(
                self.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                parent_commit=self._head,
                num_threads=self._threads,
            )
            self._head = made.oid

        def was_made() -> bool:
            """Whether a commit whose answer did not come is there."""
            head = self._api.repo_info(self.name, repo_type="dataset").sha
            if head == self._head:
                return False
            before, self._head = self._head, head
            if all(self._list().get(path) in _digests_of(o) for path, o in wanted.items()):
                return True
            self._head = before
            raise self._overtaken()

        self._patiently(attempt, unless=was_made)
        for path, operation in wanted.items():
            self._tree[path] = operation.upload_info.sha256.hex()
        self._additions.close()

    def _overtaken(self) -> ActCacheError:
        return DatasetAccessError(
            f"somebody else has just committed to {self.name!r}, so that nothing was changed: look at it, then push "
            "again with exist_ok=True."
        )

    def _patiently(
        self, ask: Callable[[], T], unless: Callable[[], bool] | None = None, *, attempts: int = _ATTEMPTS
    ) -> T:
        """The answer to a request, asked again while the Hub is busy; `unless` it turns out to be done already."""
        for attempt in range(1, attempts + 1):
            try:
                if attempt > 1 and unless is not None and unless():
                    return None  # type: ignore[return-value]
                return ask()
            except ActCacheError:
                raise
            except Exception as error:
                status = status_of(error)
                passing = status in _TRANSIENT or (status is None and is_connection(error))
                if status == 412:
                    raise self._overtaken() from None
                if not passing or attempt == attempts:
                    raise self._failed(error, status) from None
                wait = retry_after(error)
                wait = min(0.25 * 2**attempt if wait is None else wait, _LONGEST_WAIT_S)
                log.info("%s: %s, again in %.1f s", self.name, reason_of(error, status), wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _failed(self, error: Exception, status: int | None) -> ActCacheError:
        """What went wrong, without what the client says of it: that may hold signed addresses and headers."""
        again = (
            f"what has arrived stays there: {self.do_it_again} to go on." if self._arrived else f"{self.do_it_again}."
        )
        remedy = {
            401: "the Hub does not know this token: log in again with `hf auth login`, or pass another one.",
            403: f"this token may not write to {self.name!r}: pass one that may, or choose another name.",
            404: "there is no such account, or this token may not see it.",
        }.get(status or 0, again)
        where = f", {endpoint()} cannot be reached" if status is None and is_connection(error) else ""
        return DatasetAccessError(f"{self.doing} {self.name!r} failed ({reason_of(error, status)}{where}): {remedy}")


def _digests(file: Path) -> tuple[str, str]:
    """What a listing may call the bytes of a file: their SHA-256, or git's name for them."""
    digests = hashlib.sha1(b"blob %d\0" % file.stat().st_size), hashlib.sha256()
    with file.open("rb") as data:
        while piece := data.read(1 << 20):
            for digest in digests:
                digest.update(piece)
    return digests[0].hexdigest(), digests[1].hexdigest()


def _digests_of(operation: Any) -> set[str]:
    found = {operation.upload_info.sha256.hex()}
    if operation.path_or_fileobj != b"" and operation.upload_info.size <= _ORDINARY:
        file = operation.path_or_fileobj
        found.update(_digests(Path(getattr(file, "name", file))))
    return found


@contextmanager
def quiet_client() -> Iterator[None]:
    """No bars of the Hub's client beside ours."""
    from huggingface_hub import constants

    bars: Any = import_module("huggingface_hub.utils")

    if bars.are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()
