"""Features of an autoencoder as a store keeps them: what they are called there, and reading them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from actcache.errors import NotCachedError, did_you_mean
from actcache.store.spaces import SpaceInfo, space_id
from actcache.store.sparse import SparseSite, sparse_name

if TYPE_CHECKING:
    import torch

    from actcache.store.prompts import PromptTable
    from actcache.store.store import Store

FEATURES = "features"
"""The site under which features are stored."""


class Occurrences(NamedTuple):
    """Where one feature is not zero: tensors ``[k]``, ordered by prompt and position.

    `prompt` int64: numbers in `Features.prompts`. `position` int64: of the token in its prompt, from 0 on; 0 for pooled
    vectors. `value`: in the dtype in which the autoencoder gave them.
    """

    prompt: torch.Tensor
    position: torch.Tensor
    value: torch.Tensor


def features_space(
    source: SpaceInfo, site: str, pooling: str | None, digest: str, name: str | None, prepared: str | None
) -> SpaceInfo:
    """The space of the features that an autoencoder of this `digest` has on a site of the space `source`.

    `prepared`: what is done to vectors before it is given them.
    """
    identity: dict[str, Any] = {FEATURES: digest, "of": source.space, "site": site}
    if pooling:
        identity["pooling"] = pooling
    if prepared:
        identity["prepared"] = prepared
    short = digest.partition(":")[2][:8] if digest.startswith("module:") else digest.partition(":")[2]
    label = {
        "model_name": name or f"{source.model_name}/{site}/{short}",
        "dtype": source.dtype,
        "of": source.model_name,
    }
    return SpaceInfo(space_id(identity), identity, label)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of an autoencoder for the prompts of a store: as `ac.encode_store` gives them, or `open` finds them.

    Attributes:
        store, space: where they are stored: ``store.read(space, prompts, "features")`` reads them, too.
        site: the site whose vectors were encoded.
        pooling: how these were pooled; None for every token.
        n_features: how many features there are.
        encoded: prompts that were encoded by the call that gave this.
        found: prompts that had been encoded before.
    """

    store: Store
    space: str
    site: str
    pooling: str | None
    n_features: int
    encoded: int = 0
    found: int = 0

    @classmethod
    def open(cls, store: Store, space: str | SpaceInfo) -> Features:
        """The features that `store` has in `space` (its id, or what it is called there).

        Raises:
            NotCachedError: there are none.
        """
        wanted = space if isinstance(space, str) else space.space
        spaces = [one for one in store.spaces() if FEATURES in one.identity]
        named = [one for one in spaces if wanted in (one.space, one.model_name)]
        for one in named[-1:]:
            pooling = one.identity.get("pooling")
            site = stored_site(store, one.space, pooling)
            if site is not None:
                return cls(store, one.space, str(one.identity.get("site")), pooling, site.size)
        names = [one.model_name for one in spaces]
        raise NotCachedError(
            f"no features {wanted!r} in store {store.location}.{did_you_mean(wanted, names)} "
            f"Stored: {', '.join(names) or 'none'}."
        )

    def prompts(self) -> PromptTable:
        """The prompts that have features, oldest first: their texts and token ids."""
        return self.store.prompts(self.space, site=self._site.columns[2], layout="sparse")

    def read(self, prompts: Any = None, *, positions: Any = None) -> Any:
        """Sparse tensors (COO) ``[T, n_features]``, one for each prompt; one ``[B, n_features]`` of pooled vectors.

        `prompts`: texts, token ids, chats, or None for all, in the order of `prompts()`. `positions` cuts rows, as of
        `Store.read`. ``.to_dense()`` gives what the autoencoder gave.

        Raises:
            NotCachedError: a prompt has none, or they turn out damaged.
        """
        return self.store.read(self.space, prompts, FEATURES, pooling=self.pooling, positions=positions)

    def where(self, feature: int) -> Occurrences:
        """Every token at which `feature` is not zero, among all prompts; LayerRangeError where there is no such one."""
        import torch

        from actcache.store.tensors import to_tensor

        prompt, position, value = self.store.sparse_column(self.space, self._site, self.prompts(), feature)
        return Occurrences(torch.from_numpy(prompt), torch.from_numpy(position), to_tensor(value))

    def counts(self) -> torch.Tensor:
        """At how many tokens each feature is not zero, int64 ``[n_features]``."""
        import torch

        return torch.from_numpy(self.store.sparse_counts(self.space, self._site, self.prompts()))

    @property
    def _site(self) -> SparseSite:
        return SparseSite(sparse_name(FEATURES, self.pooling), self.n_features)


def stored_site(store: Store, space: str, pooling: str | None) -> SparseSite | None:
    """Where the features of a space lie; None while there are none."""
    return store.sparse_site(space, FEATURES, pooling)
