"""Features of an autoencoder for all that is stored of a site, kept as rows of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache.capture.encoding import Encoder, trained_on
from actcache.derive.autoencoder import autoencoder, autoencoder_digest, evaluating
from actcache.derive.features import FEATURES, Features, features_space, stored_site
from actcache.errors import NotCachedError, OptionError
from actcache.extract.cached import CachedExtractor
from actcache.model.sites import Site
from actcache.progress import progress
from actcache.store.keys import Ints
from actcache.store.placement import Placement
from actcache.store.prompts import PromptTable
from actcache.store.records import SPARSE, TOKENS
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.sparse import LARGEST, SparseSite, sparse_name
from actcache.store.store import Store
from actcache.store.tensors import to_array, to_tensor
from actcache.store.writer import SegmentWriter

# Vectors that are read, and features that are held before those that are zero are dropped, at a time.
_TOKENS_AT_ONCE, _NUMBERS_AT_ONCE = 8192, 1 << 24
_TRIED, _MAY_DIFFER = 8, 0.2
_NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


@torch.no_grad()
def encode_store(
    source: Any,
    sae: Any,
    site: str | Site,
    *,
    space: str | SpaceInfo | None = None,
    pooling: str | None = None,
    digest: str | None = None,
    name: str | None = None,
    model: torch.nn.Module | None = None,
    show_progress: bool | None = None,
) -> Features:
    """Encode every stored vector of `site` with an autoencoder, and store the features that are not zero.

        features = ac.encode_store(cache, sae, "resid_post.6")
        features.read(["The Eiffel Tower is in"])[0].to_dense()     # [T, n_features], what sae.encode gives

    They are stored beside the activations, in a space of their own: of this autoencoder (a digest of its weights and
    config), these activations and this site, so that others never pass for them. Prompts that have features are left as
    they are, and each batch is durable when it is done: run it again to go on after a kill, or when prompts were added.
    Memory does not depend on how much is stored. The autoencoder is evaluated without gradients and in evaluation mode,
    each prompt as it is, on its own device and in its own dtype.

    Args:
        source: an `ac.UnifiedCache`, or an `ac.Store` with `space`.
        sae: an autoencoder of SAELens or dictionary_learning, any module with `encode`, or, with `digest`, any object
            with `encode` or function: of vectors ``[B, T, D]``, features ``[B, T, n]``. One that says what it was
            trained on is refused for another site.
        site: a site as it is stored, such as ``"resid_post.6"``.
        space: the space of a store whose vectors are encoded.
        pooling: of which pooled vectors (default: those of the cache; of a store every token).
        digest: a name for what `sae` computes, where it is no module of torch.
        name: what the features are called in lists (default: the model's name, the site and the digest).
        model: the model of a store's vectors, for an autoencoder that was trained behind one of its norms, or on a
            centred stream: only the model knows how these are made. A cache has its own.
        show_progress: a bar; None: only on a terminal.

    Raises:
        OptionError: no autoencoder, nothing that tells it from others, vectors of another width; before anything is
            written.
        WrongSiteError: it was trained on another site.
        NotCachedError: nothing is stored at that site; or, when all others are stored, prompts that turned out damaged.
    """
    store, of, pooling, cached = _source(source, space, pooling)
    site = Site.parse(site) if isinstance(site, str) else site
    encoder = autoencoder(sae)
    trained = trained_on(encoder, site)
    prepared = "normalised" if trained.normalised else "centred" if trained.centred else None
    target = features_space(of, str(site), pooling, autoencoder_digest(encoder, digest), name, prepared)
    if prepared and model is None:
        if cached is None:
            raise OptionError(
                f"the SAE was trained on {trained} of a model whose stream was {prepared}, and no store knows how: "
                "give model=, or the ac.UnifiedCache of the model"
            )
        model = cached.extractor.source.model()
    if store.limit.value == 0:
        raise OptionError(f"store {store.location} has a limit of 0 and keeps nothing: raise it (ac.set_cache_limit).")
    spaces = [of.space]
    if cached is not None:
        # Of datasets that claim no more than the name nobody knows whether they are of this model.
        pulled = store.pulled_for(of.space, of.model_name, names=None)
        spaces += [one.info.space for one in pulled if one.offers([str(site)], pooling or TOKENS)]
    work = _Work(store, spaces, str(site), pooling, Encoder(encoder, trained, None, model))
    with evaluating(sae):
        encoded, found = work.run(target, show_progress)
    if store.limit.value is not None:
        store.evict()
    assert work.size is not None
    return Features(store, target.space, str(site), pooling, work.size, encoded, found)


def _source(
    source: Any, space: str | SpaceInfo | None, pooling: str | None
) -> tuple[Store, SpaceInfo, str | None, CachedExtractor | None]:
    """The store, the space in it, and the pooling that are meant; the cache, where it is one."""
    if isinstance(source, Store):
        if space is None:
            raise OptionError("an ac.Store holds several spaces: name the one to encode, space=... (store.spaces()).")
        wanted = space if isinstance(space, str) else space.space
        found = next((one for one in source.spaces() if one.space == wanted), None)
        if found is None:
            # As every function that takes a space says it, with the nearest.
            source.contains(wanted, ["-"])
            raise NotCachedError(f"nothing is stored in space {wanted!r} of {source.location}.")
        return source, found, pooling, None
    cached = source if isinstance(source, CachedExtractor) else getattr(source, "cached", None)
    if not isinstance(cached, CachedExtractor):
        raise OptionError(
            f"source is a {type(source).__name__}: expected an ac.UnifiedCache, or an ac.Store with space=."
        )
    if space is not None:
        raise OptionError("space= names a space of an ac.Store; a cache has its own.")
    identity = cached.identity()
    found = SpaceInfo(space_id(identity.values), dict(identity.values), dict(identity.label))
    # Perhaps nothing of it is stored but what was pulled.
    cached.store.open_space(identity.values, identity.label)
    own = None if cached.layout == TOKENS else cached.layout
    return cached.store, found, pooling or own, cached


class _Work:
    """One autoencoder over one site of `spaces` of one model, of which earlier ones come first. `size`: how many
    features it has, once that is known."""

    def __init__(self, store: Store, spaces: Sequence[str], site: str, pooling: str | None, encoder: Encoder) -> None:
        if encoder.dims != 1:
            raise OptionError(
                "this autoencoder joins the heads itself, and stored vectors have theirs joined: "
                "sae.turn_off_forward_pass_hook_z_reshaping() makes it take them"
            )
        self._store, self._spaces, self._site, self._pooling = store, spaces, site, pooling
        self._encoder, self._tried = encoder, False
        self.size: int | None = None

    def run(self, target: SpaceInfo, show_progress: bool | None) -> tuple[int, int]:
        """Encode what is not in `target` yet: how many prompts that were, and how many were there."""
        parts = self._prompts()
        self._store.open_space(target.identity, target.label)
        known = stored_site(self._store, target.space, self._pooling)
        todo = []
        for space, table in parts:
            found = np.zeros(len(table), bool)
            if known is not None:
                self.size = known.size
                found = self._store.locate(target.space, table=table, sites=known.columns, layout=SPARSE).found
            todo.append((space, table, np.flatnonzero(~found)))
        every, left = (sum(map(len, some)) for some in ((table for _, table in parts), (m for _, _, m in todo)))
        if not left:
            return 0, every
        damaged = 0
        with (
            self._store.writer(target.space) as writer,
            progress(left, f"features of {self._site}", show=show_progress) as bar,
        ):
            for space, table, missing in todo:
                for chosen in _in_turn(missing, table.lengths):
                    damaged += self._encode(space, table.select(chosen), writer)
                    bar.update(len(chosen))
        if damaged:
            raise NotCachedError(
                f"{damaged} of {every} prompts that have {self._site!r} turned out damaged, or have gone: the "
                "features of the others are stored. Extract them again, and then call this again."
            )
        return left, every - left

    def _prompts(self) -> list[tuple[str, PromptTable]]:
        """Which prompts are encoded out of which space, each in one."""
        layout, found, seen = self._pooling or TOKENS, [], np.empty(0, "V16")
        for space in self._spaces:
            self._store.fetch(space, self._site, pooling=self._pooling)
            table = self._store.prompts(space, site=self._site, layout=layout)
            keys = np.ascontiguousarray(table.token_key).view("V16").reshape(-1)
            found.append((space, table.select(~np.isin(keys, seen)) if len(seen) else table))
            seen = np.concatenate([seen, keys])
        if not len(seen):
            # Which says what there is instead.
            self._store.statistics(self._spaces[0], self._site, pooling=self._pooling)
            raise NotCachedError(f"all prompts that had {self._site!r} ({layout}) are gone.")
        return found

    def _encode(self, space: str, table: PromptTable, writer: SegmentWriter) -> int:
        """Encode the prompts of `table`, which are in `space`, and hand them to `writer`; how many cannot be read."""
        layout = self._pooling or TOKENS
        placement = self._store.locate(space, table=table, sites=[self._site], layout=layout)
        here = np.flatnonzero(placement.found)
        rows = [values for (values,) in placement.all_rows(here)]
        parts: list[tuple[Ints, Ints, Any]] = [_NOTHING] * len(rows)
        lengths = np.array([len(values) for values in rows], np.int64)
        for length in np.unique(lengths).tolist():
            members = np.flatnonzero(lengths == length)
            start = 0
            while start < len(members):
                some = members[start : start + self._at_once(length)]
                given = torch.stack([to_tensor(rows[i]) for i in some.tolist()])
                for i, part in zip(some.tolist(), self._active(given), strict=True):
                    parts[i] = part
                start += len(some)
        assert self.size is not None or not len(here)
        for numbers, prompts in _by_context(placement, here):
            site = SparseSite(sparse_name(FEATURES, self._pooling), self.size or 1)
            mine = [parts[i] for i in numbers]
            position, index, value = (np.concatenate([part[k] for part in mine]) for k in range(3))
            writer.put(site.records(prompts, np.array([len(p[0]) for p in mine]), position, index, value))
        return len(table) - len(here)

    def _at_once(self, length: int) -> int:
        """How many prompts of this length are encoded together."""
        return max(1, _NUMBERS_AT_ONCE // (length * self.size)) if self.size else _TRIED

    def _active(self, rows: Tensor) -> Iterator[tuple[Ints, Ints, Any]]:
        """Positions, indices and values of what is not zero, for each of the prompts ``[B, T, D]``."""
        features = self._features(rows)
        if not self._tried and len(rows) > 1:
            self._try(rows[:_TRIED], features[:_TRIED])
        size = features.shape[-1]
        if self.size is None and size > LARGEST:
            raise OptionError(f"the autoencoder gives {size} features: expected at most {LARGEST}")
        if self.size not in (None, size):
            raise OptionError(f"the autoencoder gives {size} features, and gave {self.size} before")
        self.size = size
        for one in features:
            position, index = one.nonzero(as_tuple=True)
            value = to_array(one[position, index])
            yield position.cpu().numpy(), index.cpu().numpy(), value

    def _features(self, rows: Tensor) -> Tensor:
        if rows.dtype in (torch.float16, torch.bfloat16):
            # What the autoencoder computes in is its own matter.
            rows = rows.float()
        features = self._encoder.features(self._encoder.prepare(rows, heads_from=4))
        return features.to_dense() if features.layout != torch.strided else features

    def _try(self, rows: Tensor, together: Tensor) -> None:
        """OptionError where what a prompt gives depends on those beside it."""
        alone = torch.cat([self._features(one[None]) for one in rows])
        self._tried = True
        largest = float(together.abs().nan_to_num().max())
        other = ~torch.isclose(alone, together, rtol=0.02, atol=0.01 * largest, equal_nan=True).all(dim=-1)
        # Rounding may decide which of two features that are as good as equal is among the strongest.
        if float(other.float().mean()) > _MAY_DIFFER:
            raise OptionError(
                "what the autoencoder gives for a prompt depends on the prompts beside it, as of one that chooses the "
                "strongest features of a whole batch: give it as it is used after training"
            )


def _in_turn(prompts: Ints, lengths: Ints) -> Iterator[Ints]:
    """`prompts` in parts of few enough tokens."""
    ends = np.cumsum(lengths[prompts])
    cuts = np.flatnonzero(np.diff(ends // _TOKENS_AT_ONCE)) + 1
    yield from np.split(prompts, cuts)


def _by_context(placement: Placement, here: Ints) -> Iterator[tuple[list[int], PromptTable]]:
    """The prompts `here`, by what their texts became these ids under: their numbers among them, and what is stored."""
    tables = [placement.prompt(i) for i in here.tolist()]
    members: dict[str, list[int]] = {}
    for k, table in enumerate(tables):
        members.setdefault(table.text_context, []).append(k)
    for chosen in members.values():
        yield chosen, PromptTable.concatenate([tables[k] for k in chosen])
