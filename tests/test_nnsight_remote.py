"""backend="nnsight" at a server of NDIF's protocol, which is a process of its own without actcache."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache as ac
from actcache import errors
from actcache.extract import attempts
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from nnsight_helpers import needs_nnsight, plain_backward

__all__ = ["plain_backward"]

pytestmark = [needs_nnsight, pytest.mark.slow]

KEY = "a-key-of-the-test"
PROMPTS = [[5, 9, 100, 7], [8, 3], [4, 50, 6, 9, 17, 3], [11], [8, 9]]
SITES = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "attn_out", "mlp_in", "mlp_out", "final_norm"]
HERE = Path(__file__).parent


class Server:
    """The server's process, its address, what it is told to do wrong, and how many requests it has served."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "failures"
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, HERE / "ndif_server.py", KEY, self._told], stdout=log, stderr=subprocess.STDOUT
            )
        while not (lines := self._log.read_text().splitlines()):
            assert self.process.poll() is None, "the server ended"
        self.host = f"http://127.0.0.1:{int(lines[0])}"

    def fail(self, *what: str) -> None:
        """The next requests go wrong like this."""
        self._told.write_text("\n".join(what))

    @property
    def served(self) -> int:
        return self._log.read_text().count("served ")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    running.fail()
    return running


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(attempts, "pause", seconds.append)
    return seconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama", "mixtral", "gptj"):
        tiny_model(family).save_pretrained(place / family)
        tiny_tokenizer().save_pretrained(place / family)
    return {path.name: path for path in place.iterdir()}


def cache(folder: Path, remote: Any, **options: Any) -> ac.UnifiedCache:
    settings: dict[str, Any] = {"compute_perplexity": False, "layers": [0, -1], "batch_size": 1}
    return ac.UnifiedCache(folder, backend="nnsight", remote=remote, **{**settings, **options})


