"""Rules that use connection labels, as nft and iptables list them; what is loaded goes into a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.kernel import labels, netns
from orchestrator.kernel.labels import foreign_labels
from orchestrator.kernel.netns import scratch
from orchestrator.model import Netns
from orchestrator.ports import LabelRule

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("nft", "iptables-nft"))), reason="needs root, nft and iptables"
)

TABLES = """
table inet mine {
    chain pre {
        type filter hook prerouting priority mangle
        tcp dport 21 ct label set 77
        ct label 78 counter
        ct label != 5 ct mark set 1
    }
}
table inet orch-ftp {
    chain pre {
        type filter hook prerouting priority mangle
        ct label set 9
    }
}
"""


@pytest.fixture
def space() -> Iterator[Netns]:
    with scratch():
        yield netns.own()


def test_nftables(space: Netns) -> None:
    subprocess.run(["nft", "-f", "-"], input=TABLES, text=True, check=True)
    assert foreign_labels(space) == tuple(LabelRule("inet mine pre", bit) for bit in (5, 77, 78))


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_iptables(space: Netns, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "connlabel.conf"
    names.write_text("# names\n12 video\nnonsense\n")
    monkeypatch.setattr(labels, "_NAMES", (names,))
    for program, table, label in (("iptables", "mangle", "9"), ("ip6tables", "filter", "127")):
        match = ("-m", "connlabel", "--label", label)
        command = [f"{program}-{variant}", "-t", table, "-A", "OUTPUT", *match]
        subprocess.run(command, check=True, capture_output=True)
    assert foreign_labels(space) == (
        LabelRule(f"ip mangle (iptables-{variant}) OUTPUT", 9),
        LabelRule(f"ip6 filter (iptables-{variant}) OUTPUT", 127),
    )
    assert labels._named_bits() == {"video": 12}


def test_looking_loads_no_module(space: Netns) -> None:
    before = sorted(path.name for path in Path("/sys/module").iterdir())
    assert foreign_labels(space) == ()
    assert sorted(path.name for path in Path("/sys/module").iterdir()) == before
