"""Proof, on the user's machine and model, that what is read, extracted and stored is what the model computes.

This room shares its name with its main function, and stands for it: ``ac.selftest(...)`` is `run.selftest`.
"""

from __future__ import annotations

from actcache._callable_room import stand_for

stand_for(__name__, "run")
