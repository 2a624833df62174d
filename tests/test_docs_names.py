"""The pages of those who come from other libraries say of every public name of theirs what becomes of it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from conftest import Peers
from documents import DOCS, prose

EASYROUTINE = re.findall(
    r"\w+",
    """
HookedModel HookedModelConfig from_pretrained ExtractionConfig extract_cache forward generate predict compute_patching
use_language_model_only use_full_model set_custom_modules restore_original_modules register_interventions
clean_interventions Intervention ActivationCache ValueWithInfo cat deferred_mode register_aggregation remove_aggregation
default_aggregation just_old just_me sublist add_with_info add_metadata map_to_dict memory_size memory_tree to cpu cuda
get items keys values update LogitLens ActivationSaver save save_cache from_env rename_experiment ActivationLoader query
from_saver QueryResult load get_paths remove update_run_experiment target_token_positions pivot_positions batch_saver
extract_embed extract_resid_out extract_resid_in_post_layernorm extract_attn_out extract_last_layernorm extract_head_out
extract_head_queries extract_head_keys extract_queries extract_keys extract_head_values_projected
extract_head_keys_projected extract_head_queries_projected save_logits keep_gradient attn_heads attn_pattern_avg
attn_pattern_row_positions avg avg_over_example
""",
)
"""Of easyroutine 1.1.5, which asks for versions of torch and transformers that nothing else here can live with."""
CANDLE_MI = re.findall(
    r"\w+",
    """
GenerationResult MIBackend MIModel Activation MlpLayout NormType QkvLayout TransformerConfig GenericTransformer
ActivationCache AttentionCache FullActivationCache KVCache MIError Result HookCache HookPoint HookSpec Intervention
AblationResult AttentionEdge HeadSpec InterventionType KnockoutSpec LayerSpec StateAblationResult StateKnockoutSpec
StateSteeringResult StateSteeringSpec SteeringResult SteeringSpec LogitLensAnalysis LogitLensResult TokenPrediction
DoseResponseCurve DoseResponsePoint SteeringCalibration create_causal_mask create_generation_mask EncodingWithOffsets
PositionConversion TokenWithOffset MITokenizer with_capacity push get_layer get_position n_layers seq_len is_empty
attention_from_position attention_to_position top_attended_positions capture intervene require SparseAutoencoder
CrossLayerTranscoder encode encode_sparse project_to_vocab
""",
)
"""Of candle-mi 0.1.10: what its crate exports, and methods of what this library covers."""


def said(page: str) -> set[str]:
    """The names that stand in code of `page`, in its prose and tables."""
    text = prose((DOCS / "coming-from" / page).read_text(encoding="utf-8"))
    return {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"\w+", code)}


def missing(page: str, names: Iterable[str]) -> set[str]:
    here = said(page)
    # `get_act_patch_attn_head_out_by_pos`, `..._q_by_pos`: an ending stands for the name it belongs to.
    endings = [name for name in here if name.startswith("_")]
    return {name for name in names if name not in here and not any(name.endswith(ending) for ending in endings)}


@pytest.mark.parametrize(("page", "names"), [("easyroutine.md", EASYROUTINE), ("candle-mi.md", CANDLE_MI)])
def test_every_name_of_libraries_that_are_not_installed_is_there(page: str, names: list[str]) -> None:
    assert not missing(page, names)
    assert missing(page, ["a_name_that_nobody_has"])


@pytest.mark.slow
@pytest.mark.parametrize(("page", "package"), [("nnsight.md", "nnsight"), ("transformer-lens.md", "transformer_lens")])
def test_every_public_name_is_there(page: str, package: str, peers: Peers) -> None:
    names = json.loads(peers.run("public_names.py", package).splitlines()[-1])
    assert len(names) > 30
    assert not missing(page, names)


@pytest.mark.slow
def test_every_public_name_of_lmprobe_is_there(lmprobe: Path) -> None:
    script = Path(__file__).parent / "peers" / "public_names.py"
    done = subprocess.run([lmprobe, script, "lmprobe"], capture_output=True, text=True, check=True)
    names = json.loads(done.stdout.splitlines()[-1])
    assert len(names) > 50
    assert not missing("lmprobe.md", names)
