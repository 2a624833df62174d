"""One forward pass into memory: hooks on, values out, hooks off.

This room shares its name with its main function, and stands for it: ``ac.capture(...)`` is `hooks.capture`.
"""

from __future__ import annotations

from actcache._callable_room import stand_for

stand_for(__name__, "hooks")
