"""UnifiedCache: the researcher's front door. Prompts in, activations out; computed once, then read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.capture.positions import POOLINGS, check_positions, each_prompt, resolve_positions
from actcache.errors import OptionError, UnknownSiteError, did_you_mean, require_choice
from actcache.extract.cached import CachedExtractor, Filled, Request, partial_failure
from actcache.extract.extractor import ActivationExtractor, complete_sites
from actcache.extract.plan import Plan
from actcache.extract.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from actcache.capture.ready_made import ReadyMade
    from actcache.store.store import Store

Answer = tuple["torch.Tensor", "torch.Tensor | None"]


@dataclass(frozen=True)
class WarmupStats:
    """What a warm-up found and did.

    Attributes:
        total_prompts: prompts asked for, duplicates included.
        activations_cached: of these, how many were stored before.
        activations_extracted: different prompts that went through the model.
        elapsed_seconds: time of the whole call.
        bytes_written: bytes of activations handed to the store.
        tokens_extracted: tokens that went through the model.
    """

    total_prompts: int
    activations_cached: int
    activations_extracted: int
    elapsed_seconds: float
    bytes_written: int
    tokens_extracted: int

    @property
    def cache_hit_rate(self) -> float:
        """`activations_cached / total_prompts`."""
        return self.activations_cached / self.total_prompts if self.total_prompts else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model per second of the whole call; 0 when nothing was computed."""
        return self.tokens_extracted / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0


class UnifiedCache:
    """Activations of one model: extracted where they are missing, read where they are stored.

    Args:
        model: Hub id, local folder, or a loaded transformers model (then pass `tokenizer`).
        layers: int, list of ints, ``"all"``, ``"last"`` or ``"middle"`` (the middle third); negative from the end.
        pooling: how `cache_pooled` makes one vector of a prompt.
        cache_pooled: store one vector per prompt, site and layer; False stores every token's.
        sites: names of `ac.sites(model)`; names without a layer are taken at every one of `layers`. Those of an
            encoder-decoder model begin with their stack (``"encoder.resid_post"``); its decoder is given the prompt
            shifted right behind the start token, so that row ``i`` there is the state that predicts token ``i``.
        dtype: compute dtype; None means float32 (a loaded model keeps its own).
        device: where the model runs; ``"auto"`` takes an accelerator when there is one.
        batch_size: upper bound on prompts per batch; None leaves it to the token budget.
        max_batch_tokens: padded tokens per batch; None takes what suits the device.
        store: an `ac.Store`, a folder, or None for the default store.
        tokenizer, revision, attn_implementation, trust_remote_code, token, device_map, quantization_config,
            model_kwargs: as transformers takes them.
        add_special_tokens: whether text gets the tokenizer's special tokens.
        allow_hooks: names of hooks on a loaded model that are known not to change what is stored.
        edits: ready-made edits (`ac.ablate`, `ac.steer`, `ac.patch`) to run the model with; what is stored is stored
            apart from what other edits, or none, give. They mean the same for every prompt.

    Raises:
        OptionError, ModelLoadError, UnknownSiteError, SiteUnavailableError, LayerRangeError: before any weights are
            read.
    """

    def __init__(
        self,
        model: Any,
        layers: Any = "all",
        *,
        pooling: str = "last_token",
        cache_pooled: bool = True,
        sites: str | Sequence[str] = ("resid_post",),
        dtype: Any = None,
        device: str = "auto",
        batch_size: int | None = 8,
        max_batch_tokens: int | None = None,
        store: Store | str | Path | None = None,
        backend: str = "local",
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
        edits: ReadyMade | Sequence[ReadyMade] = (),
    ) -> None:
        if not callable(pooling):
            require_choice(pooling, POOLINGS, "pooling")
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
        self.cached = CachedExtractor(self.extractor, store)
        self.cache_pooled = cache_pooled

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
        """What `warmup(prompts)` would find, compute and write. No forward pass, nothing written."""
        return self.cached.plan(self.cached.request(prompts, self.extractor.sites))

    def warmup(self, prompts: Prompt | Iterable[Prompt], *, verify_cache: bool = True) -> WarmupStats:
        """Compute and store what is missing for `prompts`.

        Every finished batch is stored at once and survives a kill; running again goes on where it stopped.

        Args:
            verify_cache: True also checks that what is stored is undamaged; False trusts the index.

        Raises:
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run, before any is.
            DiskFullError, StoreAccessError: the store cannot take what is to be written.
            PartialWarmupError: some prompts failed; all others are stored.
        """
        return self._warmup(prompts, self.extractor.sites, verify_cache=verify_cache)[0]

    def _stored(self, prompts: Any, names: Sequence[str]) -> Request:
        """`prompts` computed where they were missing, and looked up."""
        stats, request = self._warmup(prompts, names)
        return self.cached.request(request.prompts, names) if stats.activations_extracted else request

    def _warmup(self, prompts: Any, names: Sequence[str], *, verify_cache: bool = True) -> tuple[WarmupStats, Request]:
        """What was done, and the request as it was found before."""
        import time

        start = time.perf_counter()
        request = self.cached.request(prompts, names, check=verify_cache)
        filled: Filled = self.cached.fill(request)
        stats = WarmupStats(
            total_prompts=len(request.prompts),
            activations_cached=request.cached,
            activations_extracted=filled.extracted,
            elapsed_seconds=time.perf_counter() - start,
            bytes_written=filled.bytes_written,
            tokens_extracted=filled.tokens,
        )
        if filled.failed:
            raise partial_failure(filled, stats=stats)
        return stats, request

    def get_activations(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        site: str | None = None,
        layers: Any = None,
        positions: Any = None,
    ) -> Answer | dict[str, Answer]:
        """Activations of `prompts`, computed first where they are missing.

        Args:
            site: which of `sites`; needed only when there are several, without it a dict per site is returned.
            layers: some of this cache's layers, in the order wanted; None for all of them.
            positions: for full sequences: which real tokens (`"last"`, an int, ``(start, stop)``, a list of these;
                or a list of lists, one for each prompt).

        Returns:
            Pooled: ``(tensor [B, L*D], None)``. Full sequences: ``(tensor [B, S, L*D], mask [B, S])``, right-padded
            with zeros. Layers lie side by side in the order asked.
        """
        groups = self._groups(site, layers)
        if positions is not None and self.cache_pooled:
            raise OptionError("positions= needs full sequences: make the UnifiedCache with cache_pooled=False.")
        check_positions(positions)
        read = read_prompts(prompts)
        each_prompt(positions, len(read))
        everything = list(dict.fromkeys(name for names in groups.values() for name in names))
        request = self._stored(read, everything)
        if len(groups) == 1:
            return self._read(request, positions)
        # One pass computed them all; each site is read on its own, since widths may differ.
        return {group: self._read(self.cached.request(read, names), positions) for group, names in groups.items()}

    def _read(self, request: Request, positions: Any) -> Answer:
        from actcache.extract.arrays import to_torch

        if self.cache_pooled:
            values = request.lookup.pooled()
            return to_torch(values.reshape(len(values), -1)), None
        if positions is None:
            padded, mask = request.lookup.padded()
            return to_torch(padded), to_torch(mask)
        return _at_positions(request.lookup.rows(), positions)

    def _groups(self, site: str | None, layers: Any) -> dict[str, list[str]]:
        groups = self.extractor.site_names
        if site is not None:
            if site not in groups:
                named = complete_sites(site, None, self.extractor.source)
                complete = [name for name in named if name in self.extractor.sites]
                if not complete:
                    known = [*groups, *self.extractor.sites]
                    raise UnknownSiteError(
                        f"site {site!r} is not among this cache's sites {list(groups)}.{did_you_mean(site, known)}"
                    )
                groups = {site: complete}
            else:
                groups = {site: groups[site]}
        if layers is None:
            return groups
        chosen: dict[str, list[str]] = {}
        for name, stored in groups.items():
            wanted = complete_sites(name, layers, self.extractor.source)
            chosen[name] = next(iter(wanted.values()))
            absent = [n for n in chosen[name] if n not in stored]
            if absent:
                raise OptionError(
                    f"layers={layers!r} asks for {absent[0]!r}, and this cache holds {stored}: add it to layers=."
                )
        return chosen


