"""What tests that run nnsight in their own process need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Not imported to find that out: importing it changes the process, and every file is imported by every worker.
needs_nnsight = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed")


@pytest.fixture(scope="module", autouse=True)
def plain_backward() -> Iterator[None]:
    """Once imported, nnsight parses the source of whoever calls `Tensor.backward`, which Python 3.11 cannot do in two
    threads at a time: not so in other tests of this process."""
    before = torch.Tensor.backward
    yield
    torch.Tensor.backward = before  # type: ignore[method-assign]
