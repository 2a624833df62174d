"""What makes activations silently wrong on real architectures, trap by trap.

Each test shows on the model at hand that the obvious way is wrong there, and that this library is right. Where the
obvious way is the guard taken out, that is what is done.
"""

from __future__ import annotations

import functools
import inspect
import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.capture import generation
from actcache.capture.hooks import StopForward, observe
from actcache.capture.passes import Passes
from actcache.errors import SiteUnavailableError
from actcache.model.anatomy import describe
from actcache.testing.tiny import BOS, EOS, PAD, tiny_model, tiny_tokenizer
from reference import alone, relative_error

IDS = torch.tensor([[5, 9, 100, 7, 3, 250], [8, 8, 4, 200, 31, 6]])
PROMPTS = [[5, 9, 100], [8, 8, 4, 200, 31, 6, 77, 12, 13, 14], [7], [90, 91, 92, 93, 94]]
WRONG = 1e-3


def first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        value = value[0]
    return value


def path_of(model: nn.Module, site: str) -> str:
    return next(info.path for info in ac.sites(model) if str(info.site) == site)


def plain(model: nn.Module, paths: list[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What modules return, by ordinary hooks that copy the first tensor at once."""
    found: dict[str, Any] = {}
    handles = []
    for path in paths:

        def note(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found[path] = first(output).detach().clone()

        handles.append(model.get_submodule(path).register_forward_hook(note))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def spied(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the backbone, from now on."""
    calls: list[dict[str, Any]] = []
    kind = type(model.base_model)
    forward = kind.forward

    @functools.wraps(forward)
    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(forward).bind(self, *args, **kwargs).arguments)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", spy)
    return calls


def rows_of(model: Any, prompts: list[list[int]], **options: Any) -> dict[str, list[Tensor]]:
    extracted = ac.ActivationExtractor(model, **options).extract(prompts)
    return {site: list(extracted[site]) for site in extracted}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_01_hidden_states_are_normed_at_the_end_or_shifted(family: str) -> None:
    """The last of hidden_states is behind the final norm; mamba's have no embedding in front."""
    model = tiny_model(family)
    blocks = describe(model).block_paths
    reference = plain(model, blocks, IDS)
    hidden_states = model(IDS, output_hidden_states=True).hidden_states
    with ac.capture(model, sites="resid_post") as cache:
        model(IDS)
    for layer, path in enumerate(blocks):
        assert torch.equal(cache[f"resid_post.{layer}"], reference[path])
    assert relative_error(hidden_states[-1], reference[blocks[-1]]) > WRONG
    # Block 0's output by the index that every tutorial gives.
    assert (relative_error(hidden_states[1], reference[blocks[0]]) > WRONG) == (family == "mamba")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "granite", "bloom", "falcon", "gptj", "mpt", "t5", "mixtral", "gpt_oss"])  # fmt: skip  # noqa: E501
def test_02_what_modules_return_differs(family: str) -> None:
    """A block, or an MLP with experts, returns a tensor or a tuple, by family and version."""
    model = tiny_model(family)
    given = {"input_ids": IDS, **({"decoder_input_ids": IDS} if family == "t5" else {})}
    stack = "decoder." if family == "t5" else ""
    block = path_of(model, f"{stack}resid_post.1")
    with ac.capture(model, block, sites=[f"{stack}resid_post.1"]) as cache:
        model(**given)
    assert torch.equal(cache[f"{stack}resid_post.1"], plain(model, [block], **given)[block])
    assert torch.equal(cache[block].hidden, cache[f"{stack}resid_post.1"])
    # In every version there are families that return tuples, and these are among them.
    if family in ("bloom", "falcon", "gptj", "mpt", "t5"):
        assert isinstance(cache[block].output, tuple)
    if family == "gpt_oss":
        mlp = path_of(model, "mlp_out.1")
        with ac.capture(model, mlp, sites="mlp_out.1") as cache:
            model(**given)
        assert isinstance(cache[mlp].output, tuple)
        assert torch.equal(cache["mlp_out.1"], plain(model, [mlp], **given)[mlp])


