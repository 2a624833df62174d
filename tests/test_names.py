"""Names of the caller's own for modules: what they stand for, what is refused, and where they go along."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcache as ac
from actcache.errors import OptionError, UnknownKeyError, UnknownModuleError

X = torch.tensor([[1.0, -2.0, 3.0]])


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


def net() -> nn.Module:
    """Two blocks, of which the one mixes by "attn" and the other by "ssm"."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        nn.Sequential(OrderedDict(attn=Mixer(), mlp=Mixer())), nn.Sequential(OrderedDict(ssm=Mixer(), mlp=Mixer()))
    )
    return nn.Sequential(OrderedDict(core=nn.Sequential(OrderedDict(h=blocks)), head=nn.Linear(3, 2)))


NAMES = {"core": "trunk", "h.1": "last_block", "attn": "mixer", "ssm": "mixer", "mlp.down": "out", "core.h": "layers"}


@pytest.fixture
def named() -> ac.ActivationCache:
    model = net()
    with ac.capture(model, names=NAMES) as cache:
        model(X)
    return cache


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("trunk", "core"),
        ("model.trunk.h.0", "core.h.0"),
        ("trunk.last_block", "core.h.1"),
        ("core.h.last_block.mlp", "core.h.1.mlp"),
        ("layers.0.mixer.up", "core.h.0.attn.up"),
        ("core.layers.last_block.mixer", "core.h.1.ssm"),
        ("trunk.h.1.out", "core.h.1.mlp.down"),
        ("trunk.layers.1.mlp.out", "core.h.1.mlp.down"),
        ("head", "head"),
    ],
)
def test_a_name_stands_for_its_parts_or_for_the_last(named: ac.ActivationCache, spelled: str, path: str) -> None:
    assert named[spelled] is named[path]
    assert spelled in named
    node: Any = named
    for part in spelled.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    assert node.output is named[path].output
    if spelled.startswith("trunk."):
        assert named.core[spelled.removeprefix("trunk.")].output is named[path].output


def test_keys_stay_real_paths(named: ac.ActivationCache) -> None:
    model = net()
    with ac.capture(model) as plain:
        model(X)
    assert list(named) == list(plain)
    assert named == plain
    assert "trunk" not in plain and "core.h.0.mixer" not in plain
    with pytest.raises(AttributeError):
        _ = plain.core.h[0].mixer
    with pytest.raises(UnknownKeyError):
        plain["trunk.h.0"]


def test_what_no_module_has_below_a_name_stays_unknown(named: ac.ActivationCache) -> None:
    for key in ("trunk.mixer", "core.last_block.attn", "out", "h.0"):
        assert key not in named
        with pytest.raises(UnknownKeyError):
            named[key]
    with pytest.raises(AttributeError, match="'mixr' was not captured below"):
        _ = named.core.h[0].mixr
    assert {"h", "layers", "last_block"} <= set(dir(named.trunk))
    assert "out" not in dir(named.trunk)


def test_a_real_name_elsewhere_comes_first() -> None:
    # "up" is real below a mixer; as a name it stands for the head, beside which there is none.
    model = net()
    with ac.capture(model, names={"head": "up", "core": "model"}) as cache:
        model(X)
    assert cache.model.h[0].attn.up.output is cache["model.h.0.attn.up"].output is cache["core.h.0.attn.up"].output
    assert cache["up"] is cache["model.up"] is cache["head"]
    assert cache["model"] is cache["core"]
    assert cache.model.core.output is cache.model.model.output is cache["core"].output
    assert cache.model.head.output is cache["head"].output
    assert cache[""] is not cache["core"]


def test_a_site_of_the_same_cache_is_found_as_before() -> None:
    from actcache.testing.tiny import tiny_model

    output, cache = ac.run_with_cache(
        tiny_model("gpt2"), [[5, 6, 7]], "transformer.h.*", sites="resid_post", names={"transformer": "model"}
    )
    assert output is not None
    assert torch.equal(cache["layer_2"], cache["model.h.2"].hidden)
    assert torch.equal(cache["resid_post.-1"], cache.model.h[-1].hidden)


