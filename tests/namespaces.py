"""Network namespaces of a test's own."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named_netns() -> Iterator[str]:
    """A namespace with a name that no other has; gone after the block, unless it went before."""
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        if Path("/run/netns", name).exists():
            subprocess.run(["ip", "netns", "delete", name], check=True)
