"""Models of the Hub through the real client: revisions, tokens, code of their own; against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actcache.testing.hub import LoopbackHub
from actcache.testing.tiny import tiny_model, tiny_tokenizer
from hub_client import TOKEN
from reference import alone, relative_error

IDS = [5, 6, 7, 8]
FLOAT32 = 5e-6


class Worker:
    """A process with the client in it; `ask` makes a cache there, of a prompt that is then found or computed."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        self.log = home / "log.txt"
        home.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= hub.environment(home / "hub") | {
            "XDG_CACHE_HOME": str(home),
            "ACTCACHE_DIR": str(home / "store"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("hub_worker.py"))],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, model, *, env=None, run=True, head=None, **options):
        request = {"model": str(model), "prompt": IDS, "options": options, "env": env or {}, "run": run}
        request |= {} if head is None else {"head": head}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def worker(module_hub, home):
    worker = Worker(module_hub, home)
    yield worker
    worker.close()


def saved(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("models") / str(seed)
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [saved(tmp_path_factory, seed) for seed in range(3)]


def expected(seed):
    return alone(tiny_model("llama", seed=seed), IDS, "resid_post.3")


def fits(answer, seed):
    assert "values" in answer, answer
    assert relative_error(torch.tensor(answer["values"]), expected(seed)) < FLOAT32
    return True


@pytest.mark.slow
def test_of_a_head_only_its_own_shards_are_fetched(worker, hub, tmp_path):
    model = tiny_model("llama", seed=4)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    hub.create("org/shards").commit(tmp_path)
    since = len(hub.requests)
    rows = torch.randn(3, 32)
    answer = worker.ask("org/shards", run=False, head=rows.tolist())
    assert "values" in answer, answer
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(rows))
    assert relative_error(torch.tensor(answer["values"]), wanted) < FLOAT32
    assert not answer["loaded"]
    names = {request.path.rpartition("/")[2] for request in weights_asked_for(hub, since)}
    needed = {index[name] for name in ("lm_head.weight", "model.norm.weight", "model.embed_tokens.weight")}
    assert names == needed < set(index.values())


def weights_asked_for(hub, since):
    return [request for request in hub.requests[since:] if request.path.endswith(".safetensors")]


@pytest.fixture(scope="module")
def repository(module_hub, folders):
    repository = module_hub.create("org/tiny")
    repository.tag("v1", repository.commit(folders[0]))
    repository.commit(folders[1])
    repository.commit(folders[2], branch="try")
    return repository


