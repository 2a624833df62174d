"""What a warm-up found and did."""

from __future__ import annotations

from dataclasses import dataclass


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
        bytes_written: bytes of activations and results handed to the store.
        tokens_extracted: tokens that went through the model.
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

    @property
    def cache_hit_rate(self) -> float:
        """`activations_cached / total_prompts`."""
        return self.activations_cached / self.total_prompts if self.total_prompts else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens through the model per second of the whole call; 0 when nothing was computed."""
        return self.tokens_extracted / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0
