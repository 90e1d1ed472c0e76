"""What kernels do, by their release."""

from __future__ import annotations

import pytest

from orchestrator.release import drops_waiting_packets, idles_iptables, version


@pytest.mark.parametrize(("release", "expected"), [("6.1.0-56-amd64", (6, 1)), ("7.3", (7, 3)), ("odd", (6, 1))])
def test_versions(release: str, expected: tuple[int, int]) -> None:
    assert version(release) == expected


@pytest.mark.parametrize(
    ("release", "drops", "forgets"),
    [
        ("5.10.0-9-amd64", True, False),
        ("6.1.0-56-amd64", True, True),
        ("6.11.2", True, True),
        ("6.12.1", True, False),
        ("7.2-rc1", True, False),
        ("7.3.4+deb13", False, False),
        ("10.0", False, False),
    ],
)
def test_what_kernels_do(release: str, *, drops: bool, forgets: bool) -> None:
    assert (drops_waiting_packets(release), idles_iptables(release)) == (drops, forgets)
