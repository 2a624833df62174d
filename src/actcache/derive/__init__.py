"""Results computed from activations: what they are called in a store, and how they come out of it."""
