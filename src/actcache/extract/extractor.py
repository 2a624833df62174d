"""ActivationExtractor: many prompts through a model, in good batches, no cache involved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.capture.positions import check_positions, each_prompt, resolve_positions
from actcache.derive.results import LOGITS, NOTHING, Asked
from actcache.errors import OptionError, SiteUnavailableError, UnknownSiteError, did_you_mean, require_choice
from actcache.extract.activations import Activations
from actcache.extract.attempts import Attempts, check_retries
from actcache.extract.backends import DRY_RUN, Backend, Pooling, Reduction, Remote, Rows, Setting
from actcache.extract.backends.registry import open_backend, refuse_remote
from actcache.extract.batching import Batch, check_limits, make_batches, token_budget
from actcache.extract.declared import check_edited, declared_edits
from actcache.extract.inventory import layers_of
from actcache.extract.prompts import Prompt, check_tokens, positions_of, read_prompts, tokenize
from actcache.model.decoder_inputs import require_decoder_start
from actcache.model.loading import open_source
from actcache.model.options import LoadOptions
from actcache.model.sites import POOLINGS, Site, require_use_of_layers, resolve_layers, takes_what_is_there
from actcache.progress import progress

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from actcache.capture.ready_made import ReadyMade
    from actcache.model.source import ModelSource

# Logits of a batch when all are kept.
_LOGIT_BYTES = 128 << 20

BatchRows = Mapping[str, "torch.Tensor"]


class ActivationExtractor:
    """Runs prompts through a model and hands back the activations of chosen sites.

    Args:
        model: Hub id, local folder, or a loaded transformers model.
        tokenizer: an object, folder or Hub id; by default the model's own.
        sites: site names (`ac.sites(model)` lists them), e.g. ``"resid_post"`` or ``["attn_out.3", "logits"]``. Heads
            lie side by side in a row (``"head_out.3.7"`` is one of them); ``"pattern"`` has no rows. Those of an
            encoder-decoder model begin with their stack, ``"encoder.resid_post"``. Its decoder is given the prompt
            shifted right behind the start token, so that row ``i`` there is the state that predicts token ``i``.
        layers: which blocks for names without a layer: int, list, ``"all"``, ``"last"`` or ``"middle"``; of "all" and
            of the "middle" those that have the site (for which a model may be loaded, once on a host).
        pooling: None for every token, or ``"last_token"``, ``"first_token"``, ``"mean"``, ``"max"``, ``"min"``,
            or a function ``tensor[T, D] -> tensor[D]``.
        positions: which tokens count, before pooling; real tokens only (`resolve_positions`). `ac.tokens_of` for
            prompts that are chats.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...; a loaded model stays where it is.
        dtype: compute dtype; None means float32 (a loaded model keeps its own).
        batch_size: upper bound on prompts per batch; None leaves it to the token budget.
        max_batch_tokens: padded tokens per batch; None takes what suits the device.
        backend: what runs the model: ``"local"`` (transformers), ``"nnsight"``, or the name under which an installed
            package offers one (docs/backends.md).
        remote: run it elsewhere: True at the backend's service (of nnsight that is NDIF, with ``NDIF_API_KEY``), or
            at a server with this address.
        add_special_tokens: whether text gets the tokenizer's special tokens.
        allow_hooks: names of hooks on a loaded model that are known not to change what is read.
        edits: ready-made edits (`ac.ablate`, `ac.steer`, `ac.patch`, `ac.knockout`) to run the model with; what is
            stored is stored apart from what other edits, or none, give. They mean the same for every prompt.

    Raises:
        OptionError, ModelLoadError, UnknownSiteError, SiteUnavailableError, LayerRangeError: before any weights are
            read.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        sites: str | Sequence[str] = "resid_post",
        layers: Any = "all",
        pooling: Pooling = None,
        positions: Any = "all",
        device: str = "auto",
        dtype: Any = None,
        revision: str | None = None,
        batch_size: int | None = None,
        max_batch_tokens: int | None = None,
        backend: str = "local",
        remote: Remote = False,
        trust_remote_code: bool = False,
        token: str | bool | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool = True,
        allow_hooks: Sequence[str] = (),
        edits: ReadyMade | Sequence[ReadyMade] = (),
    ) -> None:
        given = dict(locals())
        self._made_of = {name: given[name] for name in given if name != "self"}
        self._elsewhere: dict[Remote, ActivationExtractor] = {}
        self.remote = remote
        if backend == "local":
            refuse_remote(backend, remote)
        check_limits(batch_size, max_batch_tokens)
        if pooling is not None and not callable(pooling):
            require_choice(pooling, POOLINGS, "pooling")
        check_positions(positions, chats=True)
        if isinstance(positions, list) and any(isinstance(p, list) for p in positions):
            raise OptionError(
                "positions has a list for each prompt: give those to get_activations(..., positions=...)."
            )
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise OptionError(f"model_kwargs is {model_kwargs!r}: expected a dict of arguments of from_pretrained.")
        options = LoadOptions(
            dtype=dtype,
            device=str(device),
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization_config=quantization_config,
            model_kwargs=dict(model_kwargs or {}),
            allow_hooks=tuple(allow_hooks),
        )
        self.source: ModelSource = open_source(model, options, tokenizer, elsewhere=remote not in (False, DRY_RUN))
        self.edits = declared_edits(edits, self.source)
        self.source.edits = tuple(edit.identity() for edit in self.edits)
        self.source.needs_probabilities = any(edit.needs_probabilities for edit in self.edits)
        # The local one comes with torch, which a warm run may do without.
        self._backend: Backend | None = None
        self._backend_name = backend
        if backend != "local":
            self.source.engine = dict(self.backend().identity)
        self.reduction = Reduction(pooling, positions)
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.add_special_tokens = add_special_tokens
        self._asked = [sites] if isinstance(sites, str) else list(sites)
        self._layers = layers
        self._site_names: dict[str, list[str]] | None = None
        read = check_sites(self._asked, layers, self.source)
        if self.source.stacks != (None,) and any(site.stack != "encoder" for site in read):
            require_decoder_start(self.source.config)

    @property
    def site_names(self) -> dict[str, list[str]]:
        """Complete site names by the name asked for; see `complete_sites`."""
        if self._site_names is None:
            self._site_names = complete_sites(self._asked, self._layers, self.source)
        return self._site_names

    @property
    def sites(self) -> list[str]:
        """Every complete site name that is read, in the order asked."""
        return list(dict.fromkeys(name for names in self.site_names.values() for name in names))

    def extract(self, prompts: Prompt | Iterable[Prompt], *, max_retries: int | None = None) -> Activations:
        """Activations of `prompts` (text, token ids or chats; one string counts as a list of one).

        Args:
            max_retries: how often a batch that fails is tried again; None for 3 remote, and 0 here.

        Raises:
            PromptError, PromptTypeError, TokenizerError: a prompt that cannot be run, before any is.
            EngineError: what runs the model elsewhere failed, or cannot be reached.
        """
        check_retries(max_retries)
        read = read_prompts(prompts)
        everything = range(len(read))
        tokenize(read, everything, self.source, add_special_tokens=self.add_special_tokens)
        check_tokens(read, everything, self.source)
        check_edited(read, everything, self.edits)
        special = self.add_special_tokens
        positions = positions_of(self.reduction.positions, read, self.source, add_special_tokens=special)
        ids = [i for i in read.ids if i is not None]
        where = each_prompt(positions, len(ids))
        self.backend().check(self.sites)
        parts: dict[str, list[torch.Tensor | None]] = {site: [None] * len(ids) for site in self.sites}
        with progress(len(ids), "extracting") as bar:
            for batch, rows in self.batches(
                ids,
                self.sites,
                positions=None if positions is self.reduction.positions else where,
                max_retries=max_retries,
            ):
                counts = [len(resolve_positions(where[i], len(ids[i]))) for i in batch.indices]
                for site, tensor in rows.items():
                    for i, part in zip(batch.indices, self._split(tensor, counts), strict=True):
                        parts[site][i] = part
                bar.update(len(batch.indices))
        return self._gather(parts, ids)

    def _split(self, tensor: torch.Tensor, counts: list[int]) -> Sequence[torch.Tensor]:
        import torch

        return torch.split(tensor, 1 if self.reduction.pooling is not None else counts)

    def _gather(self, parts: Mapping[str, list[Any]], ids: list[npt.NDArray[np.int32]]) -> Activations:
        import torch

        data = {site: torch.cat(rows) for site, rows in parts.items()}
        counts = [len(part) for part in next(iter(parts.values()))]
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Activations(data, offset, self.reduction.pooling is not None, ids)

    def backend(self) -> Backend:
        """The backend that runs the model."""
        if self._backend is None:
            self._backend = open_backend(self._backend_name, Setting(self.source, self.edits, self.remote))
        return self._backend

    def at(self, remote: Remote | None) -> ActivationExtractor:
        """The same extractor with its model there; itself where it is so already, or for None.

        Raises:
            OptionError: a backend that has no such place.
        """
        if remote is None or remote == self.remote:
            return self
        if remote not in self._elsewhere:
            there = type(self)(**{**self._made_of, "remote": remote})
            there._elsewhere[self.remote] = self
            self._elsewhere[remote] = there
        return self._elsewhere[remote]

    def batches(
        self,
        ids: Sequence[npt.NDArray[np.int32]],
        sites: Sequence[str],
        on_failure: Callable[[Batch, Exception], None] | None = None,
        *,
        positions: Sequence[Any] | None = None,
        asked: Asked = NOTHING,
        max_retries: int | None = None,
    ) -> Iterator[tuple[Batch, BatchRows]]:
        """Run `ids` in batches and yield each batch with its rows per site, while the next one runs on the device.

        `positions`: those of each prompt, None for the reduction's. `asked`: what is computed beside activations, and
        comes under `RESULT` and the name that it has in a store.
        A batch that fails is passed to `on_failure` and the rest goes on; without it the error is raised.
        Too little device memory halves a batch before it counts as failed; `Attempts` says what is tried again.
        """
        backend = self.backend()
        attempts = Attempts(backend, max_retries)
        budget = self.max_batch_tokens or token_budget(backend.device)
        if asked.logits is not None and asked.logits.names == (LOGITS,) and asked.logits.positions == "all":
            # They are handed over for a whole batch.
            budget = min(budget, max(1, _LOGIT_BYTES // (4 * (self.source.vocab_size or 1))))
        with backend.session(sites, self.reduction, asked) as session:
            todo = make_batches(
                [len(i) for i in ids],
                max_tokens=budget,
                batch_size=self.batch_size,
                together=session.policy.lengths,
            )
            in_flight: list[tuple[Batch, Rows]] = []
            for part, rows in attempts.all_rows(session, todo, ids, positions, on_failure):
                in_flight.append((part, rows))
                # A copy still under way is waited for while the next batch runs; rows that are
                # here go out at once, so that a kill loses no finished batch.
                while in_flight and (in_flight[0][1].ready or len(in_flight) > 1):
                    done, arrived = in_flight.pop(0)
                    yield done, arrived.wait()
            for done, arrived in in_flight:
                yield done, arrived.wait()


def complete_sites(sites: str | Sequence[str], layers: Any, source: ModelSource) -> dict[str, list[str]]:
    """Complete site names by the name asked for: ``{"resid_post": ["resid_post.0", ...], "logits": ["logits"]}``.

    Of "all" layers, and of the "middle", those that have the site are taken; any other layer is taken as it is asked
    for, and an error when it is to be run without having the site.

    Raises:
        UnknownSiteError, SiteUnavailableError, LayerRangeError, OptionError.
    """
    asked = [sites] if isinstance(sites, str) else list(sites)
    complete: dict[str, list[str]] = {}
    for text, site in zip(asked, check_sites(asked, layers, source), strict=True):
        if site.complete:
            complete.setdefault(str(site), [str(site)])
            continue
        chosen = resolve_layers("all" if layers is None else layers, source.depth(site.stack))
        if takes_what_is_there(layers):
            having = set(layers_of(source, site.name, site.stack))
            chosen = [layer for layer in chosen if layer in having] or chosen
        complete[text] = [str(replace(site, layer=layer)) for layer in chosen]
    return complete


def chosen_sites(extractor: ActivationExtractor, site: str | None, layers: Any) -> dict[str, list[str]]:
    """Of what `extractor` gives, complete site names by the name asked for: those of one `site`, at some `layers`.

    Raises:
        UnknownSiteError, LayerRangeError; OptionError for layers that it does not give.
    """
    groups = extractor.site_names
    if site is not None:
        if site not in groups:
            named = complete_sites(site, None, extractor.source)
            complete = [name for name in named if name in extractor.sites]
            if not complete:
                known = [*groups, *extractor.sites]
                raise UnknownSiteError(
                    f"site {site!r} is not among this cache's sites {list(groups)}.{did_you_mean(site, known)}"
                )
            groups = {site: complete}
        else:
            groups = {site: groups[site]}
    if layers is None:
        return groups
    chosen: dict[str, list[str]] = {}
    for name, given in groups.items():
        wanted = complete_sites(name, layers, extractor.source)
        chosen[name] = next(iter(wanted.values()))
        absent = [n for n in chosen[name] if n not in given]
        if absent:
            raise OptionError(
                f"layers={layers!r} asks for {absent[0]!r}, and this cache holds {given}: add it to layers=."
            )
    return chosen


def check_sites(sites: Sequence[str], layers: Any, source: ModelSource) -> list[Site]:
    """`sites` as they are read, layers counted from the front; what cannot be extracted is refused, without a look at
    the model's weights.

    Raises:
        UnknownSiteError, SiteUnavailableError, LayerRangeError, OptionError.
    """
    if not sites:
        raise OptionError("sites is empty: expected at least one site, for example 'resid_post'.")
    # What is said by default, "all", may stand beside complete names.
    by_default = isinstance(layers, str) and layers == "all"
    require_use_of_layers([Site.parse(text) for text in sites], None if by_default else layers)
    found = []
    for text in sites:
        site = Site.parse(text)
        bare = str(replace(site, stack=None))
        if site.name == "pattern":
            raise SiteUnavailableError(
                f"site {text!r} has no row for each token but one for each pair of them, and is not extracted: "
                "ac.capture holds it for a pass, ac.extract_batches for many prompts."
            )
        if site.name == "logits":
            if site.stack is not None:
                raise SiteUnavailableError(f"site {text!r}: logits belong to the whole model, write 'logits'")
        else:
            source.require_stack(site.stack, bare)
            if site.layer is not None:
                site = replace(site, layer=resolve_layers(site.layer, source.depth(site.stack))[0])
            elif site.per_layer:
                resolve_layers("all" if layers is None else layers, source.depth(site.stack))
        found.append(site)
    return found
