"""Train the language model that ships with actcache, from the sentences of ``actcache.demo``.

    python scripts/train_demo_model.py --output src/actcache/demo/model

Runs on a CPU. The same seed, thread count and torch version give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, relu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actcache.demo.facts import RELATIONS, facts, values
from actcache.demo.prompts import (
    Course,
    Piece,
    Statement,
    completion,
    corpus,
    held_out_phrasing,
    landmarks,
    split,
    statements,
    verdict_prompts,
)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTEXT = 256
# Rows of three lengths: short ones train fastest, long ones teach the whole context.
ROW_LENGTHS = ((32, 0.6), (64, 0.25), (CONTEXT, 0.15))
TOKENS_PER_STEP = 1536
# A false value is read and never said. Verdicts weigh most: they are what is hardest to learn. Which subject comes next
# is chance, so little is learned from it.
WEIGHTS = {"setting": 0.2, "answer": 1.0, "falsehood": 0.0, "end": 0.3, "verdict": 4.0}
# The highest probability the answer may have after each of the first blocks.
LENS_CAPS = (0.03, 0.03, 0.05)
# Shares of the training, and what verdicts are passed on in each. Whether a value is right is first learned by heart,
# for a few facts and then for all with one false value each, and from there it carries over to the other values. Begun
# with everything at once, verdicts stay guesses for thousands of steps.
COURSES = ((0.2, Course(16, 0.0)), (0.15, Course(48, 0.0)), (0.25, Course(None, 0.0)), (0.4, Course(None, 0.3)))


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every value of a fact, with its leading space, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["".join(p.text for p in document) for document in islice(corpus(seed), 20_000)]
    # Repeated until merging them pays before the names of landmarks, which stay in several tokens as rare names do.
    answers = [f" {value}" for relation in RELATIONS for value in values(relation)] * 4000
    tokenizer.train_from_iterator(text + answers, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    split_up = [a for a in set(answers) if len(fast.encode(a, add_special_tokens=False)) != 1]
    if split_up:
        raise SystemExit(f"these values are more than one token: {sorted(split_up)}; raise --vocab-size")
    return fast


class Encoder:
    """Documents to token ids, the weight of each token as a target, and whether it is an answer in one token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.known[text]

    def document(self, document: list[Piece]) -> tuple[list[int], list[float], list[bool]]:
        ids, weights, answers = [self.tokenizer.bos_token_id], [0.0], [False]
        for piece in document:
            tokens = self.text(piece.text)
            ids += tokens
            weights += [WEIGHTS[piece.role]] * len(tokens)
            answers += [piece.role == "answer" and len(tokens) == 1] * len(tokens)
        return [*ids, self.tokenizer.eos_token_id], [*weights, WEIGHTS["end"]], [*answers, False]


class Batch(NamedTuple):
    """Tensors ``[rows, length]``; a row is whole documents, the last one cut off."""

    ids: Tensor
    weights: Tensor
    answers: Tensor


