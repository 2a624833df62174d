"""The first origin: the Hub's API, its files, and the batch calls of LFS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from actcache.testing.hub.commits import apply_commit
from actcache.testing.hub.exchange import Exchange, Refusal
from actcache.testing.hub.repositories import Blob, Commit, Repository, is_ignored, is_large, path_in_repository
from actcache.testing.hub.storage import join_parts, signed, upload_actions

_KINDS = {"models": "model", "datasets": "dataset"}


class Api(Exchange):
    """Every route of the Hub itself. One that is not known is answered with 501: a client that begins to use another
    one shows at once."""

    def route(self) -> None:
        hub, parts = self.hub, self.parts
        if self.token is not None and self.token not in hub.tokens | hub.read_tokens:
            raise Refusal(401, "InvalidToken", "Invalid credentials in Authorization header")
        if parts[:1] == ["api"]:
            self._api(parts[1:])
            return
        if parts[:1] == ["lfs"]:
            self._lfs(parts[1:])
            return
        prefix = "datasets/" if parts[0] == "datasets" else ""
        rest = parts[1:] if prefix else parts
        if len(rest) >= 5 and rest[2] == "resolve" and self.command in ("GET", "HEAD"):
            self._file(self._repository(prefix + "/".join(rest[:2])), rest[3], "/".join(rest[4:]))
        elif len(rest) == 6 and rest[1].endswith(".git") and rest[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch(prefix + "/".join(rest[:2]).removesuffix(".git"))
        else:
            self._unknown()

    def _unknown(self) -> None:
        raise Refusal(501, "NotImplemented", f"no such route: {self.command} {self.path}")

    def _api(self, parts: list[str]) -> None:
        simple: dict[tuple[str, str], Callable[[], None]] = {
            ("GET", "whoami-v2"): self._whoami,
            ("POST", "repos/create"): self._create,
            ("DELETE", "repos/delete"): self._delete,
            ("POST", "validate-yaml"): lambda: self.answer_json({"errors": [], "warnings": []}),
        }
        found = simple.get((self.command, "/".join(parts)))
        if found is not None:
            found()
        elif len(parts) >= 3 and parts[0] in _KINDS:
            name = ("datasets/" if parts[0] == "datasets" else "") + "/".join(parts[1:3])
            self._of_repository(name, parts[3:])
        else:
            self._unknown()

    # Who asks, and what they may.

    def _may_write(self) -> None:
        if self.token is None:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        if self.token not in self.hub.tokens:
            raise Refusal(403, "Forbidden", "this token may only read")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token is None):
            # As the Hub does: what somebody may not see looks like what is not there.
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if write:
            self._may_write()
        return repository

    def _whoami(self) -> None:
        if self.token is None:
            raise Refusal(401, "Unauthorized", "Invalid username or password.")
        role = "write" if self.token in self.hub.tokens else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self.answer_json({"type": "user", "name": "user", "fullname": "user", "orgs": [], "auth": access})

    # Repositories.

    def _create(self) -> None:
        wanted = self.json_message()
        self._may_write()
        name = f"{wanted.get('organization') or 'user'}/{wanted.get('name')}"
        kind = wanted.get("type") or "model"
        if kind not in _KINDS.values():
            raise Refusal(400, "BadRequest", f"no repositories of type {kind!r} here")
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        with self.hub.lock:
            there = self.hub.repository(name, kind=kind, missing_ok=True)
            if there is None:
                self.hub.create(name, kind=kind, private=private)
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if there is not None:
            error = "You already created this repo"
            self.answer_json({"error": error, "url": url}, 409, {"X-Error-Message": error})
            return
        self.answer_json({"url": url, "id": name, "name": name})

    def _delete(self) -> None:
        wanted = self.json_message()
        name = f"{wanted.get('organization') or 'user'}/{wanted.get('name')}"
        name = f"datasets/{name}" if wanted.get("type") == "dataset" else name
        self._repository(name, write=True)
        del self.hub.repositories[name]
        self.answer_json({})

    def _of_repository(self, name: str, rest: list[str]) -> None:
        method, first = self.command, rest[0] if rest else ""
        if method == "GET":
            repository = self._repository(name)
            if not rest or (first == "revision" and len(rest) == 2):
                self._info(repository, self._commit(repository, rest[1] if rest else "main"))
                return
            if first == "tree" and len(rest) >= 2:
                self._tree(repository, self._commit(repository, rest[1]), "/".join(rest[2:]))
                return
            if rest == ["refs"]:
                self._refs(repository)
                return
            if first == "commits" and len(rest) == 2:
                self._history(repository, rest[1])
                return
        elif method == "POST" and first == "paths-info" and len(rest) == 2:
            repository = self._repository(name)
            commit = self._commit(repository, rest[1])
            asked = parse_qs(self.message().decode())
            files = [_entry(path, commit.files[path]) for path in asked.get("paths", []) if path in commit.files]
            self.answer_json(files)
            return
        elif method == "POST" and first == "preupload" and len(rest) == 2:
            self._preupload(self._repository(name, write=True), rest[1])
            return
        elif method == "POST" and first == "commit" and len(rest) == 2:
            self._take_commit(self._repository(name, write=True), rest[1])
            return
        elif first in ("branch", "tag") and len(rest) == 2 and method in ("POST", "DELETE"):
            self._name(self._repository(name, write=True), first, rest[1])
            return
        elif method == "PUT" and rest == ["settings"]:
            wanted = self.json_message()
            repository = self._repository(name, write=True)
            repository.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.answer_json({"private": repository.private})
            return
        self._unknown()

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.commits[commit]

    def _info(self, repository: Repository, commit: Commit) -> None:
        siblings = []
        for path, blob in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": blob.size, "blobId": blob.oid}
                if blob.large:
                    entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
            siblings.append(entry)
        self.answer_json(
            {
                "_id": commit.id[:24],
                "id": repository.name,
                "modelId": repository.name,
                "author": repository.name.split("/")[0],
                "sha": commit.id,
                "lastModified": _date(commit),
                "createdAt": _date(commit),
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repository: Repository, commit: Commit, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound", f"no folder {folder}")
        deep = self.asked_for("recursive")
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in inside.items():
            steps = path[len(prefix) :].split("/")
            for depth in range(1, len(steps) if deep else min(2, len(steps))):
                directory = prefix + "/".join(steps[:depth])
                entries.setdefault(directory, {"type": "directory", "path": directory, "oid": "0" * 40, "size": 0})
            if deep or len(steps) == 1:
                entries[path] = _entry(path, blob)
        if self.asked_for("expand"):
            last = {"id": commit.id, "title": commit.message, "date": _date(commit)}
            entries = {path: {**entry, "lastCommit": last} for path, entry in entries.items()}
        page = min(int(self.query.get("limit", self.hub.page)), self.hub.page)
        start = int(self.query.get("cursor", 0))
        rows = list(entries.values())
        headers = {}
        if start + page < len(rows):
            following = urlencode({**self.query, "cursor": start + page})
            headers["Link"] = f'<{self.hub.url}{self.path.partition("?")[0]}?{following}>; rel="next"'
        self.answer_json(rows[start : start + page], headers=headers)

    def _refs(self, repository: Repository) -> None:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": []}
        for name, commit in repository.refs.items():
            kind, prefix = ("tags", "refs/tags/") if name in repository.tags else ("branches", "refs/heads/")
            found[kind].append({"name": name, "ref": prefix + name, "targetCommit": commit})
        self.answer_json({**found, "converts": [], "pullRequests": []})

    def _history(self, repository: Repository, revision: str) -> None:
        self._commit(repository, revision)
        authors = [{"user": "user"}]
        self.answer_json(
            [
                {"id": c.id, "title": c.message, "message": c.description, "date": _date(c), "authors": authors}
                for c in repository.history(revision)
            ]
        )

    def _name(self, repository: Repository, kind: str, name: str) -> None:
        wanted = self.json_message() if self.command == "POST" else {}
        if self.command == "DELETE":
            if repository.refs.pop(name, None) is None:
                raise Refusal(404, "RevisionNotFound", f"no {kind} {name}")
            repository.tags.discard(name)
        else:
            # A tag is put on the revision that the address names, a branch is what it names.
            start = name if kind == "tag" else wanted.get("startingPoint") or "main"
            target = wanted.get("tag") if kind == "tag" else name
            if not target or target in repository.refs:
                raise Refusal(409, "Conflict", f"{kind} {target} exists already")
            repository.refs[target] = self._commit(repository, start).id
            if kind == "tag":
                repository.tags.add(target)
        self.answer_json({})

    # Files, down and up.

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        commit = self._commit(repository, revision)
        if repository.gated:
            raise Refusal(403 if self.token else 401, "GatedRepo", f"access to {repository.name} is restricted")
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "EntryNotFound", f"no file {path}", {"X-Repo-Commit": commit.id})
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if not blob.large:
            self.answer_file(self.hub.blobs.path(blob.sha256), {**headers, "ETag": f'"{blob.oid}"'})
            return
        headers |= {
            "X-Linked-Size": str(blob.size),
            "X-Linked-ETag": f'"{blob.sha256}"',
            "ETag": f'"{blob.oid}"',
            "Location": signed(self.hub, "GET", f"blobs/{blob.sha256}"),
        }
        self.answer_bytes(302, [], 0, headers)

    def _preupload(self, repository: Repository, revision: str) -> None:
        wanted = self.json_message()
        asked = wanted.get("files", [])
        there = self._commit(repository, revision).files if repository.commits else {}
        patterns = wanted.get("gitIgnore")
        if patterns is None and ".gitignore" in there:
            patterns = self.hub.blobs.path(there[".gitignore"].sha256).read_text("utf-8")
        answers = []
        for file in asked:
            path = path_in_repository(str(file["path"]))
            mode = "lfs" if is_large(path, int(file["size"])) else "regular"
            ignored = is_ignored(path, patterns or "")
            oid = None
            if path in there:
                oid = there[path].sha256 if there[path].large else there[path].oid
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self.answer_json({"files": answers})

    def _batch(self, name: str) -> None:
        wanted = self.json_message()
        upload = wanted.get("operation") == "upload"
        repository = self._repository(name, write=upload)
        shared = {blob.sha256 for commit in repository.commits.values() for blob in commit.files.values()}
        objects = []
        for item in wanted.get("objects", []):
            sha256, size = str(item["oid"]), int(item["size"])
            answer: dict[str, Any] = {"oid": sha256, "size": size}
            if upload:
                if not self.hub.blobs.has(sha256):
                    answer["actions"] = upload_actions(self.hub, sha256, size)
            elif sha256 in shared:
                answer["actions"] = {"download": {"href": signed(self.hub, "GET", f"blobs/{sha256}")}}
            else:
                answer["error"] = {"code": 404, "message": "no such object"}
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    def _lfs(self, parts: list[str]) -> None:
        wanted = self.json_message()
        sha256 = str(wanted.get("oid"))
        if parts == ["verify"]:
            self._may_write()
            if not self.hub.blobs.has(sha256) or self.hub.blobs.size(sha256) != wanted.get("size"):
                raise Refusal(404, "NotFound", f"no bytes {sha256} of that size")
        elif parts == ["complete"]:
            numbered = sorted((int(part["partNumber"]), str(part["etag"]).strip('"')) for part in wanted["parts"])
            join_parts(self.hub.blobs, self.hub.parts, sha256, [name for _, name in numbered])
        else:
            self._unknown()
        self.answer_json({})

    def _take_commit(self, repository: Repository, revision: str) -> None:
        if revision in repository.tags or revision in repository.commits:
            raise Refusal(400, "BadRequest", f"{revision} is no branch")
        commit = apply_commit(repository, self.message().splitlines(), revision)
        url = f"{self.hub.url}/{quote(repository.name)}/commit/{commit}"
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _date(commit: Commit) -> str:
    return commit.time.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    lfs: Mapping[str, Any] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return {"type": "file", "path": path, "oid": blob.oid, "size": blob.size, **({"lfs": lfs} if blob.large else {})}
