"""Train an autoencoder of SAELens, with its own trainer, on vectors that actcache has stored.

    pip install actcache sae-lens
    python examples/train_sae_lens.py

The trainer takes any iterator of batches; a stream gives one for each epoch, in another order each time.
"""

from __future__ import annotations

from itertools import chain, repeat

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import actcache as ac
from single_facts import BATCH, SITE, WIDTH, extracted, report

STEPS = 600


def main(store: ac.Store | None = None) -> dict[str, float]:
    """Train, encode what is stored, and say what came of it (see `single_facts.report`)."""
    torch.manual_seed(0)
    cache = extracted(store)
    stream = ac.stream_activations(cache, SITE, batch_size=BATCH, exclude="bos", drop_last=True)
    statistics = stream.statistics[SITE]
    # With the default norm of 0.1 a third of the features never come to life in so short a training.
    config = TopKTrainingSAEConfig(d_in=len(statistics.mean), d_sae=WIDTH, k=16, decoder_init_norm=1.0)
    sae = TopKTrainingSAE(config)
    # A good start, exact and at no cost: what all vectors have in common need not be learned.
    sae.b_dec.data = torch.from_numpy(statistics.mean).float()

    @torch.no_grad()
    def unexplained() -> float:
        error = sum(float((sae(batch) - batch).square().sum()) for batch in stream)
        return error / (len(stream) * BATCH) / float(statistics.variance.sum())

    before = unexplained()
    training = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=2e-3, lr_end=2e-3
    )
    SAETrainer(training, sae, chain.from_iterable(repeat(stream))).fit()
    after = unexplained()
    features = ac.encode_store(cache, sae, SITE)
    return report(cache, features, before, after)


if __name__ == "__main__":
    main()
