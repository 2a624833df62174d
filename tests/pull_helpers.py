"""Where what was pulled lies in a store."""

from __future__ import annotations

from actcache.store.records import PULLED


def pulled(store):
    """The only space of a store that was pulled."""
    (space,) = [space for space in store.spaces() if space.pulled]
    return space


def fetched(store, space):
    """What is in the store of a pulled space, beside where it is: layout -> sites."""
    return {layout: sites for layout, sites in store.held(space).items() if layout != PULLED}