@torch.no_grad()
def test_03_a_block_that_changes_a_branch_in_place() -> None:
    """Falcon adds the attention's output to the MLP's in place: a hook that keeps the reference keeps the sum."""
    model = tiny_model("falcon")
    path = path_of(model, "mlp_out.1")
    reference = plain(model, [path], IDS)[path]
    with (
        ac.capture(model, sites=["mlp_out", "attn_out"]) as cache,
        ac.capture(model, sites="mlp_out", copy=False) as shared,
    ):
        model(IDS)
    assert torch.equal(cache["mlp_out.1"], reference)
    assert relative_error(shared["mlp_out.1"], reference) > WRONG
    assert relative_error(shared["mlp_out.1"], reference + cache["attn_out.1"]) < 1e-6
    for options in ({}, {"pooling": "last_token"}, {"positions": "last"}, {"positions": [0, -1]}):
        ours = rows_of(model, IDS[:1].tolist(), sites="mlp_out.1", **options)["mlp_out.1"][0].reshape(-1, 32)
        expected = {"": reference[0], "pooling": reference[0, -1:], "positions": reference[0, -1:]}
        key = next(iter(options), "")
        kept = reference[0, [0, -1]] if options.get("positions") == [0, -1] else expected[key]
        assert relative_error(ours, kept) < 1e-5, options


@torch.no_grad()
def test_04_a_reader_that_returns_a_value_changes_the_model() -> None:
    """What a forward hook returns replaces the module's output."""
    model = tiny_model("gpt2")
    expected = [model(ids[None]).logits for ids in IDS]
    kept: dict[str, Any] = {}
    handle = model.transformer.h[1].register_forward_hook(lambda _, args, out: kept.setdefault("x", out))
    naive = [model(ids[None]).logits for ids in IDS]
    handle.remove()
    assert relative_error(naive[1], expected[1]) > WRONG
    points = {site: describe(model).read_point(ac.Site.parse(site)) for site in ("resid_post.1", "resid_pre.2")}
    with (
        ac.capture(model, sites="resid_post"),
        ac.capture(model, include_inputs=True),
        observe(points, lambda key, value: torch.zeros_like(value)),
    ):
        ours = [model(ids[None]).logits for ids in IDS]
    assert all(map(torch.equal, ours, expected))


@torch.no_grad()
def test_05_hooks_on_a_compiled_model_never_fire() -> None:
    """A hook registered after compilation is silent; a capture block is not."""
    model = tiny_model("llama")
    reference = plain(model, ["model.layers.1"], IDS)["model.layers.1"]
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            graphs.append(1)
            return graph.forward(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    compiled(IDS)
    fired: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: fired.append(1))
    compiled(IDS)
    handle.remove()
    assert fired == []
    graphs.clear()
    with ac.capture(compiled, sites="resid_post.1") as cache:
        compiled(IDS)
    # The original code ran, and nothing compiled.
    assert graphs == []
    assert relative_error(cache["resid_post.1"], reference) < 1e-5
    assert relative_error(rows_of(compiled, IDS.tolist(), layers=1)["resid_post.1"][1], reference[1]) < 1e-5
    compiled(IDS)
    assert graphs


@torch.no_grad()
@pytest.mark.parametrize("first_call", ["before the hook", "after the hook"])
def test_06_hidden_states_may_miss_a_hook(first_call: str) -> None:
    """transformers reads at its first output_hidden_states=True: steering added later is not in hidden_states."""
    model = tiny_model("llama")
    unsteered = plain(model, ["model.layers.1"], IDS)["model.layers.1"]
    if first_call == "before the hook":
        model(IDS, output_hidden_states=True)

    def steer(_: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + 100, *output[1:]) if isinstance(output, tuple) else output + 100

    with ac.capture(model, sites="resid_post.1") as cache:
        handle = model.model.layers[1].register_forward_hook(steer)
        hidden_states = model(IDS, output_hidden_states=True).hidden_states
        handle.remove()
    assert torch.equal(cache["resid_post.1"], unsteered + 100)
    if first_call == "before the hook":
        assert torch.equal(hidden_states[2], unsteered)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom", "mamba"])
