"""From profile text to desired state: the defaults taken, and what follows from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path as FilePath

import pytest

from orchestrator.errors import ProfileError
from orchestrator.model import (
    Attachment,
    Backend,
    Desired,
    Engine,
    HelperKey,
    L3Proto,
    Path,
    Policy,
    PortRange,
    Status,
)
from orchestrator.profile import load, load_file, schema

ROOT = FilePath(__file__).parents[2]
EXAMPLES = sorted((ROOT / "profiles").glob("*.yaml"))


def helpers(text: str, head: str = "") -> Desired:
    return load(f"profile: test\n{head}\nhelpers:\n{text}", "test.yaml")


def keys(*texts: str) -> tuple[HelperKey, ...]:
    return tuple(HelperKey.parse(text) for text in texts)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_under_its_own_name_and_warns_of_multicast_only(path: FilePath) -> None:
    desired = load_file(path)
    assert desired.profile == path.stem
    assert all("first multicast packet" in warning for warning in desired.warnings)
    assert "ct state established,related accept" in path.read_text(encoding="utf-8")


def test_the_smallest_profile_takes_every_default() -> None:
    desired = helpers("  tftp: {}")
    (helper,) = desired.helpers
    assert (desired.source, desired.netns, desired.backend) == ("test.yaml", "", Backend.NFTABLES)
    assert (helper.name, helper.use, helper.engine) == ("tftp", "tftp", Engine.CONNTRACKD)
    assert helper.keys == keys("tftp-us/ip/udp", "tftp-us/ip6/udp")
    assert helper.stock_keys == keys("tftp/ip/udp", "tftp/ip6/udp")
    assert {(a.path, a.key.l3proto, str(a.ports[0])) for a in helper.attachments} == {
        (path, family, "69") for path in Path for family in L3Proto
    }
    assert helper.modules == ()


def test_own_registrations_are_enabled_and_share_queue_and_private_data_with_the_disabled_stock_ones() -> None:
    desired = helpers("  ftp: {policies: {ftp: {expect_max: 8, expect_timeout: 2m}}}", "families: [ip]")
    (own,), (stock,) = desired.registrations, desired.stock
    assert (own.key, stock.key) == keys("ftp-us/ip/tcp", "ftp/ip/tcp")
    assert (own.status, stock.status) == (Status.ENABLED, Status.DISABLED)
    assert (own.policies, stock.policies) == ((Policy("ftp", 8, 120),), (Policy("ftp", 1, 300),))
    assert own.priv_data_len == stock.priv_data_len == 24
    assert own.queue_num == stock.queue_num


def test_one_process_serves_every_helper_of_conntrackd() -> None:
    desired = helpers("  tftp: {}\n  rpc: {}\n  sip: {}")
    (process,) = desired.processes
    assert process.argv == ("conntrackd", "-C", "conntrackd.conf")
    assert process.files == ("conntrackd.conf",)
    assert set(process.keys) == {r.key for r in (*desired.registrations, *desired.stock)}
    assert process.queues == tuple(sorted({r.queue_num for r in desired.registrations}))
    assert len(process.queues) == 4


def test_the_kernel_engine_needs_modules_and_nothing_else() -> None:
    desired = helpers("  h323: {}\n  ftp: {engine: kernel}")
    assert (desired.registrations, desired.stock, desired.processes) == ((), (), ())
    assert desired.modules == ("nf_conntrack_ftp", "nf_conntrack_h323", "nf_nat_ftp", "nf_nat_h323")
    assert desired.helpers[0].keys == keys("Q.931/ip/tcp", "Q.931/ip6/tcp", "RAS/ip/udp", "RAS/ip6/udp")
    assert {(str(a.key), str(a.ports[0])) for a in desired.helpers[0].attachments if a.path is Path.INCOMING} == {
        ("RAS/ip/udp", "1719"), ("RAS/ip6/udp", "1719"), ("Q.931/ip/tcp", "1720"), ("Q.931/ip6/tcp", "1720"),
    }  # fmt: skip


def test_ssdp_is_attached_under_its_stock_name_and_its_tcp_twin_is_registered_without_a_rule() -> None:
    desired = helpers("  upnp: {use: ssdp}", "families: [ip]")
    (helper,) = desired.helpers
    assert helper.keys == keys("ssdp/ip/tcp", "ssdp/ip/udp")
    assert {str(a.key) for a in helper.attachments} == {"ssdp/ip/udp"}
    assert (helper.stock_keys, desired.stock) == ((), ())
    assert {r.status for r in desired.registrations} == {Status.ENABLED}


def test_the_stock_name_may_be_attached_and_is_then_not_registered_twice() -> None:
    desired = helpers("  boot: {use: tftp, name: tftp}", "families: [ip]")
    assert [r.key for r in desired.registrations] == list(keys("tftp/ip/udp"))
    assert desired.stock == ()


def test_only_what_is_attached_is_registered() -> None:
    desired = helpers("  rpc: {attach: [{l4proto: tcp, saddr: 10.0.0.0/8}]}")
    assert [str(r.key) for r in desired.registrations] == ["rpc-us/ip/tcp"]
    assert [str(r.key) for r in desired.stock] == ["rpc/ip/tcp"]


def test_an_entry_attaches_the_families_of_its_addresses() -> None:
    desired = helpers("  tftp: {attach: [{path: incoming, saddr: [10.0.0.0/8, 'fd00::1', 10.1.0.0/16]}]}")
    assert [(str(a.key), a.saddr) for a in desired.attachments] == [
        ("tftp-us/ip/udp", ("10.0.0.0/8",)),
        ("tftp-us/ip6/udp", ("fd00::1",)),
    ]


def test_all_addresses_of_a_family_are_no_condition_but_that_family() -> None:
    desired = helpers("  tftp: {attach: [{path: incoming, saddr: [0.0.0.0/0, 10.0.0.0/8]}]}")
    (key,) = keys("tftp-us/ip/udp")
    assert desired.attachments == (Attachment(key, Path.INCOMING, (PortRange(69, 69),)),)


def test_overlapping_ports_of_an_entry_become_one_range() -> None:
    desired = helpers("  tftp: {attach: [{path: incoming, ports: [80, 69-72, 70-75, 76]}]}", "families: ip")
    assert [str(p) for p in desired.attachments[0].ports] == ["69-75", "76", "80"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{iif: lan0}", [(Path.INCOMING, "lan0")]),
        ("{oif: wan0}", [(Path.OUTGOING, "wan0")]),
        ("{iif: lan0, oif: wan0}", [(Path.INCOMING, "lan0"), (Path.OUTGOING, "wan0")]),
        ("{path: [incoming, outgoing], iif: lan0}", [(Path.INCOMING, "lan0"), (Path.OUTGOING, "")]),
        ("{path: [outgoing, outgoing]}", [(Path.OUTGOING, "")]),
    ],
)
def test_an_interface_belongs_to_its_path(entry: str, expected: list[tuple[Path, str]]) -> None:
    desired = helpers(f"  tftp: {{attach: {entry}}}", "families: [ip]")
    assert [(a.path, a.interface) for a in desired.attachments] == expected


def test_automatic_queue_numbers_are_the_same_in_every_profile() -> None:
    alone, together = helpers("  tftp: {}"), helpers("  sane: {}\n  tns: {}\n  boot: {use: tftp, name: boot}")
    numbers = {(r.key.l3proto, r.key.l4proto): r.queue_num for r in alone.registrations}
    assert all(16384 <= number < 49152 for number in numbers.values())
    for registration in together.registrations:
        if registration.key.name == "boot":
            assert registration.queue_num == numbers[registration.key.l3proto, registration.key.l4proto]


def test_queue_numbers_count_up_by_protocol_and_then_family() -> None:
    desired = helpers("  ssdp: {queue: 100}")
    assert {str(r.key): r.queue_num for r in desired.registrations} == {
        "ssdp/ip/tcp": 100,
        "ssdp/ip6/tcp": 101,
        "ssdp/ip/udp": 102,
        "ssdp/ip6/udp": 103,
    }


def test_helpers_of_one_plugin_share_its_queues() -> None:
    desired = helpers("  tftp: {queue: 20}\n  boot: {use: tftp, attach: [{ports: 6969}]}", "families: [ip]")
    assert {str(r.key): r.queue_num for r in (*desired.registrations, *desired.stock)} == {
        "tftp-us/ip/udp": 20,
        "boot-us/ip/udp": 20,
        "tftp/ip/udp": 20,
    }


@pytest.mark.parametrize(("text", "seconds"), [("300", 300), ("300s", 300), ("5m", 300), ("1h", 3600), ("'1d'", 86400)])
def test_durations(text: str, seconds: int) -> None:
    desired = helpers(f"  tftp: {{policies: {{tftp: {{expect_timeout: {text}}}}}}}")
    assert {r.policies[0].expect_timeout_s for r in desired.registrations} == {seconds}


def test_netns_and_backend_are_passed_on() -> None:
    desired = helpers("  tftp: {}", "netns: /run/netns/blue\nbackend: iptables-nft")
    assert (desired.netns, desired.backend) == ("/run/netns/blue", Backend.IPTABLES_NFT)


def test_problems_come_in_order_of_place() -> None:
    with pytest.raises(ProfileError) as caught:
        helpers("  tftp: {queue: x, attach: {ports: 0}, typo: 1}")
    places = [(p.line, p.column) for p in caught.value.problems]
    assert len(places) == 3
    assert places == sorted(places)


def test_the_schema_knows_every_key_and_is_json() -> None:
    document = json.loads(json.dumps(schema()))
    assert set(document["properties"]) == {"profile", "netns", "backend", "families", "helpers"}
    assert document["additionalProperties"] is False
    assert set(document["$defs"]) == {"HelperDoc", "AttachDoc", "PolicyDoc"}


def test_looking_at_the_module_loads_neither_pydantic_nor_yaml_and_a_check_loads_no_kernel_library() -> None:
    program = """if True:
        import sys
        from orchestrator import profile
        assert not {"yaml", "pydantic"} & sys.modules.keys()
        profile.load("profile: x\\nhelpers: {tftp: {}}", "x")
        assert not {"pyroute2", "nftables", "jinja2"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_ten_thousand_entries_are_read() -> None:
    lines = ["profile: big", "helpers:", "  ftp:", "    attach:"]
    for i in range(10_000):
        lines += [
            "      - path: [incoming]",
            f"        ports: [{1024 + i}, 21]",
            f"        saddr: [10.{i >> 8}.{i & 255}.0/24]",
        ]
    desired = load("\n".join(lines), "big.yaml")
    assert len(desired.attachments) == 10_000