def _at_positions(rows: list[list[npt.NDArray[Any]]], positions: Any) -> Answer:
    import numpy as np
    import torch

    from actcache.extract.arrays import to_torch

    asked = each_prompt(positions, len(rows))
    chosen = [resolve_positions(where, len(parts[0])) for where, parts in zip(asked, rows, strict=True)]
    longest = max(len(c) for c in chosen)
    dtype = np.result_type(*{p.dtype for parts in rows for p in parts})
    values: npt.NDArray[Any] = np.zeros((len(rows), longest, sum(p.shape[1] for p in rows[0])), dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (parts, where) in enumerate(zip(rows, chosen, strict=True)):
        values[i, : len(where)] = np.concatenate([p[where] for p in parts], axis=1)
        mask[i, : len(where)] = True
    return to_torch(values), mask


def activations(
    model: Any,
    prompts: Prompt | Iterable[Prompt],
    *,
    layers: Any = "all",
    site: str = "resid_post",
    pooling: str | None = "last_token",
    **options: Any,
) -> npt.NDArray[np.generic] | list[npt.NDArray[np.generic]]:
    """Activations in one line, computed once and then read from the default store.

    Returns:
        An array `[B, L, D]`, or with ``pooling=None`` a list of `B` arrays `[T, L, D]`.

    Further `options` are those of `UnifiedCache`.
    """
    cached = pooling is not None
    if pooling is not None:
        options["pooling"] = pooling
    cache = UnifiedCache(model, layers, sites=(site,), cache_pooled=cached, **options)
    request = cache._stored(prompts, cache.sites)
    if cached:
        return request.lookup.pooled()
    import numpy as np

    return [np.stack(parts, axis=1) for parts in request.lookup.rows()]
