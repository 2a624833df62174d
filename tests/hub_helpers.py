"""What a Hub of tests was asked, and the datasets that it has."""

from __future__ import annotations

from share_helpers import Published


def downloaded(hub, repo, folder, revision="main"):
    """A dataset as it is on the Hub, in a folder."""
    repository = hub.dataset(repo)
    for path in repository.files(revision):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(repository.read(path, revision))
    return Published(folder)


def puts(hub, since=0):
    """Digests of files that arrived whole."""
    found = [r for r in hub.requests[since:] if r.method == "PUT" and r.status == 200 and "/blobs/" in r.path]
    return [r.path.partition("?")[0].rpartition("/")[2] for r in found]


def changes(hub, since=0):
    """What was asked of the Hub beyond looking."""
    return [r for r in hub.requests[since:] if r.method not in ("GET", "HEAD")]
