"""Two small things that are done with activations again and again: the difference of two means, and a probe."""
