"""Extraction through nnsight: its tracing here, or the same at a server of NDIF."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actcache.derive.results import NOTHING, Asked
from actcache.errors import MissingExtraError, OptionError, SiteUnavailableError
from actcache.extract.backends import DRY_RUN, Backend, Reduction, Setting
from actcache.model.plain import Plain, in_order, plain, require_plain, value_at
from actcache.model.sites import Site
from actcache.model.touched import our_forwards

if TYPE_CHECKING:
    import torch

    from actcache.extract.backends.local import LocalSession
    from actcache.extract.backends.shipped import ShippedSession
    from actcache.model.anatomy import Anatomy

WHY = "nnsight reads what modules are given and return"


def open_backend(setting: Setting) -> Backend:
    """The backend that ``backend="nnsight"`` names."""
    if setting.edits:
        raise OptionError("edits= are not run through nnsight: leave them out, or take backend='local'.")
    if setting.remote is False or setting.remote == DRY_RUN:
        return NNsightBackend(setting)
    from actcache.extract.backends.ndif import NDIFBackend

    return NDIFBackend(setting)


def require_nnsight() -> None:
    """Raise `MissingExtraError` where nnsight is not installed, or is too old."""
    try:
        from nnsight.intervention.source import STATE  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"backend='nnsight' needs nnsight 0.8 or later ({error}): pip install 'actcache[nnsight]'"
        ) from error


class NNsightBackend:
    """Runs the model of a source in this process, read by nnsight's tracing.

    The weights, the class, the dtype and the kernels are those of the local backend, and a pass computes the same
    operations in the same order; nnsight only hands out values on their way. So the identity is the local one's.
    """

    identity: Mapping[str, Any] = {}
    retries = 0

    def __init__(self, setting: Setting) -> None:
        self._source = setting.source
        self._remote = setting.remote

    @functools.cached_property
    def _local(self) -> Any:
        from actcache.extract.backends.local import LocalBackend

        return LocalBackend(Setting(self._source))

    @property
    def device(self) -> str:
        return str(self._local.device)

    def check(self, sites: Sequence[str], asked: Asked = NOTHING) -> None:
        for site in sites:
            require_plain(Site.parse(site), WHY)
        require_nnsight()
        self._source.model_to_run()

    @contextmanager
    def session(
        self, sites: Sequence[str], reduction: Reduction, asked: Asked = NOTHING
    ) -> Iterator[LocalSession | ShippedSession]:
        require_nnsight()
        if self._remote == DRY_RUN:
            with self._dry_run(sites, reduction, asked) as shipped:
                yield shipped
            return
        with self._local.session(sites, reduction, asked, observing=_traced) as local:
            yield local

    @contextmanager
    def _dry_run(self, sites: Sequence[str], reduction: Reduction, asked: Asked) -> Iterator[ShippedSession]:
        from nnsight.intervention.backends.local import LocalSimulationBackend

        from actcache.model.anatomy import describe

        with self._local.prepared(sites) as model:
            policy = self._source.batch_policy()
            reading = reading_of(describe(model), sites)
            with unwrapped_after(model):
                envoy = wrap(model)

                def send(block: Callable[[Any], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
                    return block(LocalSimulationBackend(_Objects(envoy)))

                yield shipped_session(envoy, send, model, policy, reduction, asked, reading)


class _Objects:
    """What a server has of a model, by the names under which a request refers to it."""

    def __init__(self, envoy: Any) -> None:
        self._envoy = envoy

    def _remoteable_persistent_objects(self) -> dict[str, Any]:
        modules = {f"Module:{part.path}": part._module for part in self._envoy.modules()}
        return {"Interleaver": self._envoy.interleaver, **modules}


def reading_of(anatomy: Anatomy, sites: Sequence[str]) -> tuple[list[Any], dict[str, Plain]]:
    """What is read, in the order of a pass, and where. Raises `SiteUnavailableError` for what cannot be."""
    places = {name: plain(anatomy, Site.parse(name), WHY) for name in sites}
    order = in_order(anatomy, places)
    reached = {name for _, _, names in order for name in names}
    if absent := [name for name in sites if name not in reached]:
        raise SiteUnavailableError(f"{', '.join(absent)} did not run in a short pass: ask for other sites.")
    return order, places


def shipped_session(
    envoy: Any, send: Any, model: Any, policy: Any, reduction: Reduction, asked: Asked, reading: Any
) -> ShippedSession:
    from actcache.extract.backends.shipped import ShippedSession
    from actcache.model.forward_inputs import ForwardInputs

    return ShippedSession(envoy, send, ForwardInputs(model, policy), policy, reduction, asked, *reading)


@contextmanager
def _traced(
    session: LocalSession, anatomy: Anatomy, module: torch.nn.Module, points: Mapping[str, Any], stop: bool
) -> Iterator[None]:
    """Let `session` run `module` in traces that hand it the values at `points`."""
    places = {name: plain(anatomy, Site.parse(name), WHY) for name in points}
    order = in_order(anatomy, places)
    with unwrapped_after(module):
        envoy = wrap(module)
        by_module = {id(part._module): part for part in envoy.modules()}
        reads = [
            (by_module[id(anatomy.model.get_submodule(path))], side == "input", names) for path, side, names in order
        ]

        def receive(name: str, value: Any, shape: tuple[int, ...]) -> None:
            logits = name == "logits"
            session.receive(name, points[name].extract(value) if logits else value_at(places[name], value, shape))

        def forward(inputs: dict[str, Any]) -> None:
            shape = tuple(inputs["input_ids"].shape)
            # fmt: off
            with envoy.trace(**inputs) as tracer:
                for part, given, names in reads:
                    value = part.inputs if given else part.output
                    for name in names:
                        receive(name, value, shape)
                if stop:
                    tracer.stop()
            # fmt: on

        session.forward = forward
        yield


def wrap(module: torch.nn.Module) -> Any:
    """`module` as nnsight wraps it."""
    from nnsight import NNsight

    with warnings.catch_warnings():
        # Parts that are called as nnsight calls what it serves (BERT's "output") are found all the same.
        warnings.filterwarnings("ignore", message=".*which nnsight already serves on every module")
        return NNsight(module)


@contextmanager
def unwrapped_after(module: torch.nn.Module) -> Iterator[None]:
    """Take away again what nnsight puts on modules: it would stay, and be somebody else's forward to us."""
    from nnsight.intervention.source import STATE

    before = [(part, STATE in part.__dict__, part.__dict__.get("forward")) for part in module.modules()]
    with our_forwards(module), _restoring(before, STATE):
        yield


@contextmanager
def _restoring(before: list[tuple[torch.nn.Module, bool, Any]], state: str) -> Iterator[None]:
    try:
        yield
    finally:
        for part, known, forward in before:
            if known:
                continue
            part.__dict__.pop(state, None)
            part.__dict__.pop("_persistent_id", None)
            if forward is None:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = forward


def model_key(repo_id: str, revision: str | None, *, trusted: bool) -> str:
    """What servers of NDIF call a causal language model: what nnsight's own `TransformersModel.to_model_key` says."""
    from nnsight.modeling.mixins.remotable import to_import_path
    from nnsight.modeling.transformers import TransformersModel

    data: dict[str, Any] = {"repo_id": repo_id, "revision": revision}
    if trusted:
        data["trust_remote_code"] = True
    return f"{to_import_path(TransformersModel)}:{json.dumps({**data, 'task': 'text-generation'})}"
