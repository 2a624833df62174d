"""Train a dictionary of dictionary_learning, with its own `trainSAE`, on vectors that actcache has stored.

    pip install actcache dictionary-learning
    python examples/train_dictionary_learning.py

`trainSAE` takes any iterable of batches; a stream gives those of one epoch, in another order each time.
"""

from __future__ import annotations

import tempfile
from itertools import chain, repeat
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

import actcache as ac
from single_facts import BATCH, SITE, WIDTH, extracted, report

STEPS = 600


def main(store: ac.Store | None = None) -> dict[str, float]:
    """Train, encode what is stored, and say what came of it (see `single_facts.report`)."""
    cache = extracted(store)
    stream = ac.stream_activations(cache, SITE, batch_size=BATCH, exclude="bos", drop_last=True)
    statistics = stream.statistics[SITE]

    @torch.no_grad()
    def unexplained(dictionary: AutoEncoderTopK) -> float:
        error = sum(float((dictionary(batch) - batch).square().sum()) for batch in stream)
        return error / (len(stream) * BATCH) / float(statistics.variance.sum())

    torch.manual_seed(0)
    size = {"activation_dim": len(statistics.mean), "dict_size": WIDTH, "k": 16}
    before = unexplained(AutoEncoderTopK(**size))
    with tempfile.TemporaryDirectory() as folder:
        trainer = {
            "trainer": TopKTrainer, "steps": STEPS, "layer": 3, "lm_name": "demo", "lr": 2e-3, "warmup_steps": 20,
            "device": "cpu", "seed": 0, **size,
        }  # fmt: skip
        trainSAE(chain.from_iterable(repeat(stream)), [trainer], steps=STEPS, save_dir=folder, device="cpu")
        dictionary = AutoEncoderTopK.from_pretrained(Path(folder, "trainer_0", "ae.pt"))
    after = unexplained(dictionary)
    features = ac.encode_store(cache, dictionary, SITE)
    return report(cache, features, before, after)


if __name__ == "__main__":
    main()
