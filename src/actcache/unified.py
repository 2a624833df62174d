"""UnifiedCache: the researcher's front door. Prompts in, activations out; computed once, then read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from actcache.capture.positions import check_positions, each_prompt
from actcache.derive.results import Asked, LogitsAsked
from actcache.errors import OptionError, require_choice
from actcache.extract.backends import Remote
from actcache.extract.cached import CachedExtractor
from actcache.extract.completions import Completion, Completions, check_settings, sequences_of
from actcache.extract.extractor import ActivationExtractor
from actcache.extract.given import NOTHING_SAID, Said, checked, label_array, said_of
from actcache.extract.plan import Plan
from actcache.extract.prompts import Prompt, PromptList, positions_of, read_prompts
from actcache.extract.public import Results
from actcache.extract.request import Request, partial_failure
from actcache.extract.stats import WarmupStats, after_eviction, stats_of
from actcache.model.sites import POOLINGS
from actcache.store.files import log
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
        backend: what runs the model: ``"local"`` (transformers), ``"nnsight"``, or the name under which an installed
            package offers one (docs/backends.md).
        remote: run it elsewhere: True at the backend's service (of nnsight that is NDIF, with ``NDIF_API_KEY``), or
            at a server with this address. Methods take it too, for one call.
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
        trust_names: take what was imported (`actcache import`) or pulled under this model's name where its own
            activations are missing. Nothing but the name says that they are this model's. A string is the name that
            it has there: ``"meta-llama/Llama-3.2-1B"`` says of a folder that it holds that model.
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
        remote: Remote = False,
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
        trust_names: bool | str = False,
        edits: ReadyMade | Sequence[ReadyMade] = (),
        generate: Mapping[str, Any] | None = None,
    ) -> None:
        given = dict(locals())
        if not callable(pooling):
            require_choice(pooling, POOLINGS, "pooling")
        if generate is not None and remote is not False:
            raise OptionError("generate= continues prompts with the model in this process: leave out remote=.")
        self._made_of = {name: given[name] for name in given if name != "self"}
        self._elsewhere: dict[Remote, Self] = {}
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
            remote=remote,
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

    def _at(self, remote: Remote | None) -> Self:
        if remote is None or remote == self.extractor.remote:
            return self
        if remote not in self._elsewhere:
            there = type(self)(**{**self._made_of, "remote": remote})
            there._elsewhere[self.extractor.remote] = self
            self._elsewhere[remote] = there
        return self._elsewhere[remote]

    def plan(self, prompts: Prompt | Iterable[Prompt], remote: Remote | None = None) -> Plan:
        """What `warmup(prompts)` would find, compute and write. No forward pass, nothing written.

        Completions that are to be generated count at their full length.
        """
        if (there := self._at(remote)) is not self:
            return there.plan(prompts)
        read = read_prompts(prompts)
        read = read if self._completions is None else self._completions.longest(read)
        return self.cached.plan(self.cached.request(read, self.extractor.sites, asked=self._asked))

    def warmup(
        self,
        prompts: Prompt | Iterable[Prompt],
        remote: Remote | None = None,
        max_retries: int | None = None,
        verify_cache: bool = True,
        labels: Any = None,
        metadata: Any = None,
    ) -> WarmupStats:
        """Compute and store what is missing for `prompts`: activations, and the results this cache was made for.

        Every finished batch is stored at once and survives a kill; running again goes on where it stopped.

        Args:
            remote: where the model runs, as this cache takes it; None for what it was made with.
            max_retries: how often a batch that fails is tried again, after 2, 4, 8 s and so on; None for 3 remote, and
                0 here. One that fails for good is named at the end, the others are stored.
            verify_cache: True also checks that what is stored is undamaged; False trusts the index.
            labels: a string, number, boolean or None (no label) for each prompt, stored with it: see `get_labels` and
                ``ac.activations(..., return_labels=True)``. They replace those stored before; without, these stay.
            metadata: likewise, a dict for each prompt, all with the same keys, or a dict of lists: see `get_metadata`.

        Raises:
            OptionError: labels or metadata that do not fit the prompts, or differ for the same prompt.
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run, before any is.
            DiskFullError, StoreAccessError: the store cannot take what is to be written.
            PartialWarmupError: some prompts failed; all others are stored.
            EngineUnavailableError: what runs the model cannot be reached; what was finished is stored.
        """
        if (there := self._at(remote)) is not self:
            return there.warmup(prompts, None, max_retries, verify_cache, labels, metadata)
        read = read_prompts(prompts)
        said = checked(labels, metadata, len(read))
        if not self.cached.keeps:
            log.warning("the limit of the store is 0: nothing is stored, so there is nothing to warm up")
            return WarmupStats(len(read))
        with self.cached.session(max_retries) as session:
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

    Further `options` are those of `UnifiedCache`, but for `sites` and `cache_pooled`.

    Raises:
        NotCachedError: labels are asked for, and a prompt has none.
        OptionError: layers at which the site has other widths, which fit no array; besides what `UnifiedCache` raises.
    """
    for name, instead in (("sites", "site= (one; UnifiedCache has several)"), ("cache_pooled", "pooling=None")):
        if name in options:
            raise OptionError(f"ac.activations has no {name}=: give {instead}.")
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
