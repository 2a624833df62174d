"""The part of `UnifiedCache` that gives: activations, and what follows from them, perplexity, logits, the lens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from actcache.derive.results import Asked, LogitsAsked
from actcache.errors import OptionError, ResultsNotCachedError
from actcache.extract.backends import Remote
from actcache.extract.extractor import chosen_sites
from actcache.extract.given import said_of
from actcache.extract.lens import ask_for_lens, stored_lens
from actcache.extract.prompts import Prompt, PromptList, read_prompts
from actcache.extract.reading import (
    CachedLogits,
    compute_results,
    no_logits,
    no_perplexity,
    read_logits,
    read_perplexity,
    read_token_perplexity,
)
from actcache.store.reading import converted, reading_dtype
from actcache.store.records import LABEL, METADATA

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from actcache.capture.lens import LogitLens
    from actcache.extract.cached import CachedExtractor
    from actcache.extract.request import Request

Answer = tuple["torch.Tensor", "torch.Tensor | None"]
# "What the cache was made for", where None means something else.
_OWN: Any = object()
T = TypeVar("T")


class Results(ABC):
    """Activations, perplexity, logits and logit lens of prompts, out of `cached`.

    Attributes: `_asked` is what a warm-up computes, `_logits` which logits are meant when nothing is said.
    """

    cached: CachedExtractor
    cache_pooled: bool
    _asked: Asked
    _logits: LogitsAsked

    @abstractmethod
    def _at(self, remote: Remote | None) -> Self:
        """The same cache with its model there. Raises `OptionError`."""

    @abstractmethod
    def _sequences(self, prompts: PromptList) -> PromptList:
        """What goes through the model for `prompts`."""

    @abstractmethod
    def _compute(self, prompts: PromptList) -> None:
        """Run the model for `prompts`, and store all that is asked of it."""

    @abstractmethod
    def _placed(self, prompts: PromptList, positions: Any) -> tuple[PromptList, Any]:
        """What goes through the model for `prompts`, and `positions` of it in numbers. In a session.

        Raises `OptionError` for what can be no position."""

    @abstractmethod
    def _stored(self, prompts: PromptList, names: Sequence[str]) -> Request:
        """`prompts` with the columns `names` computed where they were missing, and looked up."""

    def get_activations(
        self,
        prompts: Prompt | Iterable[Prompt],
        remote: Remote | None = None,
        *,
        site: str | None = None,
        layers: Any = None,
        positions: Any = None,
        dtype: Any = None,
        max_retries: int | None = None,
    ) -> Answer | dict[str, Answer]:
        """Activations of `prompts`, computed first where they are missing.

        Args:
            remote, max_retries: as `warmup` takes them.
            site: which of `sites`; needed only when there are several, without it a dict per site is returned.
            layers: some of this cache's layers, in the order wanted; None for all of them.
            positions: for full sequences: which real tokens (`"last"`, an int, ``(start, stop)``, a list of these;
                or a list of lists, one for each prompt); of chats `ac.tokens_of`, which needs no weights either; with
                ``generate=`` also ``"prompt"`` and ``"completion"``.
            dtype: floating dtype of the result; None for the one they are stored in (float32 for int8 and
                float8_e4m3). What is stored, and what is computed, stays as it is.

        Returns:
            Pooled: ``(tensor [B, L*D], None)``. Full sequences: ``(tensor [B, S, L*D], mask [B, S])``, right-padded
            with zeros. Layers lie side by side in the order asked.

        Raises:
            OptionError: `dtype` is not floating (nothing is computed).
            ValueOverflowError: a finite value would become inf in `dtype`, without ``allow_inf``.
        """
        if (there := self._at(remote)) is not self:
            return there.get_activations(
                prompts, site=site, layers=layers, positions=positions, dtype=dtype, max_retries=max_retries
            )
        wanted = reading_dtype(dtype)
        groups = chosen_sites(self.cached.extractor, site, layers)
        if positions is not None and self.cache_pooled:
            raise OptionError("positions= needs full sequences: make the UnifiedCache with cache_pooled=False.")
        everything = list(dict.fromkeys(name for names in groups.values() for name in names))
        with self.cached.session(max_retries):
            read, positions = self._placed(read_prompts(prompts), positions)
            request = self._stored(read, everything)
            if len(groups) == 1:
                return self._read(request, positions, wanted)
            # One pass computed them all; each site is read on its own, since widths may differ.
            return {
                group: self._read(self.cached.request(read, names), positions, wanted)
                for group, names in groups.items()
            }

    def _read(self, request: Request, positions: Any, dtype: torch.dtype | None) -> Answer:
        from actcache.extract.arrays import at_positions, to_torch

        mask = None
        if self.cache_pooled:
            values = to_torch(self.cached.pooled(request.lookup, request.prompts))
        elif positions is None:
            padded, real = request.lookup.padded()
            values, mask = to_torch(padded), to_torch(real)
        else:
            values, mask = at_positions(request.lookup.rows(), positions)
        if dtype is not None:
            name = partial(request.lookup.name_at, values.shape[-1])
            values = converted(values, dtype, allow_inf=self.cached.allow_inf, name=name)
        return values, mask

    def get_perplexity(
        self, prompts: Prompt | Iterable[Prompt], remote: Remote | None = None, *, max_retries: int | None = None
    ) -> npt.NDArray[np.float32]:
        """``[exp(mean c), exp(min c), exp(max c)]`` of each prompt, float32 ``[B, 3]``.

        ``c`` are the cross-entropies of its tokens but the first, each given those before it. A prompt of one token has
        ``[1, 1, 1]``; what is no float32 is the largest there is.

        Computed first, with the activations, where it is missing; `remote` and `max_retries` as `warmup` takes them.

        Raises:
            ResultsNotCachedError: it is not stored, and this cache was made with ``compute_perplexity=False``.
            SiteUnavailableError: a model that does not predict next tokens.
        """
        return self._at(remote)._perplexity(prompts, read_perplexity, max_retries)

    def get_token_perplexity(
        self, prompts: Prompt | Iterable[Prompt], remote: Remote | None = None, *, max_retries: int | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """``exp(c)`` of each token of each prompt but its first, a list of arrays ``[T - 1]``; as `get_perplexity`."""
        return self._at(remote)._perplexity(prompts, read_token_perplexity, max_retries)

    def _perplexity(
        self,
        prompts: Prompt | Iterable[Prompt],
        read: Callable[[CachedExtractor, PromptList], T | None],
        max_retries: int | None,
    ) -> T:
        with self.cached.session(max_retries):
            given = self._sequences(read_prompts(prompts))
            found = read(self.cached, given)
            if found is None and not self._asked.perplexity:
                raise ResultsNotCachedError(
                    "perplexity is not stored for every prompt: UnifiedCache(..., compute_perplexity=True) computes it "
                    "with the activations, compute_perplexity_from_cache(prompts) from stored full sequences."
                )
            if found is None:
                self._complete(given, Asked(perplexity=True))
                found = read(self.cached, given)
            if found is None:
                raise no_perplexity(self.cached.extractor.source.name)
            return found

    def get_logits(
        self,
        prompts: Prompt | Iterable[Prompt],
        remote: Remote | None = None,
        *,
        top_k: int | None = _OWN,
        positions: str = _OWN,
        max_retries: int | None = None,
    ) -> CachedLogits:
        """Logits of `prompts`: just those asked for, out of what holds them or all logits.

        Computed first, with the activations, where they are missing and this cache was made to store them.

        Args:
            remote, max_retries: as `warmup` takes them.
            top_k, positions: as `logit_top_k` and `logit_positions`, by default this cache's.

        Raises:
            ResultsNotCachedError: they are not stored, and this cache was not made to compute them.
        """
        if (there := self._at(remote)) is not self:
            return there.get_logits(prompts, top_k=top_k, positions=positions, max_retries=max_retries)
        asked = self._logits_asked(top_k, positions)
        with self.cached.session(max_retries):
            given = self._sequences(read_prompts(prompts))
            found = read_logits(self.cached, given, asked)
            if found is None and asked == self._asked.logits:
                self._complete(given, Asked(logits=asked))
                found = read_logits(self.cached, given, asked)
            if found is None:
                raise no_logits(asked)
            return found

    def get_labels(self, prompts: Prompt | Iterable[Prompt], remote: Remote | None = None) -> list[Any]:
        """The label of each prompt that ``warmup(prompts, labels=...)`` has stored, as it was given; None for none."""
        return self._at(remote)._said(prompts, LABEL)

    def get_metadata(
        self, prompts: Prompt | Iterable[Prompt], remote: Remote | None = None
    ) -> list[dict[str, Any] | None]:
        """The metadata of each prompt that ``warmup(prompts, metadata=...)`` has stored, None for none.

        They are as they were given; keys come in sorted order, tuples and arrays as lists.
        """
        return self._at(remote)._said(prompts, METADATA)

    def _said(self, prompts: Prompt | Iterable[Prompt], kind: str) -> list[Any]:
        with self.cached.session():
            given = self._sequences(read_prompts(prompts))
            request = self.cached.request(given, self.cached.extractor.sites, check=False)
            return said_of(self.cached.store, request, kind)

    def _logits_asked(self, top_k: Any, positions: Any) -> LogitsAsked:
        top_k = self._logits.top_k if top_k is _OWN else top_k
        positions = self._logits.positions if positions is _OWN else positions
        return LogitsAsked.checked(positions, top_k, self.cached.extractor.source.vocab_size)

    def _complete(self, prompts: PromptList, asked: Asked) -> None:
        """Run the model for the prompts that lack what is `asked`."""
        import numpy as np

        found = self.cached.find_results(prompts, asked)
        if asked.perplexity and not found.asked.perplexity:
            raise no_perplexity(self.cached.extractor.source.name)
        self._compute(prompts.select(np.flatnonzero(~found.found).tolist()))

    def compute_logits_from_cache(
        self,
        prompts: Prompt | Iterable[Prompt],
        positions: str = "last",
        top_k: int | None = None,
        device: str | None = None,
        batch_size: int = 64,
    ) -> int:
        """Store logits of `prompts` where they are missing, computed from their stored activations of the last layer.

        No forward pass: of a model that is not loaded only the final norm and the head are read from its files. The
        logits are those of the model as far as the activations are: what these lost in a narrow storage dtype is lost
        here. Vectors pooled as ``"last_token"`` serve ``positions="last"``.

        Returns:
            The number of different prompts that were computed.

        Raises:
            OptionError: the last layer is not among the cache's; a bad value.
            NotCachedError: activations that are not stored.
            SiteUnavailableError: a model without a head, or one whose head is not read by itself.
        """
        asked = Asked(logits=LogitsAsked.checked(positions, top_k, self.cached.extractor.source.vocab_size))
        with self.cached.session():
            given = self._sequences(read_prompts(prompts))
            return compute_results(self.cached, given, asked, batch_size=batch_size, device=device)

    def compute_perplexity_from_cache(
        self, prompts: Prompt | Iterable[Prompt], device: str | None = None, batch_size: int = 16
    ) -> int:
        """Store the perplexity of `prompts` where it is missing, computed from their stored activations of every token
        in the last layer, as `compute_logits_from_cache` does; the same return value and errors."""
        asked = Asked(perplexity=True)
        with self.cached.session():
            given = self._sequences(read_prompts(prompts))
            return compute_results(self.cached, given, asked, batch_size=batch_size, device=device)

    def logit_lens(
        self,
        prompts: Prompt | Iterable[Prompt],
        top_k: int = 5,
        *,
        layers: Any = None,
        positions: Any = None,
        site: str | None = None,
        tokens: Any = None,
        translators: Any = None,
        device: str | None = None,
        remote: Remote | None = None,
        max_retries: int | None = None,
    ) -> LogitLens:
        """What the model would predict if each layer were the last, from stored streams: see `LogitLens`.

        What is stored is read without the model, of which only the final norm and the head are read from its files (the
        model itself only where they are not read by themselves); what is missing is computed and stored first.

        Args:
            top_k: how many of the best tokens are kept of each layer and position.
            layers: some of this cache's layers, in the order wanted; None for all of them. The last layer must be among
                this cache's in any case, since final predictions follow from it.
            positions: as `get_activations` takes them; None for every token that this cache keeps. A cache of pooled
                vectors has ``"last"`` only, and that with ``pooling="last_token"``.
            site: ``"resid_post"`` (None), ``"resid_mid"`` or ``"resid_pre"``, among this cache's sites; of an
                encoder-decoder model the decoder's.
            tokens: ids, or texts that are one token each, whose ranks and probabilities are wanted.
            translators: what the stream is put through first (a tuned lens): by layer ``(weight [D, D], bias [D])``, a
                linear layer or a function, applied as they are; or the folder of a lens of the package tuned-lens,
                whose maps are added to the stream.
            device: where norm and head run when the model is not loaded.
            remote, max_retries: as `warmup` takes them.

        Raises:
            OptionError: a site, layer or position that this cache does not keep, a translator that does not fit.
            SiteUnavailableError: a model without a head, or one whose way to logits cannot be made out.
        """
        if (there := self._at(remote)) is not self:
            return there.logit_lens(
                prompts, top_k, layers=layers, positions=positions, site=site, tokens=tokens, translators=translators,
                device=device, max_retries=max_retries,
            )  # fmt: skip
        asked = ask_for_lens(self.cached, site, layers, positions)
        with self.cached.session(max_retries):
            given, places = self._placed(read_prompts(prompts), positions)
            return stored_lens(
                self.cached,
                given,
                asked,
                places,
                top_k=top_k,
                tokens=tokens,
                translators=translators,
                device=device,
                complete=self._stored,
            )
