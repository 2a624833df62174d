"""UnifiedCache: the researcher's front door. Prompts in, activations out; computed once, then read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from actcache.capture.positions import check_positions, each_prompt
from actcache.derive.results import Asked, LogitsAsked
from actcache.errors import OptionError, require_choice
from actcache.extract.cached import CachedExtractor
from actcache.extract.completions import Completion, Completions, check_settings, sequences_of
from actcache.extract.extractor import ActivationExtractor, chosen_sites
from actcache.extract.given import NOTHING_SAID, Said, checked, label_array, said_of
from actcache.extract.plan import Plan
from actcache.extract.prompts import Prompt, PromptList, positions_of, read_prompts
from actcache.extract.public import Results
from actcache.extract.request import Request, partial_failure
from actcache.extract.stats import WarmupStats, after_eviction, stats_of
from actcache.model.sites import POOLINGS
from actcache.store.files import log
from actcache.store.reading import converted, reading_dtype
from actcache.store.records import LABEL

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from actcache.capture.ready_made import ReadyMade
    from actcache.store.store import Store

Answer = tuple["torch.Tensor", "torch.Tensor | None"]


class UnifiedCache(Results):
    """Activations of one model: extracted where they are missing, read where they are stored.

    Args:
        model: Hub id, local folder, or a loaded transformers model (then pass `tokenizer`).
        layers: int, list of ints, ``"all"``, ``"last"`` or ``"middle"`` (the middle third); negative from the end.
        compute_perplexity: let `warmup` compute, in the same pass, the cross-entropy of every token (see
            `get_perplexity`). For that the whole model runs. Models that do not predict next tokens have none.
        remote: run the model elsewhere; no backend here does.
        pooling: how `cache_pooled` makes one vector of a prompt.
        cache_pooled: store one vector per prompt, site and layer; False stores every token's.
        cache_logits: let `warmup` store logits, computed in the same pass (see `get_logits`).
        logit_top_k, logit_positions: which logits: the largest so many (None: all), of the ``"last"`` token of a prompt
            or of ``"all"``.
        sites: names of `ac.sites(model)`; names without a layer are taken at every one of `layers` (of ``"all"`` and
            the ``"middle"`` at those that have the site). Heads lie side by side in a row. Those of an encoder-decoder
            model begin with their stack (``"encoder.resid_post"``); its decoder is given the prompt shifted right
            behind the start token, so that row ``i`` there is the state that predicts token ``i``.
        dtype: compute dtype; None means float32 (a loaded model keeps its own).
        device: where the model runs; ``"auto"`` takes an accelerator when there is one.
        batch_size: upper bound on prompts per batch; None leaves it to the token budget.
        max_batch_tokens: padded tokens per batch; None takes what suits the device.
        generate: settings such as ``dict(max_new_tokens=20, do_sample=True, seed=1)``: let the model continue each
            prompt, and extract prompt and completion as one sequence (see `get_completions`). What is not given is
            neutral: greedy, or drawn from all tokens; one prompt's draw does not depend on others.
        store: an `ac.Store`, a folder, or None for the default store.
        tokenizer, revision, attn_implementation, trust_remote_code, token, device_map, quantization_config,
            model_kwargs: as transformers takes them.
        add_special_tokens: whether text gets the tokenizer's special tokens.
        allow_hooks: names of hooks on a loaded model that are known not to change what is stored.
        allow_inf: store a prompt even where its values do not fit the store's dtype (they are read back as inf, of
            int8 and float8_e4m3 as nan); else it is refused, named, and the others are stored. So it is with dtypes
            that are asked for when reading.
        trust_names: take what was imported under this model's name (`actcache import`) where its own activations are
            missing. Nothing but the name says that they are this model's.
        edits: ready-made edits (`ac.ablate`, `ac.steer`, `ac.patch`, `ac.knockout`) to run the model with; what is
            stored is stored apart from what other edits, or none, give. They mean the same for every prompt.

    Raises:
        OptionError, ModelLoadError, UnknownSiteError, SiteUnavailableError, LayerRangeError: before any weights are
            read.
    """

    def __init__(
        self,
        model: Any,
        layers: Any = "all",
        compute_perplexity: bool = True,
        device: str = "auto",
        remote: bool = False,
        batch_size: int | None = 8,
        cache_pooled: bool = True,
        pooling: str = "last_token",
        backend: str = "local",
        dtype: Any = None,
        *,
        cache_logits: bool = False,
        logit_top_k: int | None = None,
        logit_positions: str = "last",
        sites: str | Sequence[str] = ("resid_post",),
        max_batch_tokens: int | None = None,
        store: Store | str | Path | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool = True,
        allow_hooks: Sequence[str] = (),
        allow_inf: bool = False,
        trust_names: bool = False,
        edits: ReadyMade | Sequence[ReadyMade] = (),
        generate: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(pooling):
            require_choice(pooling, POOLINGS, "pooling")
        if remote:
            raise OptionError(f"remote={remote!r}: backend {backend!r} runs the model here. Leave it out.")
        self.extractor = ActivationExtractor(
            model,
            tokenizer=tokenizer,
            sites=sites,
            layers=layers,
            pooling=pooling if cache_pooled else None,
            device=device,
            dtype=dtype,
            revision=revision,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            backend=backend,
            trust_remote_code=trust_remote_code,
            token=token,
            device_map=device_map,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            model_kwargs=model_kwargs,
            add_special_tokens=add_special_tokens,
            allow_hooks=allow_hooks,
            edits=edits,
        )
        self.cached = CachedExtractor(self.extractor, store, allow_inf=allow_inf, trust_names=trust_names)
        self.cache_pooled = cache_pooled
        self._logits = LogitsAsked.checked(logit_positions, logit_top_k, self.extractor.source.vocab_size)
        self._asked = Asked(compute_perplexity, self._logits if cache_logits else None)
        self._completions: Completions | None = None
        if generate is not None:
            self.extractor.source.generate = check_settings(generate, self.extractor)
            self._completions = Completions(self.cached, self.extractor.source.generate)

    @property
    def model_name(self) -> str:
        """What the model is called in the store."""
        return self.extractor.source.name

    @property
    def model_loaded(self) -> bool:
        """Whether the model's weights are in memory; a warm run never loads them."""
        return self.extractor.source.loaded

    @property
    def model(self) -> torch.nn.Module:
        """The model, loaded on first use."""
        return self.extractor.source.model()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        return self.extractor.source.tokenizer()

    @property
    def store(self) -> Store:
        """Where activations are kept."""
        return self.cached.store

    @property
    def sites(self) -> list[str]:
        """Every complete site name that is stored, in the order asked."""
        return self.extractor.sites

    def plan(self, prompts: Prompt | Iterable[Prompt]) -> Plan:
        """What `warmup(prompts)` would find, compute and write. No forward pass, nothing written.

        Completions that are to be generated count at their full length.
        """
        read = read_prompts(prompts)
        read = read if self._completions is None else self._completions.longest(read)
        return self.cached.plan(self.cached.request(read, self.extractor.sites, asked=self._asked))

    def warmup(
        self, prompts: Prompt | Iterable[Prompt], *, verify_cache: bool = True, labels: Any = None, metadata: Any = None
    ) -> WarmupStats:
        """Compute and store what is missing for `prompts`: activations, and the results this cache was made for.

        Every finished batch is stored at once and survives a kill; running again goes on where it stopped.

        Args:
            verify_cache: True also checks that what is stored is undamaged; False trusts the index.
            labels: a string, number, boolean or None (no label) for each prompt, stored with it: see `get_labels` and
                ``ac.activations(..., return_labels=True)``. They replace those stored before; without, these stay.
            metadata: likewise, a dict for each prompt, all with the same keys, or a dict of lists: see `get_metadata`.

        Raises:
            OptionError: labels or metadata that do not fit the prompts, or differ for the same prompt.
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run, before any is.
            DiskFullError, StoreAccessError: the store cannot take what is to be written.
            PartialWarmupError: some prompts failed; all others are stored.
        """
        read = read_prompts(prompts)
        said = checked(labels, metadata, len(read))
        if not self.cached.keeps:
            log.warning("the limit of the store is 0: nothing is stored, so there is nothing to warm up")
            return WarmupStats(len(read))
        with self.cached.session() as session:
            read = self._sequences(read)
            stats = self._warmup(read, self.extractor.sites, verify_cache=verify_cache, said=said)[0]
        if session.evicted is None:
            return stats
        # What cannot be had of this model is not gone.
        perplexity = self._asked.perplexity and stats.perplexity_cached + stats.perplexity_extracted > 0
        asked = replace(self._asked, perplexity=perplexity)
        left = self.cached.request(read, self.extractor.sites, check=False, asked=asked)
        return after_eviction(stats, left, session.evicted)

    def _stored(self, prompts: Any, names: Sequence[str]) -> Request:
        """`prompts` computed where they were missing, and looked up."""
        stats, request = self._warmup(prompts, names, of_all=False)
        return self.cached.request(request.prompts, names) if stats.activations_extracted else request

    def _warmup(
        self,
        prompts: Any,
        names: Sequence[str],
        *,
        verify_cache: bool = True,
        of_all: bool = True,
        said: Said = NOTHING_SAID,
    ) -> tuple[WarmupStats, Request]:
        """What was done, and the request as it was found before. Without `of_all` results are computed only of prompts
        that lack activations."""
        import time

        start = time.perf_counter()
        request = self.cached.request(prompts, names, check=verify_cache, asked=self._asked, of_all=of_all)
        filled = self.cached.fill(request, self.cached.say(request, said))
        stats = stats_of(request, filled, time.perf_counter() - start)
        if filled.failed:
            raise partial_failure(filled, request.prompts, stats=stats)
        return stats, request

    def get_activations(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        site: str | None = None,
        layers: Any = None,
        positions: Any = None,
        dtype: Any = None,
    ) -> Answer | dict[str, Answer]:
        """Activations of `prompts`, computed first where they are missing.

        Args:
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
        wanted = reading_dtype(dtype)
        groups = chosen_sites(self.extractor, site, layers)
        if positions is not None and self.cache_pooled:
            raise OptionError("positions= needs full sequences: make the UnifiedCache with cache_pooled=False.")
        everything = list(dict.fromkeys(name for names in groups.values() for name in names))
        with self.cached.session():
            read, positions = self._placed(read_prompts(prompts), positions)
            request = self._stored(read, everything)
            if len(groups) == 1:
                return self._read(request, positions, wanted)
            # One pass computed them all; each site is read on its own, since widths may differ.
            return {
                group: self._read(self.cached.request(read, names), positions, wanted)
                for group, names in groups.items()
            }

    def _placed(self, prompts: PromptList, positions: Any) -> tuple[PromptList, Any]:
        part = positions if self._completions is not None and positions in ("prompt", "completion") else None
        if part is None:
            check_positions(positions, chats=True)
            each_prompt(positions, len(prompts))
            source, special = self.extractor.source, self.extractor.add_special_tokens
            # Of a chat that is continued the tokens are others, behind those of its messages.
            same = prompts if self._completions is None else prompts.select(range(len(prompts)))
            positions = positions_of(positions, same, source, add_special_tokens=special)
        if self._completions is None:
            return prompts, positions
        said = self._completions.of(prompts)
        if part is not None:
            positions = [[one.prompt_span if part == "prompt" else one.completion_span] for one in said]
        return sequences_of(said), positions

    def get_completions(self, prompts: Prompt | Iterable[Prompt]) -> list[Completion]:
        """What the model says after each prompt, generated first where it is missing; of a cache with ``generate=``.

        Raises `OptionError` for a cache without.
        """
        if self._completions is None:
            raise OptionError("this cache generates nothing: make it with generate=dict(max_new_tokens=...).")
        with self.cached.session():
            return self._completions.of(read_prompts(prompts))

    def _sequences(self, prompts: PromptList) -> PromptList:
        """What goes through the model: the prompts, or with ``generate=`` the prompts and what follows them."""
        return prompts if self._completions is None else sequences_of(self._completions.of(prompts))

    def _compute(self, prompts: PromptList) -> None:
        self._warmup(prompts, self.extractor.sites)

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


@overload
def activations(
    model: Any, prompts: Prompt | Iterable[Prompt], *, layers: Any = ..., site: str = ..., pooling: str | None = ...,
    return_labels: Literal[False] = ..., **options: Any,
) -> npt.NDArray[np.generic] | list[npt.NDArray[np.generic]]: ...  # fmt: skip


@overload
def activations(
    model: Any, prompts: Prompt | Iterable[Prompt], *, layers: Any = ..., site: str = ..., pooling: str | None = ...,
    return_labels: Literal[True], **options: Any,
) -> tuple[npt.NDArray[np.generic] | list[npt.NDArray[np.generic]], npt.NDArray[np.generic]]: ...  # fmt: skip


def activations(
    model: Any,
    prompts: Prompt | Iterable[Prompt],
    *,
    layers: Any = "all",
    site: str = "resid_post",
    pooling: str | None = "last_token",
    return_labels: bool = False,
    **options: Any,
) -> Any:
    """Activations in one line, computed once and then read from the default store.

    Returns:
        An array `[B, L, D]`, or with ``pooling=None`` a list of `B` arrays `[T, L, D]`. With `return_labels` a pair of
        that and the labels `[B]` that ``UnifiedCache.warmup(prompts, labels=...)`` has stored: int64, float64, bool or
        str where all are of one kind, else objects.

    Further `options` are those of `UnifiedCache`.

    Raises:
        NotCachedError: labels are asked for, and a prompt has none.
    """
    cached = pooling is not None
    if pooling is not None:
        options["pooling"] = pooling
    # Nobody could get it from here.
    options.setdefault("compute_perplexity", False)
    cache = UnifiedCache(model, layers, sites=(site,), cache_pooled=cached, **options)
    with cache.cached.session():
        request = cache._stored(cache._sequences(read_prompts(prompts)), cache.sites)
        if not request.lookup.one_width:
            raise OptionError(
                f"site {site!r} has other widths at other layers, which fit no array [B, L, D]: choose layers of one, "
                "or UnifiedCache.get_activations, which puts them side by side."
            )
        labels = label_array(said_of(cache.store, request, LABEL)) if return_labels else None
        import numpy as np

        lookup = request.lookup
        values: Any = lookup.pooled() if cached else [np.stack(parts, axis=1) for parts in lookup.rows()]
        return values if labels is None else (values, labels)
