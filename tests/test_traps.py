"""What makes activations silently wrong on real architectures, trap by trap.

Each test shows on the model at hand that the obvious way is wrong there, and that this library is right. Where the
obvious way is the guard taken out, that is what is done.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import actcache as ac
from actcache.capture.hooks import StopForward, observe
from actcache.model.anatomy import describe
from actcache.testing.tiny import tiny_model
from reference import alone, relative_error
from traps_helpers import IDS, PROMPTS, WRONG, path_of, plain, rows_of, spied


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
