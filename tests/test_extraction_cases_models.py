"""What an extraction of activations must get right on models of other kinds: attention only, recurrent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import actcache as ac
from actcache.testing.tiny import tiny_model
from extract_batches_helpers import close

IDS = [101, 102, 103, 104, 105, 106]
S, VOCABULARY = len(IDS), 259


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.pattern = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (self.pattern((q @ k.mT / 2).masked_fill(hidden, -torch.inf)) @ v)[:, 0]


class AttentionOnly(nn.Module):
    """No MLP, no norm, no config: a toy as people write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.attention = Attention()
        self.unembed = nn.Linear(4, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.unembed(x + self.attention(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.RNNCell(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 2)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return hidden


class TestOtherModels:
    def test_attention_only(self) -> None:
        model = AttentionOnly()
        cache = ac.extract_batches(
            model, [torch.tensor([[1, 2, 3, 4]])], modules=["embed", "attention.pattern", "attention", "unembed"],
            include_inputs=True,
        )  # fmt: skip
        x = model.embed(torch.tensor([[1, 2, 3, 4]])).detach()
        assert cache["embed"].output.shape == (1, 4, 4)
        close(cache["embed"].output, x)
        pattern = cache["attention.pattern"].output
        assert pattern.shape == (1, 1, 4, 4)
        close(pattern.sum(-1), torch.ones(1, 1, 4))
        assert bool((pattern.triu(1) == 0).all())
        # What the head is given is the stream behind the block.
        close(cache["unembed"].input, x + cache["attention"].output)
        assert cache["unembed"].input.shape == (1, 4, 4)

    def test_attention_only_of_a_known_architecture(self) -> None:
        """Blocks whose MLP adds nothing still add up."""
        model = tiny_model("gpt2")
        for block in model.transformer.h:
            torch.nn.init.zeros_(block.mlp.c_proj.weight)
            torch.nn.init.zeros_(block.mlp.c_proj.bias)
        cache = ac.extract_batches(model, [[IDS]], sites=["resid_pre", "attn_out", "mlp_out", "resid_post"])
        for layer in range(4):
            assert bool((cache[f"mlp_out.{layer}"] == 0).all())
            close(cache[f"resid_post.{layer}"], cache[f"resid_pre.{layer}"] + cache[f"attn_out.{layer}"])

    def test_recurrent_by_steps(self) -> None:
        model, x = Recurrent(), torch.randn(1, 5, 3)
        cache = ac.extract_batches(model, [x], modules="cell", include_inputs=True)
        assert len(cache["cell"]) == 5
        hidden = torch.zeros(1, 2)
        weights = model.cell.state_dict()
        for step, visit in enumerate(cache["cell"]):
            close(visit.input, x[:, step])
            close(visit.inputs[0][1], hidden)
            hidden = torch.tanh(
                x[:, step] @ weights["weight_ih"].T
                + weights["bias_ih"]
                + hidden @ weights["weight_hh"].T
                + weights["bias_hh"]
            )
            assert visit.output.shape == (1, 2)
            close(visit.output, hidden)

    def test_a_recurrent_state(self) -> None:
        """A state that stands beside the stream is in what its module returns, as it was when it returned."""
        import transformers

        config = transformers.RwkvConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, context_length=64, attention_hidden_size=16
        )
        torch.manual_seed(0)
        model = transformers.RwkvModel(config).eval()
        cache = ac.extract_batches(model, [[IDS]], modules=["blocks.*.attention", "blocks.1"], include_inputs=True)
        assert cache["blocks.1"].input.shape == (1, S, 16)
        assert cache["blocks.0.attention"].hidden.shape == (1, S, 16)
        block = model.blocks[0]
        with torch.no_grad():
            hidden = block.pre_ln(model.embeddings(torch.tensor([IDS])))
            close(cache["blocks.0.attention"].hidden, block.attention(block.ln1(hidden))[0])
            close(cache["blocks.1"].input, block(model.embeddings(torch.tensor([IDS])))[0])
        # What the state is by its definition: every token's value, weighted by its key, the past fading away.
        path = "blocks.0.attention"
        with torch.no_grad(), ac.capture(model, [path, f"{path}.*"]) as cache:
            model(torch.tensor([IDS]), use_cache=True)
        keys, values = (cache[f"{path}.{name}"].output[0].double() for name in ("key", "value"))
        fading = torch.exp(-torch.exp(block.attention.time_decay.detach().double()))
        total, weights = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
        for key, value in zip(keys, values, strict=True):
            total, weights = fading * total + key.exp() * value, fading * weights + key.exp()
        _, last, numerator, denominator, largest = (part[0, :, 0].double() for part in cache[path].output[1])
        assert last.shape == (16,)
        close(numerator * largest.exp(), total)
        close(denominator * largest.exp(), weights)
        # The next block had not written its part yet.
        assert all(bool((part[..., 1] == part[0, 0, 1]).all()) for part in cache[path].output[1])