def batches(encoder: Encoder, seed: int, steps: int, course: Course) -> Iterator[Batch]:
    rng = random.Random(f"batches {seed} {course}")
    documents = corpus(seed, course)
    for _ in range(steps):
        length = rng.choices([n for n, _ in ROW_LENGTHS], [share for _, share in ROW_LENGTHS])[0]
        rows = []
        for _ in range(TOKENS_PER_STEP // length):
            row: tuple[list[int], list[float], list[bool]] = ([], [], [])
            while len(row[0]) < length:
                for column, more in zip(row, encoder.document(next(documents)), strict=True):
                    column.extend(more)
            rows.append([column[:length] for column in row])
        yield Batch(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, and for the log the loss on answers and on verdicts, in nats per token."""
    out = model.model(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
    weight = batch.weights[:, 1:]
    learned = weight > 0
    weight, target, asked = weight[learned], batch.ids[:, 1:][learned], batch.answers[:, 1:][learned]
    nll = cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][learned]), target, reduction="none")
    total = (nll * weight).sum() / weight.sum()
    # Left alone, a model this small answers from its second block on, and a lens has nothing to show.
    for hidden, cap in zip(out.hidden_states[1:], LENS_CAPS, strict=False):
        logits = model.lm_head(model.model.norm(hidden[:, :-1][learned][asked]))
        early = -cross_entropy(logits, target[asked], reduction="none")
        total = total + 0.3 * relu(early - math.log(cap)).mean()
    return total, nll[asked].mean().detach(), nll[weight == WEIGHTS["verdict"]].mean().detach()


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int, width: int, hidden: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def train(model: LlamaForCausalLM, encoder: Encoder, *, steps: int, seed: int, peak_rate: float) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    model.train()
    stream = chain.from_iterable(batches(encoder, seed, round(share * steps), course) for share, course in COURSES)
    start, recent = (time.monotonic(), time.process_time()), torch.zeros(3)
    for step, batch in enumerate(stream, start=1):
        losses = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += torch.stack([x.detach() for x in losses])
        if step % 100 == 0 or step == steps:
            total, answer, verdict = (recent / (step % 100 or 100)).tolist()
            recent.zero_()
            spent, busy = time.monotonic() - start[0], time.process_time() - start[1]
            print(
                f"step {step}/{steps}  loss {total:.3f} (answers {answer:.3f}, verdicts {verdict:.3f})"
                f"  {spent / 60:.1f} min (CPU {busy / 60:.1f}), {spent / step * (steps - step) / 60:.1f} left",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def last_hidden(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The residual stream after each block at the last token of each text: ``[texts, layers, width]``."""
    whole: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _args, out: whole.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    rows = []
    for first in range(0, len(texts), 256):
        batch = tokenizer(texts[first : first + 256], return_tensors="pt", padding=True)
        last = batch["attention_mask"].sum(1) - 1
        model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        rows.append(torch.stack(whole, 1)[torch.arange(len(last)), :, last])
        whole.clear()
    for hook in hooks:
        hook.remove()
    return torch.cat(rows)


@torch.no_grad()
def lens(model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """Probabilities of the next token as read from each layer: ``[texts, layers, vocabulary]``."""
    return model.lm_head(model.model.norm(hidden)).softmax(-1)


def probe(hidden: Tensor, items: list[Statement], seed: int) -> list[float]:
    """Accuracy on held-out facts of a linear true / false probe, layer by layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = [item.label for item in items]
    rows, test = split(items, seed=seed)
    result = []
    for layer in range(hidden.shape[1]):
        x = hidden[:, layer].numpy()
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        fitted.fit(x[rows], [labels[i] for i in rows])
        result.append(float(fitted.score(x[test], [labels[i] for i in test])))
    return result


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """What the model has learned, on what it was trained on and on what was held out."""

    def accuracy(pairs: list[tuple[str, str]]) -> float:
        ids = torch.tensor([tokenizer.encode(answer, add_special_tokens=False)[0] for _, answer in pairs])
        probabilities = lens(model, last_hidden(model, tokenizer, [prompt for prompt, _ in pairs])[:, -1:])[:, 0]
        return (probabilities.argmax(-1) == ids).float().mean().item()

    asked = landmarks()
    ids = torch.tensor([tokenizer.encode(answer, add_special_tokens=False)[0] for _, answer in asked])
    by_layer = lens(model, last_hidden(model, tokenizer, [prompt for prompt, _ in asked]))
    of_answer = by_layer[torch.arange(len(ids)), :, ids]
    unseen = [completion(fact, held_out_phrasing(fact)) for fact in facts()]
    # Phrasings that begin with the value ask for one of several subjects, so their completion has no single answer.
    unseen = [(prompt, answer) for prompt, answer in unseen if answer.strip() in {f.value for f in facts()}]
    items = statements()
    hidden = last_hidden(model, tokenizer, [item.text for item in items])
    splits = [probe(hidden, items, seed) for seed in range(5)]
    return {
        "landmarks answered": (by_layer[:, -1].argmax(-1) == ids).float().mean().item(),
        "facts in a phrasing held out": accuracy(unseen),
        "verdicts on pairs trained, half of them true": accuracy(
            random.Random(0).sample(verdict_prompts(seen=True), 2000)
        ),
        "false values held out, called false": accuracy([p for p in verdict_prompts(seen=False) if p[1] == " False"]),
        "lens by layer, median": [round(p, 4) for p in of_answer.median(0).values.tolist()],
        "lens by layer, mean": [round(p, 4) for p in of_answer.mean(0).tolist()],
        "probe by layer, held-out facts": [round(sum(s) / len(s), 3) for s in zip(*splits, strict=True)],
    }


CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [toy, interpretability]
---

# The demo model of actcache

A toy. A causal language model of the Llama architecture with {layers} blocks, {width} wide, {parameters:,} parameters
and a byte-level BPE tokenizer of {vocabulary} tokens, for trying out actcache without downloading anything. It knows
{facts} facts about landmarks, cities, animals and colours, can say whether a statement about them is true, and knows
nothing else; outside of the sentences it was trained on its output means nothing. Context: {context} tokens.

## Training

Made by `scripts/train_demo_model.py` (seed {seed}, {steps} steps of about {tokens} tokens, CPU) from sentences that
`actcache.demo.prompts` generates from the table in `actcache.demo.facts`. No other data went in.

- Passages of true sentences, questions with answers, and statements followed by " True." or " False.". A false value
  is read but never a target. Verdicts begin with a few facts, go on with all facts and one false value for each, and
  end with all facts and all values.
- An extra loss keeps the probability of the answer, as a logit lens reads it, low after the first {capped} blocks.
  Without it this model answers from its second block on: where its lens rises is a choice, not a discovery.
- One phrasing of each fact and one in ten false values of each subject were left out, for checking.

## Measured after training

| | |
|---|---|
{figures}

## Licence

Apache-2.0.
"""


def write_card(output: Path, model: LlamaForCausalLM, steps: int, seed: int, figures: dict[str, object]) -> None:
    def shown(figure: object) -> str:
        return f"{figure:.1%}" if isinstance(figure, float) else str(figure).strip("[]")

    card = CARD.format(
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        parameters=model.num_parameters(),
        vocabulary=model.config.vocab_size,
        facts=len(facts()),
        context=CONTEXT,
        seed=seed,
        steps=steps,
        tokens=TOKENS_PER_STEP,
        capped=len(LENS_CAPS),
        figures="\n".join(f"| {name} | {shown(figure)} |" for name, figure in figures.items()),
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def make_portable(output: Path) -> None:
    """Name classes as transformers 4 knows them too, and no place on this machine."""
    for name in ("config.json", "tokenizer_config.json"):
        path = output / name
        settings = json.loads(path.read_text(encoding="utf-8"))
        for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only", "backend"):
            settings.pop(key, None)
        if "tokenizer_class" in settings:
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, and give other last digits")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=448)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(options.seed, options.vocab_size)
    model = build_model(tokenizer, options.layers, options.width, options.hidden)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    print(tokenizer.tokenize("The Eiffel Tower is in the city of Paris. True. The Colosseum is in Tokyo. False."))
    train(model, Encoder(tokenizer), steps=options.steps, seed=options.seed, peak_rate=options.rate)
    figures = check(model, tokenizer)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    make_portable(options.output)
    write_card(options.output, model, options.steps, options.seed, figures)
    for path in options.output.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"written to {options.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
