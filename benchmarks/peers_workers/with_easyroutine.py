"""The work of `benchmarks/peers.py` with easyroutine, which takes models of its own list of names only."""

from __future__ import annotations

from _worker import Peer, serve


class Easyroutine(Peer):
    distribution = "easyroutine"

    def __init__(self) -> None:
        from easyroutine.interpretability import HookedModel

        self._class = HookedModel

    def load(self, folder: str) -> None:
        # A folder is refused here, whatever its architecture: what follows has nothing to run on.
        self._class.from_pretrained(folder, device_map="cpu")


if __name__ == "__main__":
    serve(Easyroutine)
