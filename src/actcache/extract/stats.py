"""What a warm-up found and did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actcache.store.files import log

if TYPE_CHECKING:
    from actcache.extract.request import Filled, Request
    from actcache.store.eviction import EvictionReport


@dataclass(frozen=True)
class WarmupStats:
    """What a warm-up found and did.

    Attributes:
        total_prompts: prompts asked for, duplicates included.
        activations_cached: of these, how many had their activations stored before.
        activations_extracted: different prompts whose activations were computed.
        perplexity_cached, perplexity_extracted, logits_cached, logits_extracted: the same of these results, where the
            cache was made to compute them.
        elapsed_seconds: time of the whole call.
        bytes_written: bytes of activations and results handed to the store, counted as `Plan.bytes_to_write` is.
        tokens_extracted: tokens that went through the model.
        prompts_evicted: different prompts asked for of which something did not stay, since the store's limit has no
            room for all that was asked for. What went is computed again when it is asked for.
        activations_evicted: of these, how many lost activations, and not only results.
    """

    total_prompts: int
    activations_cached: int = 0
    activations_extracted: int = 0
    perplexity_cached: int = 0
    perplexity_extracted: int = 0
    logits_cached: int = 0
    logits_extracted: int = 0
    elapsed_seconds: float = 0.0
    bytes_written: int = 0
    tokens_extracted: int = 0
    prompts_evicted: int = 0
    activations_evicted: int = 0

    @property
    def cache_hit_rate(self) -> float:
        """`activations_cached / total_prompts`."""
        return self.activations_cached / self.total_prompts if self.total_prompts else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model per second of the whole call; 0 when nothing was computed."""
        return self.tokens_extracted / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0


def stats_of(request: Request, filled: Filled, seconds: float) -> WarmupStats:
    """What was found for `request`, and what running the model added in so many seconds."""
    results = request.results
    return WarmupStats(
        total_prompts=len(request.prompts),
        activations_cached=request.cached,
        activations_extracted=filled.extracted,
        perplexity_cached=int(results.perplexity.sum()) if results.asked.perplexity else 0,
        perplexity_extracted=filled.perplexity,
        logits_cached=int(results.logits.sum()) if results.asked.logits else 0,
        logits_extracted=filled.logits,
        elapsed_seconds=seconds,
        bytes_written=filled.bytes_written,
        tokens_extracted=filled.tokens,
    )


def after_eviction(stats: WarmupStats, left: Request, evicted: EvictionReport) -> WarmupStats:
    """`stats` of a warm-up after which the store was brought below its limit; `left` says what of it is missing now.

    Warns where not all of it has stayed.
    """
    gone = left.to_compute
    if not gone:
        return stats
    log.warning(
        "of %d of %d prompts something was evicted at once: the store is kept to %s, and would need %s with them. "
        "Raise its limit (ac.set_cache_limit, ACTCACHE_MAX_GB, or Store(limit_gb=) of a store of your own), or warm up "
        "fewer prompts, sites or layers.",
        gone, stats.total_prompts, _size(evicted.limit_bytes or 0), _size(evicted.bytes_kept + evicted.bytes_freed),
    )  # fmt: skip
    activations = sum(len(members) for (names, _), members in left.missing.items() if names)
    return replace(stats, prompts_evicted=gone, activations_evicted=activations)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MB" if nbytes >= 2**16 else f"{nbytes:,} bytes"