def test_07_a_choice_of_hidden_states_means_different_things(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """output_hidden_states=[1] leaves others out or gives all of them, by family and version: nothing here asks."""
    model = tiny_model(family)
    blocks = describe(model).block_paths
    reference = plain(model, blocks, IDS)
    with ac.capture(model, sites="resid_post") as cache:
        chosen = model(IDS, output_hidden_states=[1]).hidden_states
    # Read as the entries of tutorials, one of these fails wherever this runs.
    absent = sum(value is None for value in chosen)
    assert absent == (len(blocks) if family == "llama" and not transformers.__version__.startswith("4.") else 0)
    calls = spied(model, monkeypatch)
    extracted = rows_of(model, IDS.tolist())
    assert calls
    assert not any(call.get("output_hidden_states") for call in calls)
    for layer, path in enumerate(blocks):
        assert torch.equal(cache[f"resid_post.{layer}"], reference[path])
        assert relative_error(extracted[f"resid_post.{layer}"][1], reference[path][1]) < 1e-5


@torch.no_grad()
def test_08_attentions_that_are_not_there() -> None:
    """Under sdpa output_attentions=True gives nothing and no error: here the probabilities are those of the pass."""
    model = tiny_model("llama", attn_implementation="sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not model(IDS, output_attentions=True).attentions
    with ac.capture(model, sites="pattern.0") as cache, torch.no_grad():
        model(IDS)
    eager = tiny_model("llama", attn_implementation="eager")
    with torch.no_grad():
        expected = eager(IDS, output_attentions=True).attentions[0]
    torch.testing.assert_close(cache["pattern.0"], expected)
    with pytest.raises(ac.ActCacheError, match="pattern"):
        ac.ActivationExtractor(model, sites="pattern.0").extract([[5, 6]])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_09_prompts_packed_into_one_row_leak(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With restarted position ids in one row, a prompt sees the one before it: here each prompt has its own row."""
    model = tiny_model(family)
    last = path_of(model, "resid_post.3")
    packed = torch.tensor([[*PROMPTS[0], *PROMPTS[3]]])
    positions = torch.tensor([[*range(len(PROMPTS[0])), *range(len(PROMPTS[3]))]])
    given = {"position_ids": positions} if family != "bloom" else {}
    together = plain(model, [last], input_ids=packed, **given)[last][0, len(PROMPTS[0]) :]
    expected = plain(model, [last], torch.tensor([PROMPTS[3]]))[last][0]
    assert relative_error(together, expected) > WRONG

    calls = spied(model, monkeypatch)
    extracted = rows_of(model, PROMPTS, layers="last", max_batch_tokens=1000)
    assert relative_error(extracted["resid_post.3"][3], expected) < 1e-5
    # The rows as they were run: each prompt once, alone in its row, however much room there was.
    real = [
        row[: int(mask.sum())] if mask is not None else row
        for call in calls
        for row, mask in zip(call["input_ids"], call.get("attention_mask", [None] * len(IDS)), strict=False)
    ]
    assert sorted(row.tolist() for row in real if row.tolist() in PROMPTS) == sorted(PROMPTS)
    assert all(len(row) <= max(map(len, PROMPTS)) for row in real)


def test_10_dtype_and_mode_are_what_was_asked_for(tmp_path: Any) -> None:
    """A checkpoint without dtype= comes in bfloat16 on transformers 5 and float32 on 4; a model made from a config is
    in training mode."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", attention_dropout=0.3)
    model.bfloat16().save_pretrained(tmp_path)
    float32 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    bfloat16 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = alone(float32, PROMPTS[0], "resid_post.3")
    assert relative_error(alone(bfloat16, PROMPTS[0], "resid_post.3").float(), expected) > WRONG
    from_disk = rows_of(str(tmp_path), [PROMPTS[0]], layers="last")["resid_post.3"][0]
    assert from_disk.dtype == torch.float32
    assert relative_error(from_disk, expected) < 1e-5

    float32.train()
    with torch.no_grad():
        training = float32(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states[1][0]
    assert relative_error(training, alone(float32.eval(), PROMPTS[0], "resid_post.0")) > WRONG
    float32.train()
    for ours in (
        rows_of(float32, [PROMPTS[0]], layers="last")["resid_post.3"][0],
        ac.run_with_cache(float32, PROMPTS[0], sites="resid_post.3")[1]["resid_post.3"][0],
    ):
        assert relative_error(ours, expected) < 1e-5
    assert float32.training


def test_11_padding_in_a_mean() -> None:
    """Padded positions hold vectors of ordinary size: a mean over all positions is wrong."""
    model = tiny_model("llama")
    _, cache = ac.run_with_cache(model, PROMPTS, sites="resid_post.3")
    padded = cache["resid_post.3"]
    ours = rows_of(model, PROMPTS, layers="last", pooling="mean", batch_size=4)["resid_post.3"]
    for row, ids in enumerate(PROMPTS):
        reference = alone(model, ids, "resid_post.3").mean(0)
        assert relative_error(ours[row], reference) < 1e-5
        assert relative_error(cache.rows("resid_post.3")[row].mean(0), reference) < 1e-5
        if len(ids) < 10:
            assert relative_error(padded[row].mean(0), reference) > WRONG


def test_12_a_view_keeps_the_whole_storage() -> None:
    """The last token of a hidden state, as a view, drags every other token along into memory and files."""

    def saved(tensor: Tensor) -> int:
        file = io.BytesIO()
        torch.save(tensor, file)
        return file.getbuffer().nbytes

    model = tiny_model("gpt2")
    long = [[5, 6, 7, 8] * 15] * 4
    whole = ac.run_with_cache(model, long, sites="resid_post.3")[1]["resid_post.3"]
    assert saved(whole[:, -1]) > whole.nbytes
    own = whole[:, -1].nbytes
    with torch.no_grad(), ac.capture(model, sites="resid_post.3", positions="last", copy=False) as shared:
        model(torch.tensor(long))
    pooled = ac.ActivationExtractor(model, layers="last", pooling="last_token").extract(long)["resid_post.3"]
    for tensor in (
        ac.run_with_cache(model, long, sites="resid_post.3", positions="last")[1]["resid_post.3"],
        shared["resid_post.3"],
        pooled,
    ):
        assert tensor.untyped_storage().nbytes() == own
        assert saved(tensor) < own + 2000


def test_13_tensors_of_inference_mode_cannot_be_trained_on() -> None:
    """A value kept inside inference_mode is refused by autograd later: what is captured there is an ordinary tensor."""
    model = tiny_model("gpt2")
    probe = nn.Linear(32, 2)
    with torch.inference_mode(), ac.capture(model, sites="resid_post.3") as cache:
        hidden = model.transformer(IDS).last_hidden_state
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        probe(hidden).sum().backward()
    with torch.inference_mode():
        inside = ac.ActivationExtractor(model, layers="last").extract(PROMPTS)["resid_post.3"][0]
    outside = ac.ActivationExtractor(model, layers="last").extract(PROMPTS)["resid_post.3"][0]
    for value in (cache["resid_post.3"], outside):
        assert not value.is_inference()
        probe(value).sum().backward()
    assert torch.equal(inside, outside)
    # Gradients of the model's own are not recorded in an extraction.
    assert not outside.requires_grad


def test_14_attention_kernels_and_batches_change_bfloat16() -> None:
    """sdpa and eager, and in bfloat16 a padded batch and a prompt alone, are not the same numbers: kernels are kept
    apart, and bfloat16 stays within its rounding."""
    eager, sdpa = (tiny_model("llama", attn_implementation=kind).bfloat16() for kind in ("eager", "sdpa"))
    long = PROMPTS[1] * 5
    one, other = (alone(model, long, "resid_post.3").float() for model in (eager, sdpa))
    assert not torch.equal(one, other)
    # Eight bits of mantissa through four blocks; an error of another kind would be of the order of the values.
    assert relative_error(one, other) < 5e-2
    identities = [ac.ActivationExtractor(model).source.identity().values for model in (eager, sdpa)]
    assert identities[0] != identities[1]
    different = {key for key in identities[0] if identities[0][key] != identities[1][key]}
    assert "attn_implementation" in different
    prompts = [*PROMPTS, long]
    batched = rows_of(sdpa, prompts, layers="last", batch_size=5)["resid_post.3"]
    for row, ids in enumerate(prompts):
        assert relative_error(batched[row].float(), alone(sdpa, ids, "resid_post.3").float()) < 5e-2


@torch.no_grad()
def test_15_a_residual_in_another_dtype_than_the_model() -> None:
    """mamba's residual stream is float32 in a bfloat16 model: it must not be rounded on the way."""
    model = tiny_model("mamba").bfloat16()
    path = path_of(model, "resid_post.1")
    reference = plain(model, [path], IDS)[path]
    assert reference.dtype == torch.float32
    assert not torch.equal(reference.bfloat16().float(), reference)
    with ac.capture(model, sites="resid_post.1") as cache:
        model(IDS)
    assert torch.equal(cache["resid_post.1"], reference)
    extracted = rows_of(model, IDS.tolist(), layers=1)["resid_post.1"]
    assert extracted[0].dtype == torch.float32
    assert torch.equal(torch.stack(extracted), reference)


@torch.no_grad()
def test_16_the_final_norm_follows_whatever_block_is_last() -> None:
    """In a model with its upper blocks taken away hidden_states[-1] is normed: the block itself is read."""
    whole, short = tiny_model("llama"), tiny_model("llama")
    short.model.layers = short.model.layers[:2]
    short.config.num_hidden_layers = 2
    reference = plain(whole, ["model.layers.1"], IDS)["model.layers.1"]
    assert relative_error(short(IDS, output_hidden_states=True).hidden_states[-1], reference) > WRONG
    with ac.capture(short, sites=["resid_post", "final_norm"]) as cache:
        short(IDS)
    assert torch.equal(cache["resid_post.-1"], reference)
    assert torch.equal(cache["final_norm"], short.model.norm(reference))
    assert relative_error(torch.stack(rows_of(short, IDS.tolist(), layers="last")["resid_post.1"]), reference) < 1e-5


class Gated(nn.Embedding):
    """An embedding with as many experts as the model has layers."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__(*embedding.weight.shape)
        self.weight = embedding.weight
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))


@torch.no_grad()
def test_17_as_many_experts_as_layers() -> None:
    """A list of modules of the right length need not be the blocks: the shallowest is."""
    mixtral = tiny_model("mixtral")
    assert mixtral.config.num_local_experts == mixtral.config.num_hidden_layers == 4
    assert describe(mixtral).block_paths == [f"model.layers.{i}" for i in range(4)]
    # Of gptj's blocks transformers says nothing, so that only their number tells.
    for family in ("llama", "gptj"):
        model = tiny_model(family)
        model.set_input_embeddings(Gated(model.get_input_embeddings()))
        lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 4]
        assert lists[0].endswith(".experts")
        blocks = "model.layers" if family == "llama" else "transformer.h"
        assert describe(model).block_paths == [f"{blocks}.{i}" for i in range(4)]
    assert relative_error(rows_of(model, [PROMPTS[1]])["resid_post.3"][0], alone(model, PROMPTS[1], "resid_post.3")) < 1e-5  # fmt: skip  # noqa: E501


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-dynamic", "llama-longrope", "phi3-longrope"])
def test_18_rotary_embeddings_that_follow_the_longest_prompt(family: str) -> None:
    """Beside a long prompt a short one is encoded as if it were long, mask and position ids notwithstanding."""
    context = tiny_model(family).config.max_position_embeddings
    short, long = [5, 9, 100, 7], [(7 * i) % 250 + 5 for i in range(context if family != "llama-dynamic" else 40)]
    lengths = torch.tensor([len(short), len(long)])
    ids = torch.tensor([short + [PAD] * (len(long) - len(short)), long])
    mask = (torch.arange(len(long)) < lengths[:, None]).long()
    naive = plain(tiny_model(family), ["model.layers.3"], input_ids=ids, attention_mask=mask)["model.layers.3"]
    expected = [alone(tiny_model(family), prompt, "resid_post.3") for prompt in (short, long)]
    assert relative_error(naive[0, : len(short)], expected[0]) > WRONG
    for prompts in ([short, long], [long, short]):
        ours = rows_of(tiny_model(family), prompts, layers="last")["resid_post.3"]
        for prompt, row in zip(prompts, ours, strict=True):
            assert relative_error(row, expected[prompt is long]) < 1e-5


@torch.no_grad()
def test_19_beams_exchange_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the steps of a beam search, put one after the other, belong to different sequences."""
    model = tiny_model("gpt2")

    def searched() -> tuple[Any, Tensor]:
        with ac.capture(model, sites="resid_post.3") as cache:
            made = model.generate(
                IDS, attention_mask=torch.ones_like(IDS), num_beams=3, num_return_sequences=3, max_new_tokens=8,
                min_new_tokens=8, pad_token_id=PAD,
            )  # fmt: skip
        return cache, made

    def worst(cache: Any, made: Tensor) -> float:
        rows = zip(cache.rows("resid_post.3"), made, strict=True)
        return max(relative_error(row, alone(model, ids[:-1].tolist(), "resid_post.3")) for row, ids in rows)

    assert worst(*searched()) < 1e-5
    # Without what generate tells, the exchange of rows is still noticed ...
    monkeypatch.setattr(generation.Watch, "__init__", lambda self, modules, reader: setattr(self, "_stands", []))
    with pytest.raises(SiteUnavailableError, match="reordered"):
        worst(*searched())
    # ... and without that too, rows are wrong.
    monkeypatch.setattr(Passes, "_exchanged", lambda *_: None)
    assert worst(*searched()) > WRONG


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_20_experts_and_routers(family: str) -> None:
    """Routers see all tokens in one list, experts are one module or many: by path everything is what the module gave,
    and mlp_out has one row per token."""
    model = tiny_model(family)
    mlp = path_of(model, "mlp_out.1")
    inside = [f"{mlp}.{name}" for name, module in model.get_submodule(mlp).named_modules() if name]
    found: dict[str, list[Any]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: found.setdefault(path, []).append(out) and None
        )
        for path in [mlp, *inside]
    ]
    with ac.capture(model, sites="mlp_out.1") as sites, ac.capture(model) as cache:
        model(IDS)
    for handle in handles:
        handle.remove()
    assert any(first(outs[0]).ndim == 2 for outs in found.values()), "no router or expert saw flattened tokens"
    for path, outputs in found.items():
        assert len(cache[path]) == len(outputs)
        for visit, output in zip(cache[path], outputs, strict=True):
            assert type(visit.output) is type(output)
            pairs = zip(visit.output, output, strict=True) if isinstance(output, tuple) else [(visit.output, output)]
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(b, Tensor))
    assert sites["mlp_out.1"].shape == (2, 6, 32)
    assert torch.equal(sites["mlp_out.1"], first(found[mlp][0]))
    # With fewer positions kept, what is not one row per token is left as it is.
    with ac.capture(model, [mlp, *found], positions="last") as last:
        model(IDS)
    assert torch.equal(last[mlp].hidden, first(found[mlp][0])[:, -1:])
    for path, outputs in found.items():
        if path != mlp and first(outputs[0]).ndim == 2:
            assert torch.equal(last[path][0].hidden, first(outputs[0]))


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def test_21_templates_with_a_bos_and_padding_that_is_text() -> None:
    """A chat template's text already starts with the BOS; where padding is the EOS, a mask of ids loses real tokens."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "hi there, you"}]]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    right = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    twice = tokenizer(texts[0])["input_ids"]
    assert twice[:2] == [BOS, BOS]
    assert right[0].count(BOS) == 1
    assert right[0][-1] == EOS
    expected = [alone(model, ids, "resid_post.3") for ids in right]
    ours = rows_of(model, chats, tokenizer=tokenizer, layers="last")["resid_post.3"]
    for row, reference in zip(ours, expected, strict=True):
        assert relative_error(row, reference) < 1e-5
    assert relative_error(alone(model, twice, "resid_post.3")[1:], expected[0]) > WRONG

    # Padded on the left behind a mask of ids: the EOS at the end is masked, and its row is another one.
    ids = torch.tensor([[EOS] * (len(right[1]) - len(right[0])) + right[0], right[1]])
    mask = (ids != tokenizer.pad_token_id).long()
    assert mask.sum(1).tolist() == [len(right[0]) - 1, len(right[1]) - 1]
    naive = plain(model, ["model.layers.3"], input_ids=ids, attention_mask=mask)["model.layers.3"]
    assert relative_error(naive[0, -1:], expected[0][-1:]) > WRONG
    cache = ac.run_with_cache(model, right, sites="resid_post.3")[1]
    assert cache.attention_mask.sum(1).tolist() == [len(ids) for ids in right]
    for row, reference in zip(cache.rows("resid_post.3"), expected, strict=True):
        assert relative_error(row, reference) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_22_blocks_that_run_twice(reentrant: bool) -> None:
    """Gradient checkpointing runs blocks (or what is in them, by version) again in the backward pass: one value per
    site and pass, two visits."""
    model = tiny_model("gpt2")
    inner = path_of(model, "attn_out.1")
    paths = [*describe(model).block_paths, inner]
    reference = [plain(model, paths, ids[None]) for ids in IDS]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    handle = model.get_submodule(inner).register_forward_hook(lambda *_: runs.append(1))
    with ac.capture(model, inner, sites=["resid_post", "attn_out"]) as cache:
        for ids in IDS:
            model(ids[None], labels=ids[None], use_cache=False).loss.backward()
    handle.remove()
    # A reader of every run would take these for four prompts.
    assert len(runs) == len(cache[inner]) == 4
    for layer, path in enumerate(paths[:-1]):
        assert cache[f"resid_post.{layer}"].shape == (2, 6, 32)
        for row in range(2):
            assert torch.equal(cache[f"resid_post.{layer}"][row], reference[row][path][0])
    for row in range(2):
        assert torch.equal(cache["attn_out.1"][row], reference[row][inner][0])


def test_22_ending_a_pass_leaves_weights_behind() -> None:
    """accelerate brings weights in for a pass and takes them away at its end, which an exception would skip."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny_model("llama")
    reference = alone(model, PROMPTS[0], "attn_out.1")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, "cpu", state_dict=state, preload_module_classes=["LlamaDecoderLayer"])
    ids = torch.tensor([PROMPTS[0]])

    def left() -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]

    assert left() == []
    with torch.no_grad(), ac.capture(model, sites="attn_out.1", stop_after_last=True) as cache:
        model(ids)
    assert left() == []
    assert relative_error(cache["attn_out.1"][0], reference) < 1e-5
    assert relative_error(rows_of(model, [PROMPTS[0]], sites="attn_out.1")["attn_out.1"][0], reference) < 1e-5
    assert left() == []
    point = {"x": describe(model).read_point(ac.Site.parse("attn_out.1"))}
    with pytest.raises(StopForward), torch.no_grad(), observe(point, lambda *_: None, stop_after_last=True):
        model(ids)
    assert left() != []
