import docs_hub

docs_hub.serve()
prompts = docs_hub.PROMPTS * 3 + [f"{i} is a number." for i in range(40)]


def train_on(batch):
    assert batch.shape[1] > 0
