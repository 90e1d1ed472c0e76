"""How many examples of a law hypothesis tries."""

from __future__ import annotations

from hypothesis import settings


def many(usual: int) -> int:
    """For a law that needs another number than the usual hundred: in proportion, where that is less (tests.quick)."""
    return max(1, usual * settings().max_examples // 100)
