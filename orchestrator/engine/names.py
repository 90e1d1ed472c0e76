"""File names in the runtime directory on which a helper process and those who look after it agree."""

from __future__ import annotations

NEXT = ".next"
"""After the name of a document: it is that of a successor, until it has taken over."""

NOT_HANDED_OVER = 75
"""The exit code of a successor to which its predecessor gave nothing."""


def handover_socket(name: str) -> str:
    """Where a process is asked to hand over its queues; the number is that of what is spoken there."""
    return f"{name}.handover-1"
