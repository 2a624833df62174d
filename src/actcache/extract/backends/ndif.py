"""Extraction at NDIF, or another server that speaks its protocol, through nnsight's client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from actcache.config import remote_patience
from actcache.derive.results import NOTHING, Asked
from actcache.errors import (
    ActCacheError,
    EngineError,
    EngineUnavailableError,
    OptionError,
    SiteUnavailableError,
    TransientEngineError,
)
from actcache.extract.backends import Reduction, Setting
from actcache.extract.backends.nnsight import WHY, model_key, reading_of, require_nnsight, shipped_session, wrap
from actcache.model.plain import require_plain
from actcache.model.remote import RemoteSource
from actcache.model.sites import Site
from actcache.store.files import log

if TYPE_CHECKING:
    import torch

    from actcache.extract.backends.shipped import ShippedSession

NDIF = "https://api.ndif.us"


def address(remote: bool | str) -> str:
    """The server that `remote` names: an address, or for True that of ``NDIF_HOST``, else NDIF's.

    Raises `OptionError` for what is no address, or has more in it: it is stored with what comes from there.
    """
    given = remote if isinstance(remote, str) else os.environ.get("NDIF_HOST") or NDIF
    parts = urlsplit(given)
    if "@" in parts.netloc or parts.query or parts.fragment:
        where = "remote=" if isinstance(remote, str) else "the environment variable NDIF_HOST"
        raise OptionError(
            f"{where} holds a user, a password or a query, which would be stored: give 'https://host[:port]' alone, "
            "and the key in NDIF_API_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        said = f"remote={given!r}" if isinstance(remote, str) else f"the environment variable NDIF_HOST is {given!r}"
        raise OptionError(f"{said}: expected True, False, or the address of a server, 'https://host[:port]'.")
    return given.rstrip("/")


class NDIFBackend:
    """Runs a model at a server. Its weights are known by name only, so that its values are kept apart."""

    device = "remote"
    retries = 3

    def __init__(self, setting: Setting) -> None:
        assert isinstance(setting.source, RemoteSource)
        self._source = setting.source
        self._host = address(setting.remote)
        self._named = isinstance(setting.remote, str)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"name": "nnsight", "host": self._host}

    def check(self, sites: Sequence[str], asked: Asked = NOTHING) -> None:
        for site in sites:
            require_plain(Site.parse(site), WHY)
        require_nnsight()
        self._key()
        remote_patience()
        if not self._source.predicts_next():
            raise SiteUnavailableError(
                f"{self._source.name!r} is no causal language model, and nothing else is asked of servers of NDIF: run "
                "it here (remote=False)."
            )
        if self._source.batch_policy().forget_lengths:
            raise SiteUnavailableError(
                f"{self._source.name!r} remembers the longest prompt it has seen, and with it its values change: at a "
                "server that others use too they would not be those of the prompt. Run it here (remote=False)."
            )

    def _key(self) -> str:
        from nnsight import CONFIG

        # Files that hold one often end in a newline.
        key = (os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY or "").strip()
        if not (key.isascii() and key.isprintable()):
            # Who is given it says so in words that have it in them.
            raise EngineUnavailableError("NDIF_API_KEY holds characters that no key has: set it again.")
        if not key and not self._named:
            raise EngineUnavailableError(
                "remote=True needs a key of NDIF: set the environment variable NDIF_API_KEY (https://login.ndif.us), "
                "or store it with nnsight.CONFIG.set_default_api_key(...)."
            )
        return key

    @contextmanager
    def session(self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING) -> Iterator[ShippedSession]:
        self.check(sites, asked)
        from actcache.extract.backends.wire import wire

        source = self._source
        reading = reading_of(source.anatomy(), sites)
        key, name = self._key(), _canonical(source)
        trusted = source.options.trust_remote_code
        env = {"attn_implementation": source.attn_implementation}

        def send(block: Callable[[Any], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            carrier = wire(model_key(name, source.revision, trusted=trusted), host=self._host, api_key=key, env=env)
            try:
                return block(carrier)
            except ActCacheError:
                raise
            except Exception as error:
                raise told(error, self._host, source.name, key) from error

        skeleton = source.skeleton
        yield shipped_session(wrap(skeleton), send, skeleton, source.batch_policy(), reduction, asked, reading)


def _canonical(source: RemoteSource) -> str:
    """The name under which servers know the model: the Hub's own spelling, where the Hub can be asked."""
    if source.commit is None:
        return source.name
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        try:
            return str(HfApi(token=source.options.token).model_info(source.name, timeout=10).id)
        except Exception as error:
            log.info("the Hub did not say how %s is spelt: %s", source.name, error)
    return source.name


def told(error: Exception, host: str, model: str, key: str) -> Exception:
    """What went wrong between here and the server, in our words: whether it may pass, and what to do."""
    import httpx
    import torch
    import websocket
    from nnsight.intervention.backends.remote import RemoteError

    said = f"{type(error).__name__}: {error}"
    said = said.replace(key, "***") if key else said
    status = None
    cause: BaseException | None = error
    while cause is not None and status is None:
        if isinstance(cause, httpx.HTTPStatusError):
            status = cause.response.status_code
        elif isinstance(cause, websocket.WebSocketBadStatusException):
            status = cause.status_code
        cause = cause.__cause__
    if status in (401, 403):
        return EngineUnavailableError(f"{host} refuses the key in NDIF_API_KEY ({said}): check it, or ask for another.")
    if status is not None and status < 500 and status not in (408, 425, 429):
        return EngineUnavailableError(
            f"{host} refuses requests for {model!r} ({said}): see https://nnsight.net/status/ for what it serves."
        )
    if status is not None:
        return TransientEngineError(f"{host} is out of order or busy ({said})")
    if isinstance(error, RemoteError) and not isinstance(error.__cause__, httpx.HTTPError):
        if "OutOfMemoryError" in said or "out of memory" in said:
            return torch.OutOfMemoryError(said)
        return EngineError(f"{host} reports that the batch failed there: {said}")
    reached = not isinstance(error, ConnectionRefusedError | httpx.ConnectError) and not isinstance(
        error.__cause__, httpx.ConnectError
    )
    return TransientEngineError(f"the connection to {host} failed ({said})", unreachable=not reached or _unnamed(error))


def _unnamed(error: Exception) -> bool:
    """Whether the host has no address."""
    import socket

    import websocket

    return isinstance(error, socket.gaierror | websocket.WebSocketAddressException)
