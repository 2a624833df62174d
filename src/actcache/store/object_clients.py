"""obstore's clients for one bucket, as one process holds them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from actcache.errors import OptionError
from actcache.store.aws import ENDPOINT_VARIABLES, Aws
from actcache.store.object_library import library, never_free

SLOWEST = 2 << 20
"""Bytes a second: what a transfer is given time for, before it is taken for one that hangs."""

PART = 64 << 20
"""The size of the pieces in which an object is put that is too large for one request."""

_CONNECT_S = 5.0
_SERVERS = {
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_PART_TRIES = 8
# obstore's own, which wins.
_UNSIGNED = "AWS_UNSIGNED_PAYLOAD"


def servers(scheme: str) -> list[str]:
    """What the environment says of where buckets of Google and of Azure are: URLs of servers, an account's name."""
    return [value for variable in _SERVERS.get(scheme, ()) if (value := os.environ.get(variable))]


class Clients:
    """The clients of one process for one bucket: those for short answers, and for uploads, which take their time.

    `pid` is the process they were made in. Threads share them. A forked child `abandon`s those it inherits.
    """

    def __init__(
        self, scheme: str, bucket: str, aws: Aws | None, anonymous: bool | None, timeout_s: float, longest_s: float
    ) -> None:
        self.pid = os.getpid()
        self.aws = aws
        self._scheme = scheme
        self._bucket = bucket
        self._anonymous = anonymous
        self._timeout_s = timeout_s
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._made: dict[tuple[str, int], Any] = {}
        self._credentials: Any = None
        self._library = library()

    @property
    def library(self) -> Any:
        """obstore's functions, which take a client first."""
        return self._library

    def reading(self) -> Any:
        """For answers that begin soon and keep coming."""
        # Asked for before each request.
        if (found := self._made.get(("read", 0))) is not None:
            return found
        stalls = {"read_timeout": timedelta(seconds=self._timeout_s), "timeout": timedelta(seconds=self._longest_s)}
        return self._client("read", 0, stalls, {"max_retries": 0})

    def writing(self, size: int, slower: int) -> Any:
        """For one request with a body of `size` bytes, `slower` times doubled the time that it may take."""
        # A server answers when it has all of the body: until then nothing comes, and only the whole can be timed.
        times = (1 + size / SLOWEST / self._timeout_s) * 2**slower
        # A client for each doubling, and none for a body that is small beside all else.
        doubled = max(0, math.ceil(math.log2(times) - 0.1))
        limit = {"timeout": timedelta(seconds=self._timeout_s * 2**doubled)}
        return self._client("write", doubled, limit, {"max_retries": 0})

    def writing_parts(self, deadline_s: float) -> Any:
        """For an upload in parts, of which each has to be tried again by itself."""
        limit = {"timeout": timedelta(seconds=self._timeout_s + 2 * PART / SLOWEST)}
        retries = {"max_retries": _PART_TRIES, "retry_timeout": timedelta(seconds=deadline_s)}
        return self._client("parts", int(deadline_s), limit, retries)

    def refresh(self) -> None:
        """See to it that credentials are valid; where they are others than before, there will be new clients."""
        if self.aws is not None and (valid := self.aws.refresh()) != self._credentials:
            self._credentials = valid
            self.renew()

    def renew(self) -> None:
        """Make new ones from now on: what is known of the place has changed."""
        with self._lock:
            self._made = {}

    def abandon(self) -> None:
        """In a child, never to free what threads of its parent were using."""
        never_free(self._made)

    def _client(self, use: str, tier: int, limits: Mapping[str, Any], retries: Mapping[str, Any]) -> Any:
        found = self._made.get((use, tier))
        if found is None:
            with self._lock:
                found = self._made.get((use, tier)) or self._make(dict(limits), dict(retries))
                self._made[use, tier] = found
        return found

    def _make(self, options: dict[str, Any], retries: dict[str, Any]) -> Any:
        options["connect_timeout"] = timedelta(seconds=min(_CONNECT_S, self._timeout_s))
        config: dict[str, Any] = {}
        if self._anonymous is not None:
            config["skip_signature"] = self._anonymous
        stores = self._library._store
        made = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}[self._scheme]
        options["allow_http"] = any(where.startswith("http://") for where in servers(self._scheme))
        extra = {} if self.aws is None else self._for_s3(self.aws, config, options)
        try:
            return made(self._bucket, config=config, client_options=options, retry_config=retries, **extra)
        except Exception as error:
            said = str(error).partition("\n\nDebug source:")[0]
            raise OptionError(f"cannot make a client for {self._scheme}://{self._bucket}: {said}") from None

    def _for_s3(self, aws: Aws, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        # obstore reads some of AWS's variables itself: what it should not find there, it is told.
        config |= {"region": aws.region, "disable_bulk_delete": True}
        endpoint = aws.endpoint
        if endpoint or any(variable in os.environ for variable in ENDPOINT_VARIABLES):
            where = endpoint or f"https://s3.{aws.region}.amazonaws.com"
            config |= {"endpoint": where, "aws_endpoint_url_s3": where}
            options["allow_http"] = where.startswith("http://")
        if authorities := aws.authorities:
            options["root_certificate"] = authorities
        config["skip_signature"] = self._credentials is None
        if _UNSIGNED not in os.environ:
            config["unsigned_payload"] = not aws.hashes_bodies
        return {} if config["skip_signature"] else {"credential_provider": aws.provide}