def test_names_are_read_while_the_block_is_open_and_written_as_written(named: ac.ActivationCache) -> None:
    model = net()
    with ac.capture(model, "core.h.*", names=NAMES) as cache:
        model(X)
        assert cache.layers[0].output is cache["core.h.0"].output
    del named["trunk.last_block"]
    assert "core.h.1" not in named and "core.h.1.mlp" in named


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle", "file", "select", "or"])
def test_names_go_along(named: ac.ActivationCache, tmp_path: Path, way: str) -> None:
    found = {
        "copy": lambda: copy.copy(named),
        "deepcopy": lambda: copy.deepcopy(named),
        "pickle": lambda: pickle.loads(pickle.dumps(named)),
        "file": lambda: ac.ActivationCache.load(named.save(tmp_path / "kept.safetensors")),
        "select": lambda: named.select(prompts=0),
        "or": lambda: {"own": 1} | named,
    }
    again = found[way]()
    assert torch.equal(again["trunk.last_block"].output, named["core.h.1"].output)
    assert torch.equal(again.layers[1].out.output, named["core.h.1.mlp.down"].output)


def test_gradients_keep_the_names() -> None:
    model = net()
    with ac.capture(model, include_grads=True, names=NAMES) as cache:
        model(X).sum().backward()
    assert cache.gradients().trunk.output is cache.grad("core")
    assert torch.equal(cache.grad("trunk"), cache["core"].grad)


def test_named_positions_keep_the_names() -> None:
    from actcache.testing.tiny import tiny_model

    _, cache = ac.run_with_cache(
        tiny_model("gpt2"), [[5, 6, 7]], "transformer.h.*", positions={"last": -1}, names={"transformer": "core"}
    )
    assert torch.equal(cache.at("last").core.h[1].hidden, cache["transformer.h.1"].hidden)


def test_of_joined_caches_the_receivers_names_hold() -> None:
    model, caches = net(), []
    for names in ({"core": "mine"}, {"core": "theirs"}, None):
        with ac.capture(model, "core", names=names) as cache:
            model(X)
        caches.append(cache)
    mine, theirs, plain = caches
    rows = torch.cat([mine["core"].output, theirs["core"].output])
    assert "theirs" not in ac.ActivationCache.concatenate(caches)
    assert ac.ActivationCache.concatenate(caches)["mine"].output.shape == (3, 2 + 1)
    assert "theirs" in (plain | theirs) and "mine" not in (theirs | mine)
    mine.cat(theirs)
    assert torch.equal(mine["mine"].output, rows)
    assert "theirs" not in mine and "theirs" in theirs


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        ({"cor": "trunk"}, UnknownModuleError, "no module of this Sequential is called 'cor'. Did you mean 'core'?"),
        ({"model.h.0": "first"}, UnknownModuleError, "Did you mean 'core.h.0'"),
        ({"": "root"}, UnknownModuleError, "is called ''"),
        ({"mlp": "attn"}, OptionError, "'core.h.0.mlp' and for 'core.h.0.attn' beside it: .* such as 'my_attn'"),
        ({"core": "head"}, OptionError, "'core' and for 'head' beside it"),
        ({"h.0": "h"}, OptionError, "'core.h.0' and for 'core.h' beside it"),
        ({"attn": "part", "mlp": "part"}, OptionError, "'core.h.0.mlp' and for 'core.h.0.attn' beside it"),
        ({"mlp": "my-mlp"}, OptionError, "'my-mlp' is no name that .* Did you mean 'my_mlp'"),
        ({"mlp": "a.b"}, OptionError, "Did you mean 'a_b'"),
        ({"mlp": "0"}, OptionError, "Did you mean 'my_0'"),
        ({"mlp": ""}, OptionError, "Did you mean 'module'"),
        ({"mlp": "class"}, OptionError, "Did you mean 'my_class'"),
        ({"mlp": "_mlp"}, OptionError, "Did you mean 'mlp'"),
        ({"mlp": "output"}, OptionError, "'output' means something else in a cache: .* such as 'my_output'"),
        ({"mlp": "tokens"}, OptionError, "'tokens' means something else"),
        ({"mlp": "layer_3"}, OptionError, "'layer_3' means something else"),
        ({"mlp": 3}, OptionError, "expected a dict from paths of modules to names"),
        (["mlp"], OptionError, "expected a dict from paths of modules to names"),
    ],
)
def test_what_is_refused_before_the_pass(names: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ac.capture(net(), names=names)
