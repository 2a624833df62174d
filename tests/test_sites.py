"""Site names: parsing, aliases, layers."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache import ActivationCache
from actcache.errors import LayerRangeError, OptionError, SiteUnavailableError, UnknownSiteError
from actcache.model.sites import PER_HEAD, PER_LAYER, SITE_NAMES, WHOLE_MODEL, Site, expand_sites, resolve_layers


class Depth:
    """A model of which only the depth is known, as a warm run sees it."""

    def __init__(self, n_layers: int, lacks: str = "", decoder: int | None = None) -> None:
        self.depths = {None: n_layers} if decoder is None else {"encoder": n_layers, "decoder": decoder}
        self.lacks = lacks

    def depth(self, stack: str | None, site: str = "resid_post") -> int:
        if stack not in self.depths:
            raise SiteUnavailableError(f"{stack}.{site}")
        return self.depths[stack]

    def require(self, site: Site) -> None:
        if self.why_not(site):
            raise SiteUnavailableError(f"no {site}")

    def why_not(self, site: Site) -> str | None:
        return "lacks it" if site.name == self.lacks or str(site) == self.lacks else None


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid_post.5", Site("resid_post", 5)),
        ("resid_pre.-1", Site("resid_pre", -1)),
        ("resid_post", Site("resid_post")),
        ("logits", Site("logits")),
        ("embed", Site("embed")),
        ("pattern.5.3", Site("pattern", 5, 3)),
        ("head_out.0.11", Site("head_out", 0, 11)),
        ("encoder.resid_post.3", Site("resid_post", 3, None, "encoder")),
        ("decoder.final_norm", Site("final_norm", None, None, "decoder")),
        ("blocks.5.hook_resid_post", Site("resid_post", 5)),
        ("blocks.0.hook_resid_mid", Site("resid_mid", 0)),
        ("blocks.11.attn.hook_pattern", Site("pattern", 11)),
        ("blocks.2.attn.hook_z", Site("z", 2)),
        ("blocks.2.mlp.hook_post", Site("mlp_act", 2)),
        ("blocks.2.hook_attn_out", Site("attn_out", 2)),
        ("resid_out_5", Site("resid_post", 5)),
        ("resid_in_5", Site("resid_pre", 5)),
        ("resid_mid_12", Site("resid_mid", 12)),
        ("attn_out_5", Site("attn_out", 5)),
        ("mlp_out_5", Site("mlp_out", 5)),
        ("attn_in_5", Site("attn_in", 5)),
        ("values_5", Site("v", 5)),
        ("queries_L5", Site("q", 5)),
        ("keys_5", Site("k", 5)),
        ("resid_out_-1", Site("resid_post", -1)),
        ("pattern_L-2H3", Site("pattern", -2, 3)),
        ("blocks.-1.attn.hook_result", Site("head_out", -1)),
        ("pattern_L5H3", Site("pattern", 5, 3)),
        ("avg_attn_pattern_L5H3", Site("pattern", 5, 3)),
        ("head_out_5", Site("head_out", 5)),
        ("head_out_L5H3", Site("head_out", 5, 3)),
        ("layer_5", Site("resid_post", 5)),
    ],
)
def test_names_people_use(text: str, site: Site) -> None:
    assert Site.parse(text) == site


@settings(deadline=None)
@given(
    st.sampled_from(SITE_NAMES),
    st.integers(-200, 200),
    st.one_of(st.none(), st.integers(0, 64)),
    st.sampled_from([None, "encoder", "decoder"]),
)
def test_printed_names_read_back(name: str, layer: int, head: int | None, stack: str | None) -> None:
    site = Site(name, layer if name in PER_LAYER else None, head if name in PER_HEAD else None, stack)
    assert Site.parse(str(site)) == site


# What TransformerLens and others call the sites that they have too.
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
    "z": "attn.hook_z", "pattern": "attn.hook_pattern", "head_out": "attn.hook_result", "mlp_act": "mlp.hook_post",
}  # fmt: skip
UNDERSCORED = {
    "resid_post": ["resid_out", "resid_post", "layer"], "resid_pre": ["resid_in", "resid_pre"],
    "resid_mid": ["resid_mid"], "attn_out": ["attn_out"], "mlp_out": ["mlp_out"], "attn_in": ["attn_in"],
    "mlp_in": ["mlp_in"], "q": ["queries"], "k": ["keys"], "v": ["values"],
    "pattern": ["pattern", "avg_attn_pattern"], "head_out": ["head_out"],
}  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(PER_LAYER)), st.integers(0, 11), st.booleans(), st.none() | st.integers(0, 3), st.data())
def test_every_lookup_takes_every_name(name: str, layer: int, behind: bool, head: int | None, data: st.DataObject):
    """By whatever name a value is stored, from whichever end its layer is counted: one value, under every name."""
    number = layer - 12 if behind else layer
    head = head if name in PER_HEAD else None
    names = [f"{name}.{number}"] + [f"{alias}_{number}" for alias in UNDERSCORED.get(name, [])]
    names += [f"{alias}_L{number}" for alias in UNDERSCORED.get(name, [])]
    names += [f"blocks.{number}.{HOOKS[name]}"] if name in HOOKS else []
    if head is not None:
        names = [f"{name}.{number}.{head}"] + [f"{alias}_L{number}H{head}" for alias in UNDERSCORED[name]]
    assert {Site.parse(text) for text in names} == {Site(name, number, head)}
    canonical = str(Site(name, layer, head))
    cache = ActivationCache({"first": 1})
    cache._depths = {None: 12}
    stored = canonical if behind else data.draw(st.sampled_from(names))
    value = cache[stored] = torch.ones(1, 2, 3)
    for text in [canonical, *names]:
        assert cache[text] is value
        assert text in cache
        assert cache.memory_size(text) == "24 B"
        assert len(cache.rows(text)) == 1
        assert cache.info(text) is None
    if head is None:
        for text in names:
            assert cache.get_layer(layer, Site.parse(text).name) is value
            assert list(cache.select(sites=canonical)) == [stored]
    cache[data.draw(st.sampled_from(names))] = 2
    assert len(cache) == 2
    assert cache.pop(data.draw(st.sampled_from(names))) == 2
    assert list(cache) == ["first"]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("blocks.3.ln1.hook_normalized", "attn_in.3"), ("blocks.3.ln2.hook_normalized", "mlp_in.3"),
        ("blocks.3.hook_attn_in", "resid_pre.3"), ("blocks.3.hook_mlp_in", "resid_mid.3"),
        ("blocks.3.attn.hook_attn_scores", "pattern.3"), ("blocks.3.mlp.hook_pre", "mlp_act.3"),
        ("ln_final.hook_normalized", "final_norm"), ("hook_embed", "embed"),
    ],
)  # fmt: skip
def test_names_of_other_values_are_no_aliases(text: str, near: str) -> None:
    """Where the value would not be the same, the name is refused, with what there is."""
    with pytest.raises(UnknownSiteError, match=f"'{text}' is no site.*'{near}'"):
        Site.parse(text)


@pytest.mark.parametrize(
    "text",
    ["resid_psot.5", "", "resid_post.", "resid_post.5.1", "logits.3", "blocks.5.hook_nothing", "h.5", "resid_post_"],
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        Site.parse(text)
    assert isinstance(caught.value, KeyError)


def test_a_typing_error_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UnknownSiteError, match=r"Did you mean 'resid_post'"):
        Site.parse("resid_psot.5")
    with pytest.raises(UnknownSiteError, match="not int"):
        Site.parse(5)  # type: ignore[arg-type]


def test_sites_sort() -> None:
    sites = [Site("resid_post", 10), Site("logits"), Site("resid_post", 2), Site("resid_post"), Site("attn_out", 3)]
    assert [str(s) for s in sorted(sites)] == ["attn_out.3", "logits", "resid_post", "resid_post.2", "resid_post.10"]


def test_which_sites_have_layers() -> None:
    assert {name for name in SITE_NAMES if not Site(name).per_layer} == set(WHOLE_MODEL)


@pytest.mark.parametrize(
    ("spec", "n_layers", "layers"),
    [
        (0, 12, [0]),
        (-1, 12, [11]),
        ([3, 1, -1, 3], 12, [3, 1, 11]),
        ((5,), 6, [5]),
        (range(2, 5), 6, [2, 3, 4]),
        ("all", 3, [0, 1, 2]),
        ("last", 3, [2]),
        ("middle", 12, [4, 5, 6, 7]),
        ("middle", 4, [1, 2]),
        ("middle", 1, [0]),
    ],
)
def test_layers(spec: object, n_layers: int, layers: list[int]) -> None:
    assert resolve_layers(spec, n_layers) == layers


@pytest.mark.parametrize("spec", [12, -13, [0, 12]])
def test_layers_out_of_range(spec: object) -> None:
    with pytest.raises(LayerRangeError, match="12 layers"):
        resolve_layers(spec, 12)
    with pytest.raises(IndexError):
        resolve_layers(spec, 12)


@pytest.mark.parametrize("spec", ["al", [], None, 1.5, [1.5], [True], ["all"], True])
def test_layers_that_are_none(spec: object) -> None:
    with pytest.raises(OptionError):
        resolve_layers(spec, 12)


def test_expansion_keeps_the_order_asked() -> None:
    sites = expand_sites(Depth(4), ["mlp_out", "logits", "blocks.1.hook_resid_pre", "mlp_out.3"], [-1, 0])
    assert [str(s) for s in sites] == ["mlp_out.3", "mlp_out.0", "logits", "resid_pre.1"]


def test_expansion_counts_the_layers_of_each_stack() -> None:
    both = expand_sites(Depth(4, decoder=2), ["encoder.resid_post", "decoder.resid_post.-1", "logits"])
    assert [str(site) for site in both] == [
        *(f"encoder.resid_post.{layer}" for layer in range(4)),
        "decoder.resid_post.1",
        "logits",
    ]
    with pytest.raises(LayerRangeError, match="2 layers"):
        expand_sites(Depth(4, decoder=2), "decoder.resid_post", [3])
    with pytest.raises(SiteUnavailableError):
        expand_sites(Depth(4, decoder=2), "resid_post")


def test_expansion_without_layers_means_all() -> None:
    assert [s.layer for s in expand_sites(Depth(3), "resid_post")] == [0, 1, 2]


def test_all_layers_are_those_that_have_the_site() -> None:
    for layers in (None, "all", "middle"):
        found = expand_sites(Depth(4, lacks="router_logits.1"), "router_logits", layers)
        assert [site.layer for site in found] == ([2] if layers == "middle" else [0, 2, 3])
        with pytest.raises(SiteUnavailableError, match=r"no q\."):
            expand_sites(Depth(4, lacks="q"), "q", layers)
    with pytest.raises(SiteUnavailableError, match=r"no router_logits\.1"):
        expand_sites(Depth(4, lacks="router_logits.1"), "router_logits", [0, 1])


def test_expansion_refuses_before_any_work() -> None:
    with pytest.raises(SiteUnavailableError):
        expand_sites(Depth(4, lacks="resid_mid"), ["resid_post", "resid_mid"])
    with pytest.raises(LayerRangeError):
        expand_sites(Depth(4), "resid_post.4")
    with pytest.raises(OptionError):
        expand_sites(Depth(4), [])


def test_any_layer_is_a_name_that_waits_for_layers() -> None:
    for text in ("resid_post.*", "blocks.*.hook_resid_post"):
        assert Site.parse(text) == Site("resid_post")
        assert expand_sites(Depth(3), text) == [Site("resid_post", layer) for layer in range(3)]
        assert expand_sites(Depth(3), [text], [2, 0]) == [Site("resid_post", 2), Site("resid_post", 0)]
    assert Site.parse("pattern.*.3") == Site("pattern", None, 3)
    assert Site.parse("encoder.attn_out.*") == Site("attn_out", stack="encoder")
    for text in ("embed.*", "resid_post.*.1", "pattern.3.*", "resid_*.1", "blocks.*.hook_resid"):
        with pytest.raises(UnknownSiteError):
            Site.parse(text)


@pytest.mark.parametrize("layers", [[0], 2, "all", "last"])
def test_layers_that_choose_nothing(layers: object) -> None:
    message = rf"layers={re.escape(repr(layers))} chooses nothing: site 'resid_post.1' names its layer.*'resid_post'"
    with pytest.raises(OptionError, match=message):
        expand_sites(Depth(3), ["resid_post.1", "attn_out.0"], layers)
    with pytest.raises(OptionError, match=r"site 'embed' has no layers. Leave layers out$"):
        expand_sites(Depth(3), "embed", layers)
    assert Site("attn_out", 0) in expand_sites(Depth(3), ["resid_post", "attn_out.0"], layers)
