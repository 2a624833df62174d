"""One request from looking up to reading: its prompts stay readable however small the limit of the store is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actcache.errors import PartialWarmupError
from actcache.extract.attempts import check_retries
from actcache.extract.scratch import scratch_folder, sweep_once
from actcache.store.files import log

if TYPE_CHECKING:
    from actcache.model.source import ModelIdentity
    from actcache.store.eviction import EvictionReport
    from actcache.store.store import Store


@dataclass
class Session:
    """What is known of a request that is under way.

    Attributes:
        store: where it keeps what it computes: the store, or a place in memory where the store keeps nothing.
        identity: the model's, once it was asked for.
        added: whether anything was stored, so that the store may have grown beyond its limit.
        max_retries: how often a batch that fails is tried again; None for what suits the backend.
        evicted: what keeping to the limit took when the request was over; None where nothing had to go.
    """

    store: Store
    identity: ModelIdentity | None = None
    added: bool = False
    max_retries: int | None = None
    evicted: EvictionReport | None = None


class Sessions:
    """The requests under way on one store, in each thread one at most: those within it are a part of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._local = threading.local()

    @property
    def current(self) -> Session | None:
        """The one of this thread; None between requests."""
        return getattr(self._local, "session", None)

    @contextlib.contextmanager
    def open(self, max_retries: int | None = None) -> Iterator[Session]:
        """Around one request. Afterwards the store is brought below its limit when something was added.

        `max_retries` is that of the request, and not of those within it."""
        check_retries(max_retries)
        if self.current is not None:
            yield self.current
            return
        sweep_once()
        with contextlib.ExitStack() as stack:
            session = Session(self._store, max_retries=max_retries)
            if self._store.limit.value == 0:
                session.store = self._store.beside(stack.enter_context(scratch_folder()))
                stack.callback(session.store.close)
            self._local.session = session
            try:
                yield session
            except PartialWarmupError:
                # All but a few prompts are stored.
                self._keep_limit(session)
                raise
            finally:
                del self._local.session
            self._keep_limit(session)

    def _keep_limit(self, session: Session) -> None:
        if session.added and session.store is self._store:
            try:
                session.evicted = self._store.keep_limit()
            except OSError as error:
                # The request has its answer.
                log.warning("the store could not be brought below its limit: %s", error)
