"""What the two examples of training share: the facts that the demo's model knows, and which features light up on one.

`train_sae_lens.py` and `train_dictionary_learning.py` are the examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import actcache as ac
from actcache.demo import model_path
from actcache.demo.facts import Fact, facts
from actcache.demo.prompts import PHRASINGS, sentence

SITE, WIDTH, BATCH = "resid_post.3", 1024, 512
RELATION = "landmark-city"
FACTS = facts(RELATION)
"""74 landmarks, each in one city."""
TOLD = [(fact, sentence(fact, phrasing)) for fact in FACTS for phrasing in range(len(PHRASINGS[RELATION]))]
"""Each of them in 6 sentences."""
PROMPTS = [text for _, text in TOLD]


def extracted(store: ac.Store | None = None) -> ac.UnifiedCache:
    """The cache in which every token of the sentences is stored; run again, it finds them all."""
    cache = ac.UnifiedCache(
        str(model_path()), layers=[3], cache_pooled=False, compute_perplexity=False, store=store, batch_size=None
    )
    cache.warmup(PROMPTS)
    return cache


@dataclass(frozen=True)
class Found:
    """A feature, and the one fact that it lights up on, in `sentences` of its 6 sentences."""

    feature: int
    fact: Fact
    sentences: int


def on_single_facts(strongest: np.ndarray) -> list[Found]:
    """The features that light up on a single fact: all sentences in which one exceeds half of what it is at most are of
    the same fact, and are most of the 6 of that fact.

    `strongest` ``[sentences, n]``: what each is at most in each sentence.
    """
    told = len(PHRASINGS[RELATION])
    found = []
    for feature in np.flatnonzero(strongest.max(axis=0) > 0).tolist():
        column = strongest[:, feature]
        sentences = np.flatnonzero(column > column.max() / 2)
        fact = int(sentences[0]) // told
        if (sentences // told == fact).all() and len(sentences) > told / 2:
            found.append(Found(feature, FACTS[fact], len(sentences)))
    return found


def strongest_features(features: ac.Features) -> np.ndarray:
    """What each feature is at most in each sentence, but for the token that begins it: ``[sentences, n]``."""
    rows = features.read(PROMPTS, positions=(1, None))
    return np.stack([row.to_dense().amax(dim=0).numpy() for row in rows])


def strongest_dimensions(cache: ac.UnifiedCache) -> np.ndarray:
    """The same of the vectors that the features were made of, each dimension up and down: what no training gives."""
    activations, mask = cache.get_activations(PROMPTS)
    rows = [vectors[real][1:].numpy() for vectors, real in zip(activations, mask, strict=True)]
    return np.stack([np.concatenate([row.max(axis=0), (-row).max(axis=0)]) for row in rows])


def report(cache: ac.UnifiedCache, features: ac.Features, before: float, after: float) -> dict[str, float]:
    """Say how much of the variance is left unexplained before and after training, and which facts have features."""
    found = on_single_facts(strongest_features(features))
    dimensions = on_single_facts(strongest_dimensions(cache))
    print(f"{SITE}, {len(PROMPTS)} sentences: variance that is not explained {before:.3f} -> {after:.3f}")
    print(f"{len(found)} of {features.n_features} features light up on single facts ({len(dimensions)} dimensions do)")
    for one in found[:8]:
        print(f"  feature {one.feature}: {one.fact.subject}, {one.fact.value} ({one.sentences} of 6 sentences)")
    return {
        "before": before, "after": after, "single": len(found), "dimensions": len(dimensions),
        "encoded": features.encoded,
    }  # fmt: skip