class TestRevisions:
    def test_a_branch_a_tag_and_a_commit_lead_to_commits(self, hub, worker, repository):
        v1, main, branch = repository.refs["v1"], repository.refs["main"], repository.refs["try"]
        assert len({v1, main, branch}) == 3
        for revision, commit, seed in [(None, main, 1), ("try", branch, 2), ("v1", v1, 0)]:
            answer = worker.ask("org/tiny", revision=revision)
            # Each revision is an identity of its own.
            assert answer["missing"] == 1 and fits(answer, seed)
            assert answer["identity"]["weights"] == f"commit:{commit}"
            assert answer["label"]["revision"] == commit
            since = len(hub.requests)
            by_commit = worker.ask("org/tiny", revision=commit)
            assert by_commit["missing"] == 0 and fits(by_commit, seed)
            assert not by_commit["loaded"] and weights_asked_for(hub, since) == []

    @pytest.mark.slow
    def test_another_process_loads_no_weights_either(self, hub, worker, repository, home, tmp_path):
        worker.ask("org/tiny")
        since = len(hub.requests)
        other = Worker(hub, tmp_path / "other")
        # Its own Hub cache is empty; the store is shared.
        answer = other.ask("org/tiny", env={"ACTCACHE_DIR": str(home / "store")})
        other.close()
        assert answer["missing"] == 0 and fits(answer, 1) and not answer["loaded"]
        assert len(hub.requests) > since and weights_asked_for(hub, since) == []

    def test_a_branch_that_moved_is_a_miss(self, worker, hub, folders):
        repository = hub.create("org/moving")
        repository.commit(folders[0])
        first = worker.ask("org/moving")
        repository.commit(folders[1])
        second = worker.ask("org/moving")
        assert fits(first, 0) and second["missing"] == 1 and fits(second, 1)
        # And what was there is found again under its commit.
        assert worker.ask("org/moving", revision=first["label"]["revision"])["missing"] == 0

    def test_a_revision_that_is_not_there(self, worker, repository):
        answer = worker.ask("org/tiny", revision="v9")
        assert answer["error"] == "ModelLoadError" and "no revision 'v9'" in answer["message"]

    def test_a_repository_that_is_not_there(self, worker):
        answer = worker.ask("org/absent")
        assert answer["error"] == "ModelLoadError" and "pass token=" in answer["message"]

    def test_an_adapter_and_the_base_it_names(self, hub, worker, repository, tmp_path):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(tiny_model("llama", seed=0), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        model.eval().save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        base = {"base_model_name_or_path": "org/tiny", "revision": "v1"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **base}))
        adapter = hub.create("org/adapter")
        adapter.commit(tmp_path)
        answer = worker.ask("org/adapter")
        values = alone(model.get_base_model(), IDS, "resid_post.3")
        assert relative_error(torch.tensor(answer["values"]), values) < FLOAT32
        assert answer["identity"]["weights"] == f"commit:{repository.refs['v1']}"
        assert answer["identity"]["adapter"]["weights"] == f"commit:{adapter.refs['main']}"
        since = len(hub.requests)
        assert worker.ask("org/adapter")["missing"] == 0
        assert weights_asked_for(hub, since) == []


