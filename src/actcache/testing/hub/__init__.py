"""A small Hub on the loopback interface: repositories of models and datasets with commits, LFS files and tokens.

It answers what the unmodified `huggingface_hub` asks when it lists, downloads and uploads, so that tests can drive the
real client without a network. The client reads its address once, at import: run it in a process of its own, with
`LoopbackHub.environment`.

Like the real one it keeps large files elsewhere: they are sent to and fetched from a second origin, by signed addresses
that refuse a token of the Hub. What it cannot do is Xet: the environment says so to the client, which then uploads LFS.
"""

from __future__ import annotations

from actcache.testing.hub.exchange import Fault, Request
from actcache.testing.hub.repositories import Blob, Commit, Repository
from actcache.testing.hub.server import LoopbackHub

__all__ = ["Blob", "Commit", "Fault", "LoopbackHub", "Repository", "Request"]
