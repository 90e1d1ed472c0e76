"""Rules of others that stand before ours in table raw, as iptables lists them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from orchestrator.earlier import takes
from orchestrator.kernel import netns
from orchestrator.kernel.earlier_rules import earlier_rules, saved_earlier_rules
from orchestrator.kernel.netns import scratch
from orchestrator.model import Attachment, Backend, HelperKey, L3Proto, L4Proto, Netns, Path, PortRange
from orchestrator.ports import EarlierRule

live = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("iptables-legacy") is None, reason="needs root, and iptables"
)

SAVED = """
*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:orch-ftp-out - [0:0]
:orch-ftp-pre - [0:0]
:orch-web-pre - [0:0]
:theirs - [0:0]
{rules}
-A orch-ftp-pre -p tcp -m multiport --dports 21 -j CT --helper ftp-us
-A theirs -s 10.0.0.1/32 -j RETURN
-A theirs -j theirs
-A theirs -p udp -j DROP
COMMIT
"""
FTP = Attachment(HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP), Path.INCOMING, (PortRange(21, 21),), "lan0")


def found(*rules: str, hook: str = "PREROUTING", jump: str = "-j orch-ftp-pre") -> list[EarlierRule]:
    lines = "\n".join(f"-A {hook} {rule}" for rule in (*rules, jump, "-j ACCEPT"))
    return list(saved_earlier_rules(SAVED.format(rules=lines), L3Proto.IP, Backend.IPTABLES_NFT))


EARLIER = EarlierRule("ftp", "ip raw PREROUTING (iptables-nft)", "", "ACCEPT", L3Proto.IP, Path.INCOMING)
TCP = replace(EARLIER, l4proto=L4Proto.TCP)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-j ACCEPT", EARLIER),
        ("-j RETURN", replace(EARLIER, verdict="RETURN")),
        ("-g theirs", replace(EARLIER, verdict="theirs")),
        ("-p tcp -j ACCEPT", TCP),
        ('-p tcp -m comment --comment "ours is \\"-j\\"" -j ACCEPT', TCP),
        ("-p tcp -m tcp --dport 21 -j CT --notrack", replace(TCP, verdict="CT", ports=(PortRange(21, 21),))),
        (
            "-p tcp -m multiport --dports 0,21,100:200 -j NFQUEUE --queue-num 3",
            replace(TCP, verdict="NFQUEUE", ports=(PortRange(21, 21), PortRange(100, 200))),
        ),
        ("-p tcp -m tcp --dport 0:1023 -j ACCEPT", replace(TCP, ports=(PortRange(1, 1023),))),
        (
            "-s 10.0.0.0/8 -d 10.1.0.1/32 -i lan0 -j DROP",
            replace(EARLIER, verdict="DROP", saddr="10.0.0.0/8", daddr="10.1.0.1/32", interface="lan0"),
        ),
        ("-p tcp -m tcp --dport 0 -j ACCEPT", replace(TCP, is_partial=True)),
        ("-p tcp -m tcp --sport 20 -j ACCEPT", replace(TCP, is_partial=True)),
        ("-p tcp -m tcp --tcp-flags FIN,SYN SYN -j ACCEPT", replace(TCP, is_partial=True)),
        ("! -i lan0 -j ACCEPT", replace(EARLIER, is_partial=True)),
        ("-i lan+ -j ACCEPT", replace(EARLIER, is_partial=True)),
        ("-d 10.0.0.1/255.0.255.0 -j ACCEPT", replace(EARLIER, is_partial=True)),
        ("-m set --match-set them src -j ACCEPT", replace(EARLIER, is_partial=True)),
    ],
)
def test_what_decides(text: str, expected: EarlierRule) -> None:
    assert found(text) == [replace(expected, text=text)]


@pytest.mark.parametrize("text", ["-p icmp -j ACCEPT", "-p tcp", "-j LOG", "-p tcp -j orch-web-pre"])
def test_what_does_not(text: str) -> None:
    assert found(text) == []


def test_what_a_chain_of_others_decides_is_for_some_only() -> None:
    place = "ip raw theirs (iptables-nft)"
    drops = replace(EARLIER, place=place, text="-p udp -j DROP", verdict="DROP", l4proto=L4Proto.UDP, is_partial=True)
    assert found("-j theirs") == [drops]
    assert found("-i lan0 -j theirs") == [replace(drops, interface="lan0")]


def test_each_profile_has_those_before_its_own_first_jump() -> None:
    after = found("-j orch-web-pre", "-j ACCEPT", "-j orch-ftp-pre", "-j DROP", "-j orch-web-pre")
    assert [(rule.profile, rule.verdict) for rule in after] == [("ftp", "ACCEPT")]
    before = found("-j ACCEPT", "-j orch-web-pre")
    assert [(rule.profile, rule.verdict) for rule in before] == [("web", "ACCEPT"), ("ftp", "ACCEPT")]


def test_each_hook_has_its_path() -> None:
    (rule,) = found("-o lan0 -j ACCEPT", hook="OUTPUT", jump="-j orch-ftp-out")
    assert (rule.place, rule.path, rule.interface) == ("ip raw OUTPUT (iptables-nft)", Path.OUTGOING, "lan0")


@pytest.mark.parametrize(
    ("rule", "is_taken"),
    [
        (EARLIER, True),
        (TCP, True),
        (replace(TCP, l4proto=L4Proto.UDP), False),
        (replace(TCP, l3proto=L3Proto.IP6), False),
        (replace(TCP, path=Path.OUTGOING), False),
        (replace(TCP, interface="lan0", ports=(PortRange(1, 20), PortRange(21, 30))), True),
        (replace(TCP, interface="lan1"), False),
        (replace(TCP, ports=(PortRange(22, 30),)), False),
        (replace(TCP, saddr="10.0.0.0/8"), False),
    ],
)
def test_an_attachment_is_taken(rule: EarlierRule, *, is_taken: bool) -> None:
    assert takes(rule, FTP) is is_taken


def test_addresses_are_taken_if_all_are() -> None:
    rule = replace(TCP, saddr="10.0.0.0/8")
    assert takes(rule, replace(FTP, saddr=("10.1.0.0/16", "10.0.0.1")))
    assert not takes(rule, replace(FTP, saddr=("10.1.0.0/16", "192.0.2.1")))
    assert not takes(rule, replace(FTP, saddr=("0.0.0.0/0",)))


@pytest.fixture
def space() -> Iterator[Netns]:
    with scratch():
        yield netns.own()


@live
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_in_a_namespace(space: Netns, variant: str) -> None:
    assert earlier_rules(space) == ()
    for program in ("iptables", "ip6tables"):
        for words in (
            "-N orch-ftp-pre",
            "-A PREROUTING -p tcp --dport 21 -j CT --notrack",
            "-A PREROUTING -j orch-ftp-pre",
        ):
            command = [f"{program}-{variant}", "-t", "raw", *words.split()]
            subprocess.run(command, check=True, capture_output=True)
    rule = replace(TCP, text="-p tcp -m tcp --dport 21 -j CT --notrack", verdict="CT", ports=(PortRange(21, 21),))
    assert list(earlier_rules(space)) == [
        replace(rule, place=f"{family} raw PREROUTING (iptables-{variant})", l3proto=family) for family in L3Proto
    ]


@live
def test_looking_loads_no_module(space: Netns) -> None:
    before = sorted(path.name for path in FilePath("/sys/module").iterdir())
    assert earlier_rules(space) == ()
    assert sorted(path.name for path in FilePath("/sys/module").iterdir()) == before
