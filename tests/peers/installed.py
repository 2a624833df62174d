"""Print the versions of the libraries that tests compare with, as JSON."""

from __future__ import annotations

import json
from importlib.metadata import version

import dictionary_learning.training  # noqa: F401
import nnsight  # noqa: F401
import sae_lens  # noqa: F401
import transformer_lens  # noqa: F401

import actcache

names = ("dictionary-learning", "nnsight", "sae-lens", "transformer-lens", "transformers")
print(json.dumps({"actcache": actcache.__version__, **{name: version(name) for name in names}}))
