"""CachedExtractor: only what is missing is computed, and every finished batch is kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.derive.results import NOTHING, Asked
from actcache.errors import ModelChangedError, OptionError
from actcache.extract.answer import Lookup, Question
from actcache.extract.backends import DRY_RUN, RESULT, Remote
from actcache.extract.declared import check_edited
from actcache.extract.extractor import ActivationExtractor
from actcache.extract.given import Said, Unsaid
from actcache.extract.layouts import layout_name
from actcache.extract.lookup import look_up
from actcache.extract.plan import Plan, plan_of, remember_speed
from actcache.extract.prompts import (
    Prompt,
    PromptList,
    check_tokens,
    prompt_table,
    read_prompts,
    text_context,
    tokenize,
)
from actcache.extract.questions import check_trust, question_of, with_imports
from actcache.extract.request import Filled, Request, partial_failure
from actcache.extract.results import ResultsFound, ResultWriter, find_results
from actcache.extract.session import Session, Sessions
from actcache.progress import progress
from actcache.store.default import store_at
from actcache.store.files import log
from actcache.store.records import TOKENS, Records
from actcache.store.spaces import space_id

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.extract.batching import Batch
    from actcache.model.source import ModelIdentity
    from actcache.store.store import Store

# Rows that may wait for the disk; more would only be memory.
_QUEUE_BYTES = 32 << 20
# How long a finished batch may wait for company before it is made durable.
_LINGER_SECONDS = 0.05


class CachedExtractor:
    """An `ActivationExtractor` with a store behind it.

    Args:
        extractor: what to compute; its `positions` must be ``"all"``.
        store: an `ac.Store`, a folder, or None for the default store.
        allow_inf: store prompts of which a finite value becomes inf in the store's dtype; else they are refused.
        trust_names: take what was imported, or pulled, under the model's name where its own activations are missing;
            a string: under that name, since this model is that one.

    Raises:
        OptionError: an extractor of some positions, or one that only says what it would send.
    """

    def __init__(
        self,
        extractor: ActivationExtractor,
        store: Store | str | Path | None = None,
        *,
        allow_inf: bool = False,
        trust_names: bool | str = False,
    ) -> None:
        if not (isinstance(extractor.reduction.positions, str) and extractor.reduction.positions == "all"):
            raise OptionError(
                f"positions={extractor.reduction.positions!r} cannot be cached: keep positions='all' here and choose "
                "positions when reading (get_activations(..., positions=...))."
            )
        if extractor.remote == DRY_RUN:
            raise OptionError(f"remote={DRY_RUN!r} is a dry run of what would be sent, and nothing of it is stored.")
        self.extractor = extractor
        self.layout = layout_name(extractor.reduction.pooling)
        self._store = store_at(store)
        self._sessions = Sessions(self._store)
        self.allow_inf = allow_inf
        self.trust_names = check_trust(trust_names)

    @property
    def store(self) -> Store:
        """Where activations are kept; for the time of a request that must not be stored, its own place in memory."""
        current = self._sessions.current
        return self._store if current is None else current.store

    @property
    def keeps(self) -> bool:
        """Whether the store keeps anything: a limit of 0 means that it does not."""
        return bool(self._store.limit.value != 0)

    def session(self, max_retries: int | None = None) -> contextlib.AbstractContextManager[Session]:
        """Around one request, from looking up to reading: its prompts stay readable however small the limit is.

        Afterwards the store is brought below its limit when something was added. `max_retries`: how often a batch that
        fails is tried again; None for what suits the backend.
        """
        return self._sessions.open(max_retries)

    def at(self, remote: Remote | None) -> CachedExtractor:
        """The same with its model there; itself where it is so already, or for None. Raises `OptionError`."""
        extractor = self.extractor.at(remote)
        if extractor is self.extractor:
            return self
        return type(self)(extractor, self._store, allow_inf=self.allow_inf, trust_names=self.trust_names)

    def extract(
        self,
        prompts: Prompt | Iterable[Prompt],
        remote: Remote | None = None,
        invalidate_cache: bool = False,
        max_retries: int | None = None,
        cache_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(activations [B, S, L*D], mask [B, S])`, sites side by side, right-padded with zeros, bool mask.

        Pooled extractors give `S = 1`. Only what is missing is computed; every finished batch survives a kill.

        Args:
            remote: where the model runs, as `ActivationExtractor` takes it; None for what the extractor says.
            invalidate_cache: forget what is stored for these prompts first, and compute it again.
            max_retries: how often a batch that fails is tried again, after 2, 4, 8 s and so on; None for 3 remote, and
                0 here.
            cache_only: compute and store, return None.

        Raises:
            PartialWarmupError: some prompts could not be computed; the others are stored.
            EngineUnavailableError: what runs the model cannot be reached; what was finished is stored.
        """
        here = self.at(remote)
        if cache_only and not here.keeps:
            return None
        with here.session(max_retries):
            return here._extract(prompts, invalidate_cache=invalidate_cache, cache_only=cache_only)

    def _extract(
        self, prompts: Prompt | Iterable[Prompt], *, invalidate_cache: bool, cache_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        from actcache.extract.arrays import to_torch

        names = self.extractor.sites
        read = prompts if isinstance(prompts, PromptList) else read_prompts(prompts)
        request = self.request(read, names)
        if invalidate_cache:
            # What cannot be computed again is not thrown away.
            self.store.check_writable()
            self.extractor.backend().check(names)
            self.invalidate(request)
            request = self.request(read, names, own=True)
        filled = self.fill(request)
        if filled.failed:
            raise partial_failure(filled, read, stats=filled)
        if cache_only:
            return None
        answer = self.request(read, names).lookup if filled.ran else request.lookup
        if self.layout == TOKENS:
            values, mask = answer.padded()
            return to_torch(values), to_torch(mask)
        import torch

        pooled = self.pooled(answer, read)
        return to_torch(pooled[:, None]), torch.ones(len(pooled), 1, dtype=torch.bool)

    def pooled(self, answer: Lookup, prompts: PromptList) -> npt.NDArray[Any]:
        """The pooled vectors of `prompts` with their sites side by side, ``[B, sum of widths]``, out of their
        `answer`."""
        if answer.one_width:
            return answer.pooled().reshape(len(prompts), -1)
        # Site by site: each array has one width.
        names = answer.question.names
        each = [answer.of_site(name).pooled()[:, 0] for name in names]
        return np.concatenate(each, axis=1)

    def request(
        self,
        prompts: Prompt | Iterable[Prompt] | PromptList,
        names: Sequence[str],
        *,
        check: bool = True,
        asked: Asked = NOTHING,
        of_all: bool = True,
        own: bool = False,
    ) -> Request:
        """Look `prompts` up; nothing is computed, nothing written.

        `asked`: results that are to be there too; without `of_all` only of those prompts that lack activations. `own`:
        what others have computed does not count.

        Raises:
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run.
        """
        source, special = self.extractor.source, self.extractor.add_special_tokens
        read = prompts if isinstance(prompts, PromptList) else read_prompts(prompts)
        context = self.text_context(read)
        space = space_id(source.identity().values)
        question = with_imports(self._question(space, names, self.layout, check, own=own), self.extractor)
        with self.store.looking_once():
            lookup = look_up(question, read, source, context, add_special_tokens=special)
            of = np.arange(len(read)) if of_all else np.flatnonzero(~lookup.found)
            results = find_results(question, asked, read, of, source, context, add_special_tokens=special)
        absent = np.flatnonzero(~(lookup.found & results.found)).tolist()
        if absent:
            check_tokens(read, absent, source)
            check_edited(read, absent, self.extractor.edits)
        missing: dict[tuple[tuple[str, ...], Asked], list[int]] = {}
        seen: set[bytes] = set()
        for i in absent:
            ids = read.ids[i]
            assert ids is not None
            if ids.tobytes() not in seen:
                seen.add(ids.tobytes())
                missing.setdefault((lookup.missing.get(i, ()), results.missing(i)), []).append(i)
        log.info("%d of %d prompts are stored, in space %s", len(read) - len(absent), len(read), space)
        return Request(read, lookup, space, context, missing, results)

    def _question(
        self, space: str, names: Sequence[str], layout: str, check: bool = True, own: bool = False
    ) -> Question:
        return question_of(
            self.extractor, self.store, space, names, layout, check=check, trust_names=self.trust_names, own=own,
            added=self.note_added,
        )  # fmt: skip

    def look_up(
        self, prompts: PromptList, names: Sequence[str], layout: str, *, check: bool = True, own: bool = False
    ) -> Lookup:
        """Where columns `names` of `layout` are stored for `prompts`, imports aside; `own`: by this model's runs."""
        source, special = self.extractor.source, self.extractor.add_special_tokens
        question = self._question(space_id(self.identity().values), names, layout, check, own=own)
        return look_up(question, prompts, source, self.text_context(prompts), add_special_tokens=special)

    def find_results(self, prompts: PromptList, asked: Asked) -> ResultsFound:
        """Which of `prompts` have what is `asked`."""
        source, special = self.extractor.source, self.extractor.add_special_tokens
        question = self._question(space_id(self.identity().values), (), self.layout)
        context, everything = self.text_context(prompts), np.arange(len(prompts))
        return find_results(question, asked, prompts, everything, source, context, add_special_tokens=special)

    def text_context(self, prompts: PromptList) -> str:
        """What besides their texts decides the tokens of `prompts`; empty when no text is among them."""
        source, special = self.extractor.source, self.extractor.add_special_tokens
        return text_context(source, add_special_tokens=special) if prompts.any_text else ""

    def identity(self) -> ModelIdentity:
        """The model's, as it was when it was first asked for in a session: of a model in memory it takes a look at all
        weights. What is stored is confirmed."""
        current = self._sessions.current
        known = (current and current.identity) or self.extractor.source.identity()
        if current is not None:
            current.identity = known
        return known

    def note_added(self) -> None:
        """Within a session: something was stored, so that the store may have grown beyond its limit."""
        if self._sessions.current is not None:
            self._sessions.current.added = True

    @contextlib.contextmanager
    def adding_results(self) -> Iterator[ResultWriter]:
        """What takes results of this model that are computed elsewhere than in its passes."""
        identity = self.identity()
        self.store.check_writable()
        space = self.store.open_space(identity.values, identity.label)
        with self.session(), ResultWriter(self.store, space) as writer:
            self.note_added()
            yield writer

    def plan(self, request: Request) -> Plan:
        """What filling `request` would cost."""
        return plan_of(self.extractor, self.store, request, self.layout, limit=self._store.limit.value)

    def say(self, request: Request, said: Said) -> Unsaid | None:
        """What is new of what is `said` of the prompts of `request`, None for nothing. It is stored of those that are
        stored; `fill` takes the rest."""
        if not said:
            return None
        unsaid = Unsaid(self.store, request, said)
        if len(unsaid.of_stored):
            with self.adding_results() as writer:
                unsaid.put(writer, unsaid.of_stored)
        return unsaid

    def fill(
        self, request: Request, unsaid: Unsaid | None = None, taken: Callable[[Records], object] | None = None
    ) -> Filled:
        """Compute and store what `request` lacks; a batch that fails is noted and the rest goes on.

        `unsaid`: what is to be stored with the prompts that were not. `taken` is given the records of every batch that
        is to be stored, and ends the run by what it raises.

        Raises:
            DiskFullError, StoreAccessError: what was finished before stays stored.
        """
        from actcache.extract.arrays import records_of

        filled = Filled()
        retries = self._sessions.current.max_retries if self._sessions.current is not None else None
        if not request.missing:
            return filled
        self.store.check_writable()
        self.plan(request).require_room(self.store.disk)
        self._check_backend(request)
        source = self.extractor.source
        start = time.perf_counter()
        identity = source.identity()
        space = self.store.open_space(identity.values, identity.label)
        with (
            self.store.writer(space, max_bytes=_QUEUE_BYTES, linger=_LINGER_SECONDS) as writer,
            ResultWriter(self.store, space) as results,
            progress(request.to_compute, f"extracting {Path(source.name).name}") as bar,
        ):
            for (names, wanted), members in request.missing.items():
                asked = wanted
                if asked.perplexity and not source.predicts_next(certain=True):
                    asked = replace(asked, perplexity=False)
                if not names and not asked:
                    continue
                table = prompt_table(request.prompts, members, request.text_context)

                def failed(batch: Batch, error: Exception, members: list[int] = members) -> None:
                    reason = f"{type(error).__name__}: {error}"
                    filled.failed += [(members[i], reason) for i in batch.indices]

                ids = [table.tokens(i) for i in range(len(members))]
                confirmed = False
                for batch, rows in self.extractor.batches(ids, names, failed, asked=asked, max_retries=retries):
                    if not confirmed:
                        self.confirm(identity.values)
                        confirmed = True
                    prompts = table.select(list(batch.indices))
                    vectors = None
                    if names:
                        records = records_of(prompts, self.layout, {name: rows[name] for name in names})
                        kept, refused = self.store.screen(records, allow_inf=self.allow_inf)
                        filled.failed += [(members[batch.indices[r.prompt]], f"{r}") for r in refused]
                        if kept is not None:
                            vectors = writer.put(kept)
                            if taken is not None:
                                taken(kept)
                            filled.extracted += len(kept.prompts)
                            filled.bytes_written += kept.stored_bytes + kept.scale_bytes
                            if unsaid is not None:
                                unsaid.put(results, kept.prompts, after=vectors)
                    if asked:
                        found = {k.removeprefix(RESULT): rows[k] for k in rows if k.startswith(RESULT)}
                        filled.bytes_written += results.put(prompts, asked, found, after=vectors)
                        filled.perplexity += len(prompts) if asked.perplexity else 0
                        filled.logits += len(prompts) if asked.logits else 0
                    filled.ran += len(prompts)
                    filled.tokens += sum(len(ids[i]) for i in batch.indices)
                    bar.update(len(batch.indices))
                    self.note_added()
            writer.flush()  # The results, which are finished first, do not wait for what lingers.
        filled.seconds = time.perf_counter() - start
        remember_speed(space, self.extractor.backend().device, filled.tokens, filled.seconds)
        return filled

    def _check_backend(self, request: Request) -> None:
        """Raise what makes it impossible to compute anything, before anything is."""
        for names, asked in request.missing:
            self.extractor.backend().check(names, asked)

    def confirm(self, values: Mapping[str, Any]) -> None:
        """Raise `ModelChangedError` where the model was replaced between its identification and its first batch."""
        if self.extractor.source.identity().values != values:
            raise ModelChangedError(
                f"the model {self.extractor.source.name!r} was replaced while this run began: "
                "nothing of it was stored, run again."
            )

    def invalidate(self, request: Request) -> None:
        """Forget what is stored for the prompts of `request`, whatever its layout."""
        prompts, identity = request.prompts, self.identity()
        everything = list(range(len(prompts)))
        tokenize(prompts, everything, self.extractor.source, add_special_tokens=self.extractor.add_special_tokens)
        space = self.store.open_space(identity.values, identity.label)
        self.store.invalidate(space, prompt_table(prompts, everything, ""))
