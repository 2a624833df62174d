"""A prompt in JSON."""

from __future__ import annotations

from typing import Any, TypeAlias

Prompt: TypeAlias = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or the messages of a chat."""