class TestTokens:
    def test_needed_given_and_kept_nowhere(self, hub, worker, folders, home):
        hub.create("org/private", private=True).commit(folders[0])
        without = worker.ask("org/private")
        assert without["error"] == "ModelLoadError" and "pass token=" in without["message"]
        answer = worker.ask("org/private", token=TOKEN)
        assert fits(answer, 0) and answer["loaded"]
        assert {r.token for r in hub.requests if "org/private" in r.path} == {None, TOKEN}
        # The same model to whoever may see it, and no trace of how it was got.
        assert TOKEN not in json.dumps(answer)
        assert TOKEN not in worker.log.read_text()
        kept = [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
        assert kept == []

    def test_from_the_environment_unless_it_is_not_to_be_used(self, worker, hub, folders):
        hub.create("org/secret", private=True).commit(folders[1])
        environment = {"HF_TOKEN": TOKEN}
        refused = worker.ask("org/secret", env=environment, token=False)
        assert refused["error"] == "ModelLoadError"
        assert fits(worker.ask("org/secret", env=environment), 1)

    def test_one_the_hub_does_not_know(self, worker, hub):
        hub.create("org/other", private=True)
        answer = worker.ask("org/other", token="hf_wrongtoken")
        assert answer["error"] == "ModelLoadError" and "token" in answer["message"]
        assert "hf_wrongtoken" not in answer["message"]

    def test_a_gated_repository(self, worker, hub, folders):
        hub.create("org/gated", gated=True).commit(folders[0])
        answer = worker.ask("org/gated", token=TOKEN)
        assert answer["error"] == "ModelLoadError" and "accept its conditions" in answer["message"]


CONFIGURATION = """
import os
from transformers import LlamaConfig

open(os.environ["RAN"], "a").write("configuration ")

class OddConfig(LlamaConfig):
    model_type = "odd"
"""
MODELING = """
import os
from transformers import LlamaForCausalLM
from .configuration_odd import OddConfig

open(os.environ["RAN"], "a").write("modeling ")

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


class TestCode:
    """A model whose code comes with it, and writes down that it ran."""

    @pytest.fixture
    def odd(self, folders, tmp_path):
        files = {p.name: p.read_bytes() for p in folders[0].iterdir()}
        config = json.loads(files["config.json"])
        classes = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
        config |= {"model_type": "odd", "auto_map": classes, "architectures": ["OddForCausalLM"]}
        return files | {
            "config.json": json.dumps(config).encode(),
            "configuration_odd.py": CONFIGURATION.encode(),
            "modeling_odd.py": MODELING.encode(),
        }

    @pytest.mark.parametrize("where", ["folder", "hub"])
    def test_runs_only_when_it_is_trusted_by_name(self, worker, hub, odd, where, tmp_path):
        if where == "hub":
            place = "org/odd"
            hub.create(place).commit(odd)
        else:
            place = tmp_path / "odd"
            place.mkdir()
            for name, data in odd.items():
                (place / name).write_bytes(data)
        marker = tmp_path / "ran"
        environment = {"RAN": str(marker)}
        for options in ({}, {"attn_implementation": "eager"}):
            answer = worker.ask(place, env=environment, **options)
            assert answer.get("error") == "ModelLoadError", answer
            assert "trust_remote_code=True" in answer["message"]
        assert not marker.exists()
        answer = worker.ask(place, env=environment, trust_remote_code=True)
        assert fits(answer, 0) and answer["class"] == "OddForCausalLM"
        assert {"configuration", "modeling"} <= set(marker.read_text().split())
        again = worker.ask(place, env=environment, trust_remote_code=True)
        assert again["missing"] == 0 and not again["loaded"]

    def test_its_bytes_are_part_of_the_identity(self, worker, hub, odd, tmp_path):
        place = tmp_path / "odd"
        place.mkdir()
        for name, data in odd.items():
            (place / name).write_bytes(data)
        environment = {"RAN": str(tmp_path / "ran")}
        before = worker.ask(place, env=environment, trust_remote_code=True)
        doubled = MODELING + "\n    def get_input_embeddings(self):\n        return super().get_input_embeddings()\n"
        (place / "modeling_odd.py").write_text(doubled)
        after = worker.ask(place, env=environment, trust_remote_code=True)
        assert after["missing"] == 1 and fits(after, 0)
        assert before["identity"]["code"] != after["identity"]["code"]
        assert before["identity"]["weights"] == after["identity"]["weights"]

    def test_code_of_another_repository_counts_at_its_commit(self, worker, hub, odd, tmp_path):
        code = hub.create("org/code")
        code.commit({name: data for name, data in odd.items() if name.endswith(".py")})
        config = json.loads(odd["config.json"])
        config["auto_map"] = {key: f"org/code--{value}" for key, value in config["auto_map"].items()}
        files = {name: data for name, data in odd.items() if not name.endswith(".py")}
        hub.create("org/tuned").commit(files | {"config.json": json.dumps(config).encode()})
        marker = tmp_path / "ran"
        environment = {"RAN": str(marker)}
        refused = worker.ask("org/tuned", env=environment)
        assert refused["error"] == "ModelLoadError" and "trust_remote_code=True" in refused["message"]
        assert not marker.exists()
        first = worker.ask("org/tuned", env=environment, trust_remote_code=True)
        assert fits(first, 0)
        code.commit({"configuration_odd.py": CONFIGURATION.encode(), "modeling_odd.py": (MODELING + "#").encode()})
        second = worker.ask("org/tuned", env=environment, trust_remote_code=True)
        assert second["missing"] == 1 and fits(second, 0)
        assert first["identity"]["code"] != second["identity"]["code"]

    def test_an_architecture_that_transformers_knows_needs_none(self, worker, odd, tmp_path):
        place = tmp_path / "llama"
        place.mkdir()
        config = json.loads(odd["config.json"]) | {"model_type": "llama"}
        for name, data in (odd | {"config.json": json.dumps(config).encode()}).items():
            (place / name).write_bytes(data)
        marker = tmp_path / "ran"
        answer = worker.ask(place, env={"RAN": str(marker)})
        assert fits(answer, 0) and answer["class"] == "LlamaForCausalLM"
        assert not marker.exists()
