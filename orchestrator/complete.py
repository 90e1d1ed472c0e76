"""What the shell offers when Tab is pressed: names of namespaces, profile files, applied profiles. Files are listed,
nothing is opened, and the kernel is not asked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_NETNS_DIR = "/run/netns"
_PROFILE_SUFFIXES = (".yaml", ".yml")


def netns_names(incomplete: str) -> list[str]:
    """Named namespaces, as `ip netns` makes them."""
    return sorted(name for name in _listed(_NETNS_DIR) if name.startswith(incomplete))


def profile_files(incomplete: str) -> list[str]:
    """Profiles, and directories that may hold some, each with a slash behind."""
    directory, _, begun = incomplete.rpartition("/")
    prefix = f"{directory}/" if "/" in incomplete else ""
    return sorted(
        f"{prefix}{name}/" if os.path.isdir(prefix + name) else prefix + name  # noqa: PTH112
        for name in _listed(prefix or ".")
        if name.startswith(begun) and (begun or not name.startswith("."))
        if name.endswith(_PROFILE_SUFFIXES) or os.path.isdir(prefix + name)  # noqa: PTH112
    )


def applied_profiles(incomplete: str) -> list[str]:
    """Names of profiles that have a runtime directory, PROFILE@NAMESPACE."""
    state_dir = os.environ.get("ORCH_STATE_DIR", "/run/orch")
    names = {name.partition("@")[0] for name in _listed(state_dir) if "@" in name}
    return sorted(name for name in names if name.startswith(incomplete))


def applied_or_files(incomplete: str) -> list[str]:
    return [*applied_profiles(incomplete), *profile_files(incomplete)]


def _listed(directory: str) -> Iterator[str]:
    """Nothing where there is no such directory: a shell shows no errors."""
    with contextlib.suppress(OSError):
        yield from os.listdir(directory)  # noqa: PTH208 (pathlib would be a third of the time)
