"""Rules that attach helpers, as nft and iptables list them; what is loaded goes into a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.kernel import netns
from orchestrator.kernel.helper_rules import flowtables, helper_rules, nft_helper_rules, saved_helper_rules
from orchestrator.kernel.modules import module_present
from orchestrator.kernel.netns import scratch
from orchestrator.model import Backend, L3Proto, L4Proto, Netns
from orchestrator.ports import HelperRule

live = pytest.mark.skipif(
    os.geteuid() != 0 or not module_present("nf_conntrack_ftp") or shutil.which("iptables-legacy") is None,
    reason="needs root, nf_conntrack_ftp and iptables",
)

TABLE = """
table inet mine {
    ct helper four { type "ftp" protocol tcp; l3proto ip; }
    ct helper both { type "ftp" protocol tcp; }
    chain early { type filter hook prerouting priority raw; tcp dport 21 ct helper set "four"; jump shared; }
    chain usual {
        type filter hook output priority mangle
        ct helper set tcp dport map { 21 : "four", 2121 : "both" }
        tcp dport vmap { 990: goto shared }
    }
    chain shared { ct state established ct helper set "both"; ct state { new, established } ct helper set "both"; }
    chain lost { ct state != established ct helper set "both"; }
}
"""


def said(rules: tuple[HelperRule, ...]) -> list[tuple[object, ...]]:
    return [(r.place, r.helper, r.families, [hook for hook, _ in r.hooks], r.is_late) for r in rules]


@pytest.fixture
def space() -> Iterator[Netns]:
    with scratch():
        yield netns.own()


def nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text.replace("; }", "\n}").replace(";", "\n"), text=True, check=True)


@live
def test_nftables(space: Netns) -> None:
    nft(TABLE)
    both, four = tuple(L3Proto), (L3Proto.IP,)
    ways = ["output", "prerouting"]
    assert said(helper_rules(space)) == [
        ("inet mine early", "ftp", four, ["prerouting"], False),
        ("inet mine lost", "ftp", both, [], False),
        ("inet mine shared", "ftp", both, ways, True),
        ("inet mine shared", "ftp", both, ways, False),
        ("inet mine usual", "ftp", both, ["output"], False),
        ("inet mine usual", "ftp", four, ["output"], False),
    ]
    assert next(rule.hooks for rule in helper_rules(space)) == (("prerouting", -300),)
    assert flowtables(space) == ()


@live
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_iptables(space: Netns, variant: str) -> None:
    for program in ("iptables", "ip6tables"):
        command = [f"{program}-{variant}", "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "--dport", "21"]
        subprocess.run([*command, "-j", "CT", "--helper", "ftp"], check=True, capture_output=True)
    backend = Backend(f"iptables-{variant}")
    assert [(r.place, r.helper, r.families, r.backend) for r in helper_rules(space)] == [
        (f"ip raw OUTPUT ({backend})", "ftp", (L3Proto.IP,), backend),
        (f"ip6 raw OUTPUT ({backend})", "ftp", (L3Proto.IP6,), backend),
    ]


@live
def test_looking_loads_no_module(space: Netns) -> None:
    before = sorted(path.name for path in Path("/sys/module").iterdir())
    assert helper_rules(space) == ()
    assert flowtables(space) == ()
    assert sorted(path.name for path in Path("/sys/module").iterdir()) == before


SAVED = """
*raw
:PREROUTING ACCEPT [0:0]
:orch-ftp-pre - [0:0]
-A PREROUTING -j orch-ftp-pre
-A PREROUTING -p udp -m udp --dport 69 -j CT --helper tftp
-A PREROUTING -p tcp -m comment --comment "a b" -j CT --notrack
-A orch-ftp-pre -s 10.0.0.0/8 -p tcp -m tcp --dport 21 -j CT --helper ftp-us
COMMIT
"""


def test_saved_text() -> None:
    found = saved_helper_rules(SAVED, L3Proto.IP6, Backend.IPTABLES_LEGACY)
    assert [(r.place, r.helper, r.l4proto, r.is_ours) for r in found] == [
        ("ip6 raw PREROUTING (iptables-legacy)", "tftp", L4Proto.UDP, False),
        ("ip6 raw orch-ftp-pre (iptables-legacy)", "ftp-us", L4Proto.TCP, True),
    ]


def test_a_table_without_helpers_has_none() -> None:
    place = {"family": "inet", "table": "t"}
    chain = {"chain": {**place, "name": "c", "hook": "input", "prio": 0}}
    assert nft_helper_rules([chain, {"rule": {**place, "chain": "c", "expr": [{"accept": None}]}}]) == ()