@pytest.mark.parametrize("pooling", [None, "last_token", "mean", "max", "sum"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gptj"])
def test_values_are_the_local_backends(server: Server, folders: dict[str, Path], family: str, pooling: Any) -> None:
    before = server.served
    sites = [s for s in SITES if family != "gptj" or s != "resid_mid"]
    how: dict[str, Any] = {"sites": [*sites, "logits"], "layers": [0, 2]}
    how["pooling"] = (lambda rows: rows.sum(0)) if pooling == "sum" else pooling
    elsewhere = ac.ActivationExtractor(folders[family], backend="nnsight", remote=server.host, **how)
    found, expected = elsewhere.extract(PROMPTS), ac.ActivationExtractor(folders[family], **how).extract(PROMPTS)
    assert server.served > before and not elsewhere.source.loaded
    for site in expected:
        torch.testing.assert_close(found.data[site], expected.data[site], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_and_logits_are_computed_there(
    server: Server, folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    for options in (
        {"logit_positions": "all", "logit_top_k": 3, "cache_pooled": False},
        {"logit_positions": "last", "logit_top_k": None},
    ):
        store = tmp_path / str(options["logit_positions"])
        options = {"compute_perplexity": True, "cache_logits": True, "store": store, **options}
        there = cache(folders[family], server.host, **options)
        here = ac.UnifiedCache(folders[family], layers=[0, -1], **options)
        before = server.served
        stats = there.warmup(PROMPTS)
        assert (stats.perplexity_extracted, stats.logits_extracted, server.served - before) == (5, 5, 5)
        np.testing.assert_allclose(there.get_perplexity(PROMPTS), here.get_perplexity(PROMPTS), rtol=1e-5)
        found, expected = there.get_logits(PROMPTS), here.get_logits(PROMPTS)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
        assert found.indices is None or torch.equal(found.indices, expected.indices)
        assert server.served - before == 5 and not there.model_loaded


def test_no_weights_are_needed_here_and_texts_are_tokenised_here(
    server: Server, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["some text", "another one"]
    expected = ac.activations(folders["llama"], texts, layers=[0, -1])
    hidden = folders["llama"] / "model.safetensors"
    there = cache(folders["llama"], server.host)
    there.warmup([[3]])  # The server has it now.
    hidden.rename(tmp_path / "elsewhere")
    try:
        values = cache(folders["llama"], server.host).get_activations(texts)[0]
    finally:
        (tmp_path / "elsewhere").rename(hidden)
    np.testing.assert_allclose(values.reshape(expected.shape).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_what_came_from_there_is_kept_apart_and_read_without_server_or_key(
    server: Server, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = cache(folders["gpt2"], server.host).get_activations(PROMPTS)[0]
    served = server.served
    monkeypatch.delenv("NDIF_API_KEY")
    server.fail(*["503"] * 9)
    assert torch.equal(cache(folders["gpt2"], server.host).get_activations(PROMPTS)[0], values)
    assert cache(folders["gpt2"], False).plan(PROMPTS).missing == 5
    assert cache(folders["gpt2"], "http://127.0.0.1:1").plan(PROMPTS).missing == 5
    assert cache(folders["gpt2"], server.host, revision=None).warmup(PROMPTS, server.host).activations_cached == 5
    assert server.served == served


def test_true_is_the_server_that_the_environment_names(
    server: Server, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDIF_HOST", server.host + "/")
    here = cache(folders["gpt2"], False)
    found = here.get_activations(PROMPTS, True)[0]
    torch.testing.assert_close(found, here.get_activations(PROMPTS)[0], rtol=1e-5, atol=1e-5)
    assert cache(folders["gpt2"], server.host).plan(PROMPTS).missing == 0
    assert ac.CachedExtractor(here.extractor).extract(PROMPTS, True, cache_only=True) is None
    monkeypatch.setenv("NDIF_HOST", "ndif")
    with pytest.raises(errors.OptionError, match="the environment variable NDIF_HOST is 'ndif'"):
        cache(folders["gpt2"], True)


@pytest.mark.parametrize("passing", [["503"], ["429", "drop"], ["garbage", "500", "drop"]])
def test_failures_that_pass(
    server: Server, folders: dict[str, Path], tmp_path: Path, pauses: list[float], passing: list[str]
) -> None:
    server.fail(*passing)
    values = cache(folders["gpt2"], server.host, store=tmp_path).get_activations(PROMPTS)[0]
    torch.testing.assert_close(values, cache(folders["gpt2"], False).get_activations(PROMPTS)[0], rtol=1e-5, atol=1e-5)
    assert len(pauses) == len(passing)


def test_without_retries_a_failure_is_final_and_named(
    server: Server, folders: dict[str, Path], tmp_path: Path, pauses: list[float]
) -> None:
    server.fail("", "503")
    with pytest.raises(errors.PartialWarmupError, match="is out of order or busy") as raised:
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS, max_retries=0)
    # The longest prompt went first, then the one that failed.
    assert [i for i, _ in raised.value.failed] == [0] and pauses == []
    assert cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS).activations_extracted == 1


def test_an_error_in_the_block_fails_its_batch_alone(
    server: Server, folders: dict[str, Path], tmp_path: Path, pauses: list[float]
) -> None:
    server.fail("error")
    with pytest.raises(errors.PartialWarmupError, match=r"reports that the batch failed there: .*as told") as raised:
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    assert [i for i, _ in raised.value.failed] == [2] and pauses == []
    assert raised.value.stats.activations_extracted == 4


def test_an_answer_that_lacks_what_was_asked_for_is_an_error(
    server: Server, folders: dict[str, Path], tmp_path: Path
) -> None:
    server.fail("nothing")
    with pytest.raises(errors.PartialWarmupError) as raised:
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    assert [i for i, _ in raised.value.failed] == [2]


def test_a_batch_that_is_too_large_there_is_halved(
    server: Server, folders: dict[str, Path], tmp_path: Path, pauses: list[float]
) -> None:
    server.fail("memory")
    before = server.served
    there = cache(folders["gpt2"], server.host, store=tmp_path, batch_size=5)
    assert there.warmup(PROMPTS).activations_extracted == 5
    assert server.served - before == 2 and pauses == []


def test_keys(server: Server, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight import CONFIG

    before = server.served
    monkeypatch.setenv("NDIF_API_KEY", "a-wrong-key")
    with pytest.raises(errors.EngineUnavailableError, match="refuses the key in NDIF_API_KEY") as raised:
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    assert "a-wrong-key" not in str(raised.value)
    monkeypatch.delenv("NDIF_API_KEY")
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    monkeypatch.setenv("NDIF_HOST", server.host)
    for call in ("warmup", "get_activations"):
        with pytest.raises(errors.EngineUnavailableError, match="set the environment variable NDIF_API_KEY"):
            getattr(cache(folders["gpt2"], True, store=tmp_path / "none"), call)(PROMPTS)
    with pytest.raises(errors.EngineUnavailableError, match="NDIF_API_KEY"):
        ac.ActivationExtractor(folders["gpt2"], backend="nnsight", remote=True).extract(PROMPTS)
    assert ac.Store(tmp_path / "none").spaces() == [] and server.served == before


def test_a_model_that_is_not_served_ends_the_run(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    server.fail("404")
    with pytest.raises(errors.EngineUnavailableError, match="refuses requests for"):
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)


def test_a_server_that_says_nothing_is_not_waited_for(
    server: Server, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setenv("ACTCACHE_REMOTE_TIMEOUT", "soon")
    with pytest.raises(errors.OptionError, match="ACTCACHE_REMOTE_TIMEOUT is 'soon'"):
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    monkeypatch.setenv("ACTCACHE_REMOTE_TIMEOUT", "1")
    server.fail("", "", "silent")
    with pytest.raises(errors.EngineUnavailableError, match="accepted a batch and said nothing of it for 1 s"):
        cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    assert not pauses
    monkeypatch.setenv("ACTCACHE_REMOTE_TIMEOUT", "inf")
    stats = cache(folders["gpt2"], server.host, store=tmp_path).warmup(PROMPTS)
    assert (stats.activations_cached, stats.activations_extracted) == (2, 3)


def test_nobody_at_the_address(folders: dict[str, Path], tmp_path: Path, pauses: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(errors.EngineUnavailableError, match=r"the connection to .* failed .*\(tried 4 times\)"):
            cache(folders["gpt2"], host, store=tmp_path).warmup(PROMPTS)
    assert len(pauses) == 3


def test_a_killed_client_goes_on_where_it_was(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    before = server.served
    # The sixth batch does not come back: by then the others are stored.
    server.fail("", "", "", "", "", "slow")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)])}
    worker = subprocess.Popen(
        [sys.executable, HERE / "nnsight_worker.py", folders["gpt2"], server.host, tmp_path],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert worker.stdout is not None and worker.stdout.readline() == "begins\n"
        while sum(space.num_prompts for space in ac.Store(tmp_path).spaces()) < 5:
            assert worker.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        worker.send_signal(signal.SIGKILL)
    finally:
        worker.kill()
        worker.communicate()
    assert server.served - before == 5
    stats = cache(folders["gpt2"], server.host, store=tmp_path).warmup([[3 + i, 7, 11] for i in range(12)])
    assert (stats.activations_cached, stats.activations_extracted) == (5, 7)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device_map": "auto"}, {"model_kwargs": {"a": 1}}])
def test_what_the_server_decides_is_refused(folders: dict[str, Path], options: dict[str, Any]) -> None:
    with pytest.raises(errors.OptionError, match="cannot be chosen where the model runs elsewhere"):
        cache(folders["gpt2"], "http://127.0.0.1:1", **options)


def test_what_cannot_run_elsewhere_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:1"
    with pytest.raises(errors.OptionError, match="remote= needs a name"):
        cache(tiny_model("gpt2"), nowhere)  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="generate="):
        cache(folders["gpt2"], nowhere, generate={"max_new_tokens": 2})
    with pytest.raises(errors.OptionError, match="runs elsewhere"):
        _ = cache(folders["gpt2"], nowhere).model
    with pytest.raises(errors.SiteUnavailableError, match=r"'q.0' is made of parts"):
        cache(folders["gpt2"], nowhere, sites=["q"], store=tmp_path).warmup(PROMPTS)
    for family, why in (("bert", "no causal language model"), ("llama-dynamic", "remembers the longest prompt")):
        tiny_model(family).save_pretrained(tmp_path / family)
        with pytest.raises(errors.SiteUnavailableError, match=why):
            cache(tmp_path / family, nowhere, store=tmp_path / "store").warmup(PROMPTS)


def test_the_name_of_a_model_is_the_one_that_nnsight_gives_it(folders: dict[str, Path]) -> None:
    from nnsight import TransformersModel
    from nnsight.modeling import huggingface

    from actcache.extract.backends.nnsight import model_key

    name = str(folders["gpt2"])
    huggingface._ID_CACHE[name] = name
    theirs = TransformersModel(name, task="text-generation", revision="main", tokenizer=tiny_tokenizer())
    assert model_key(name, "main", trusted=False) == theirs.to_model_key()


def test_the_command(server: Server, folders: dict[str, Path], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_HOST", server.host)
    status, said, _ = cli("warmup", str(folders["llama"]), "--prompt", "some text", "--backend", "nnsight", "--remote")
    assert status == 0 and "1 extracted" in said
    status, said, _ = cli("plan", str(folders["llama"]), "--prompt", "some text", "--backend", "nnsight", "--remote")
    assert status == 0 and "stored already   1 prompt" in said
