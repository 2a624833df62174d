"""One extraction on many workers: units of an input, and what runs them."""
