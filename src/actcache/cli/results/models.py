"""What verbs that run or read models print with `--json`."""

from __future__ import annotations

from typing import TypedDict

from actcache.cli.results.prompt import Prompt


class Stored(TypedDict):
    """A variant of a model in the store of a demo.

    Attributes:
        prompts, layers: how many.
        size_bytes: bytes on disk.
    """

    prompts: int
    layers: int
    dtype: str | None
    size_bytes: int


class DemoRun(TypedDict):
    """One warm-up of the demo.

    Attributes:
        activations_cached, activations_extracted: prompts that were stored before, and that were computed.
        elapsed_seconds: time of the warm-up.
        tokens_per_second: through the model; 0 where nothing was computed.
        weights_loaded: whether the weights of the model had to be loaded.
    """

    activations_cached: int
    activations_extracted: int
    elapsed_seconds: float
    tokens_per_second: float
    weights_loaded: bool


class DemoResult(TypedDict):
    """What the demo found.

    Attributes:
        model: folder of the model.
        folder: the demo's cache folder where it is kept, else null.
        first, second: two warm-ups for the same prompts.
        difference: largest difference of a stored value from a bare forward pass; values go up to `largest`.
        accuracy: of the probe of each layer, on facts that it has not seen.
        chance: of the right answer, by the logit lens of each layer.
        stored: what the store holds at the end.
        seconds: time of it all.
    """

    model: str
    folder: str | None
    first: DemoRun
    second: DemoRun
    difference: float
    largest: float
    accuracy: list[float]
    chance: list[float]
    stored: list[Stored]
    seconds: float


class ModelPath(TypedDict):
    """With --model-path.

    Attributes:
        model: folder of the model.
    """

    model: str


class FailedPrompt(TypedDict):
    """A prompt that is not stored.

    Attributes:
        prompt: its place in the input.
        reason: why; of a run on many workers with its file, and where it is in it.
    """

    prompt: int
    reason: str


class WarmupResult(TypedDict):
    """What is computed of the other numbers, and what failed.

    Attributes:
        cache_hit_rate: `activations_cached / total_prompts`.
        tokens_per_second: `tokens_extracted / elapsed_seconds`.
        prompts_failed: prompts that are not stored, all others are; then the status is 1.
        failed: these; of a run on many workers the first 1,000 (`--failed-file` has all).
    """

    cache_hit_rate: float
    tokens_per_second: float
    prompts_failed: int
    failed: list[FailedPrompt]


class OverLimit(TypedDict):
    """What is computed of the other numbers.

    Attributes:
        over_limit: whether `bytes_to_write` alone is more than `bytes_limit`.
    """

    over_limit: bool


class LensToken(TypedDict):
    r"""A token that a layer predicts.

    Attributes:
        token: its text; a byte that is no UTF-8 by itself as ``\xab``.
    """

    token_id: int
    token: str
    probability: float


class ChosenToken(LensToken):
    """A token of --token.

    Attributes:
        rank: 0 for the likeliest of all.
    """

    rank: int


class LensLayer(TypedDict):
    """What one layer predicts at one position.

    Attributes:
        entropy: of the prediction, in nats.
        kl: of the final prediction from this one, in nats.
        top: the likeliest tokens, the best first.
        chosen: those of --token.
    """

    layer: int
    entropy: float
    kl: float
    top: list[LensToken]
    chosen: list[ChosenToken]


class LensPosition(TypedDict):
    """One token of a prompt.

    Attributes:
        position: its number, from 0.
        token_id, token: which it is; what is predicted comes behind it.
    """

    position: int
    token_id: int
    token: str
    layers: list[LensLayer]


class LensPrompt(TypedDict):
    """One prompt.

    Attributes:
        prompt: as it was given: text, token ids, or messages.
        positions: one for each token.
    """

    prompt: Prompt
    positions: list[LensPosition]


class LensResult(TypedDict):
    """The logit lens of some prompts.

    Attributes:
        layers: those that were read.
        html: the page that was written, or null.
    """

    model_name: str
    site: str
    layers: list[int]
    prompts: list[LensPrompt]
    html: str | None


class SiteRow(TypedDict):
    """A site of a model.

    Attributes:
        site: complete name.
        shape: B prompts, S positions, D hidden size, V vocabulary.
        path: the module that it is read at.
        side: of that module, "output" or "input".
    """

    site: str
    shape: str
    path: str
    side: str


class Versions(TypedDict):
    """What is installed.

    Attributes:
        json: the version of what `--json` prints, of all verbs.
        torch, transformers, safetensors, numpy, huggingface_hub: "not installed" where it is not.
    """

    actcache: str
    json: int
    python: str
    torch: str
    transformers: str
    safetensors: str
    numpy: str
    huggingface_hub: str
