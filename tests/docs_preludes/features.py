import docs_hub

docs_hub.serve()
import torch

import actcache as ac

prompts = ["The Eiffel Tower is in", *docs_hub.PROMPTS, *(f"{i} is a number." for i in range(400))]
cache = ac.UnifiedCache("gpt2", layers=[6], cache_pooled=False, compute_perplexity=False)
cache.warmup(prompts)
store = cache.store


class Sae(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into = torch.nn.Linear(cache.get_activations(prompts[:1])[0].shape[-1], 2000)

    def encode(self, x):
        return self.into(x).relu()


sae = Sae()
config, trainer_config, steps = {}, {}, 3


def trainSAE(batches, configs, steps):
    for _, batch in zip(range(steps), batches, strict=False):
        assert batch.ndim == 2


class SAETrainer:
    def __init__(self, config, sae, batches):
        self.batches = batches

    def fit(self):
        trainSAE(self.batches, [], 2)
