"""The body of a commit: one JSON object a line, a header and then what is done with each file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from actcache.testing.hub.exchange import Refusal
from actcache.testing.hub.repositories import Blob, RefusedError, Repository, path_in_repository


def apply_commit(repository: Repository, lines: Iterable[bytes], branch: str) -> str:
    """Make the commit that these lines say, all of it or nothing; returns its id.

    A `parentCommit` that is no longer the branch's is answered with 412: of two writers one learns of the other.
    """
    operations = [_operation(line) for line in lines if line.strip()]
    header = next((value for key, value in operations if key == "header"), None)
    if header is None or not header.get("summary"):
        raise Refusal(400, "BadRequest", "a commit needs a header with a summary")
    with repository.lock:
        current = repository.refs.get(branch)
        if current is None and repository.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent = header.get("parentCommit")
        if parent is not None and (current is None or not current.startswith(parent)):
            raise Refusal(412, "PreconditionFailed", "the branch has moved: its tip is not the parent commit")
        files = dict(repository.commits[current].files) if current is not None else {}
        for key, value in operations:
            _apply(repository, files, key, value)
        return repository.append(files, branch, header["summary"], header.get("description") or "")


def _operation(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        item = json.loads(line)
        key, value = item["key"], item["value"]
    except (ValueError, KeyError, TypeError):
        raise Refusal(400, "BadRequest", "a line of the commit is not of the form {key, value}") from None
    return str(key), dict(value)


def _apply(repository: Repository, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    if key == "header":
        return
    path = path_in_repository(str(value["path"]).rstrip("/"))
    if key == "file":
        if value.get("encoding") != "base64":
            raise RefusedError(f"{path}: content is to be base64")
        data = base64.b64decode(value["content"], validate=True)
        sha256 = repository.blobs.receive([data])
        files[path] = repository.blobs.blob(sha256, path, large=False)
    elif key == "lfsFile":
        if value.get("algo") != "sha256":
            raise RefusedError(f"{path}: not a SHA-256")
        blob = repository.blobs.blob(str(value["oid"]), path, large=True)
        if value.get("size", blob.size) != blob.size:
            raise RefusedError(f"{path}: has {blob.size} bytes, not {value['size']}")
        files[path] = blob
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, "EntryNotFound", f"no file {path}")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(f"{path}/")]
        if not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {path}")
        for name in inside:
            del files[name]
    else:
        raise Refusal(501, "NotImplemented", f"no such operation: {key}")
