"""From profile text to desired state: the defaults taken, and what follows from them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from orchestrator.catalogue.description import parse
from orchestrator.engine.describe import declaration
from orchestrator.engine.loading import builtin
from orchestrator.errors import ProfileError
from orchestrator.model import (
    Attachment,
    Backend,
    Bounds,
    Desired,
    Engine,
    HelperKey,
    Inspect,
    L3Proto,
    L4Proto,
    Path,
    Policy,
    PortRange,
    Queueing,
    Status,
)
from orchestrator.profile import load, load_file, schema
from orchestrator.supervise.describe import describe

ROOT = FilePath(__file__).parents[2]
EXAMPLES = sorted((ROOT / "profiles").glob("*.yaml"))


def helpers(text: str, head: str = "") -> Desired:
    directory = str(ROOT / "profiles")
    return load(f"profile: test\n{head}\nhelpers:\n{text}", "test.yaml", describe, directory=directory)


def keys(*texts: str) -> tuple[HelperKey, ...]:
    return tuple(HelperKey.parse(text) for text in texts)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_under_its_own_name_and_warns_of_multicast_only(path: FilePath) -> None:
    desired = load_file(path, describe)
    assert desired.profile == path.stem
    assert all("first multicast packet" in warning for warning in desired.warnings)
    assert "ct state established,related accept" in path.read_text(encoding="utf-8")


def test_the_smallest_profile_takes_every_default() -> None:
    desired = helpers("  tftp: {}")
    (helper,) = desired.helpers
    assert (desired.source, desired.netns, desired.backend) == ("test.yaml", "", Backend.NFTABLES)
    assert (helper.name, helper.use, helper.engine) == ("tftp", "tftp", Engine.NATIVE)
    assert helper.queueing is Queueing.RULES
    assert helper.keys == keys("tftp-us/ip/udp", "tftp-us/ip6/udp")
    assert (helper.stock_keys, desired.stock) == ((), ())
    assert {(a.path, a.key.l3proto, str(a.ports[0])) for a in helper.attachments} == {
        (path, family, "69") for path in Path for family in L3Proto
    }
    assert helper.modules == ()


def test_own_registrations_are_enabled_and_share_queue_and_private_data_with_the_disabled_stock_ones() -> None:
    desired = helpers(
        "  ftp: {engine: conntrackd, policies: {ftp: {expect_max: 8, expect_timeout: 2m}}}", "families: [ip]"
    )
    (own,), (stock,) = desired.registrations, desired.stock
    assert (own.key, stock.key) == keys("ftp-us/ip/tcp", "ftp/ip/tcp")
    assert (own.status, stock.status) == (Status.ENABLED, Status.DISABLED)
    assert (own.policies, stock.policies) == ((Policy("ftp", 8, 120),), (Policy("ftp", 1, 300),))
    assert own.priv_data_len == stock.priv_data_len == 24
    assert own.queue_num == stock.queue_num


def test_one_process_serves_every_helper_of_conntrackd() -> None:
    desired = helpers("  tftp: {engine: conntrackd}\n  rpc: {}\n  sip: {}")
    (process,) = desired.processes
    assert {stock.key.name for stock in desired.stock} == {"tftp", "rpc"}
    assert {helper.queueing for helper in desired.helpers} == {Queueing.REGISTRATION}
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
    alone = helpers("  tftp: {engine: conntrackd}")
    together = helpers("  sane: {}\n  tns: {}\n  boot: {use: tftp, engine: conntrackd, name: boot}\n  ftp: {}")
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
    boot = "boot: {use: tftp, engine: conntrackd, attach: [{ports: 6969}]}"
    desired = helpers(f"  tftp: {{engine: conntrackd, queue: 20}}\n  {boot}", "families: [ip]")
    assert {str(r.key): r.queue_num for r in (*desired.registrations, *desired.stock)} == {
        "tftp-us/ip/udp": 20,
        "boot-us/ip/udp": 20,
        "tftp/ip/udp": 20,
    }


def test_rules_queue_for_a_native_helper_and_its_registrations_stay_disabled() -> None:
    desired = helpers("  ftp: {}\n  tftp: {}")
    assert {r.status for r in desired.registrations} == {Status.DISABLED}
    ftp, tftp = desired.rule_queues
    assert (ftp.keys, tftp.keys) == (
        keys("ftp-us/ip/tcp", "ftp-us/ip6/tcp"),
        keys("tftp-us/ip/udp", "tftp-us/ip6/udp"),
    )
    assert ftp.adjusted_queue_num == ftp.queue_num + 1
    assert tftp.adjusted_queue_num is None
    assert all(64 <= queue.label < 128 for queue in desired.rule_queues)
    assert all(16384 <= number < 49152 for queue in desired.rule_queues for number in queue.queues)
    assert [(p.name, p.argv, p.queues, p.keys) for p in desired.processes] == [
        ("ftp", ("orch-helper", "helper-ftp.toml"), ftp.queues, ()),
        ("tftp", ("orch-helper", "helper-tftp.toml"), tftp.queues, ()),
    ]
    assert [(n.name, n.names, n.queues, n.label) for n in desired.natives] == [
        ("ftp", ("ftp-us",), ftp.queues, ftp.label),
        ("tftp", ("tftp-us",), tftp.queues, tftp.label),
    ]


@pytest.mark.parametrize(("option", "head"), [("queueing: registration", ""), ("", "backend: iptables")])
def test_the_registration_queues_to_one_number_for_both_families(option: str, head: str) -> None:
    desired = helpers(f"  ftp: {{{option}}}", head)
    assert {r.status for r in desired.registrations} == {Status.ENABLED}
    (number,) = {r.queue_num for r in desired.registrations}
    (process,), (native,) = desired.processes, desired.natives
    assert (process.queues, process.keys) == ((number,), keys("ftp-us/ip/tcp", "ftp-us/ip6/tcp"))
    assert (native.queues, native.queueing, native.label) == ((number,), Queueing.REGISTRATION, None)
    assert desired.rule_queues == ()
    assert number == helpers(f"  other: {{use: ftp, name: ftp-us, {option}}}", head).registrations[0].queue_num


def test_a_registration_for_rules_cannot_be_taken_for_one_that_queues() -> None:
    """Two namespaces share a registration if all but its status is equal, and one of the two would disable it."""
    numbers = {
        helpers(f"  ftp: {{queueing: {queueing}}}").registrations[0].queue_num for queueing in ("rules", "registration")
    }
    assert len(numbers) == 2


def test_what_a_profile_says_about_a_native_helper() -> None:
    desired = helpers(
        "  ftp:\n"
        "    {queue: 100, label: 7, inspect: triggers, process: {user: proxy}, policies: {ftp: {expect_max: 8}},\n"
        "     guard: {ports: 20-65535, source: any, destination: any, permanent: true}}"
    )
    (queue,), (native,) = desired.rule_queues, desired.natives
    assert (queue.label, queue.queues) == (7, (100, 101))
    assert b"PORT" in queue.triggers
    assert (native.user, native.inspect) == ("proxy", Inspect.TRIGGERS)
    assert native.bounds == Bounds(PortRange(20, 65535), is_any_source=True, is_any_destination=True, is_permanent=True)
    assert {r.policies for r in desired.registrations} == {(Policy("ftp", 8, 300),)}


@pytest.mark.parametrize("guard", ["strict", "{}"])
def test_without_loosening_the_bounds_are_those_of_the_class(guard: str) -> None:
    desired = helpers(f"  ftp: {{guard: {guard}}}\n  steam: {{use: ./steam.py}}")
    assert [native.bounds for native in desired.natives] == [
        Bounds(PortRange(1024, 65535)),
        Bounds(PortRange(1024, 65535), is_any_source=True, is_permanent=True),
    ]


def test_a_bound_is_loosened_by_its_name_and_no_other_with_it() -> None:
    desired = helpers("  steam: {use: ./steam.py, guard: {source: peer, ports: 1-65535}}")
    assert desired.natives[0].bounds == Bounds(PortRange(1, 65535), is_any_source=False, is_permanent=True)


def test_a_helper_of_ones_own_has_no_catalogue_entry() -> None:
    desired = helpers("  lan: {use: ./steam.py}")
    (helper,), (native,), (queue,) = desired.helpers, desired.natives, desired.rule_queues
    assert (helper.use, helper.engine) == ("./steam.py", Engine.NATIVE)
    assert (native.use, native.file) == ("./steam.py", str(ROOT / "profiles" / "steam.py"))
    content = (ROOT / "profiles" / "steam.py").read_bytes()
    assert (native.source.encode(), native.sha256) == (content, hashlib.sha256(content).hexdigest())
    assert [process.files for process in desired.processes] == [("helper-lan.toml", "helper-lan.py")]
    assert {(a.path, str(a.key), str(a.ports[0])) for a in desired.attachments} == {
        (Path.OUTGOING, "lan-us/ip/udp", "27036")
    }
    assert queue.is_multicast


def test_automatic_numbers_of_two_helpers_never_meet() -> None:
    entries = "".join(f"  h{i}: {{use: tftp, attach: {{ports: {2000 + i}}}}}\n" for i in range(100))
    desired = helpers(entries + "  ftp: {label: 70, queue: 20000}")
    labels = [queue.label for queue in desired.rule_queues]
    bound = [number for process in desired.processes for number in process.queues]
    assert len(set(labels)) == len(labels) == 101
    assert len(set(bound)) == len(bound) == 102
    assert not {r.queue_num for r in desired.registrations} & set(bound)


def test_there_are_no_more_labels_than_the_kernel_has() -> None:
    entries = "".join(f"  h{i}: {{use: tftp, attach: {{ports: {2000 + i}}}}}\n" for i in range(129))
    with pytest.raises(ProfileError, match="all 128 connection labels are taken"):
        helpers(entries)


@pytest.mark.parametrize(("text", "seconds"), [("300", 300), ("300s", 300), ("5m", 300), ("1h", 3600), ("'1d'", 86400)])
def test_durations(text: str, seconds: int) -> None:
    desired = helpers(f"  tftp: {{policies: {{tftp: {{expect_timeout: {text}}}}}}}")
    assert {r.policies[0].expect_timeout_s for r in desired.registrations} == {seconds}


def test_netns_and_backend_are_passed_on() -> None:
    desired = helpers("  tftp: {}", "netns: /run/netns/blue\nbackend: iptables-nft")
    assert (desired.netns, desired.backend) == ("/run/netns/blue", Backend.IPTABLES_NFT)


def test_a_relative_file_needs_a_profile_in_a_file() -> None:
    text = "profile: test\nhelpers: {lan: {use: ./steam.py}}"
    with pytest.raises(ProfileError, match="relative to the profile, which is no file"):
        load(text, "<stdin>", describe)
    absolute = text.replace("./", f"{ROOT}/profiles/")
    assert load(absolute, "<stdin>", describe).natives[0].file == str(ROOT / "profiles" / "steam.py")


@pytest.mark.parametrize("use", ["/run/a\\0.py", "./a\\e[2J.py", "../a\\n.py"])
def test_a_path_is_printable(use: str) -> None:
    with pytest.raises(ProfileError, match="is not the path of a file") as caught:
        load(f'profile: test\nhelpers: {{lan: {{use: "{use}"}}}}', "<stdin>", describe)
    assert caught.value.problems[0].message.isprintable()


def test_triggers_are_for_the_tcp_part_of_a_helper() -> None:
    described = parse({**declaration(builtin("ftp")), "serves": [{"l4proto": p, "ports": [5]} for p in ("tcp", "udp")]})
    text = "profile: test\nhelpers: {both: {inspect: triggers}}"
    (queue,) = load(text, "test.yaml", lambda _use: described).rule_queues
    assert queue.triggers == described.triggers
    assert {key.l4proto for key in queue.keys} == set(L4Proto)
    udp = replace(described, protocols=described.protocols[1:])
    with pytest.raises(ProfileError, match="both has no triggers: every payload can matter"):
        load(text, "test.yaml", lambda _use: udp)


def test_a_profile_without_helpers_of_ones_own_asks_nobody() -> None:
    asked: list[str] = []
    load("profile: test\nhelpers: {ftp: {}, boot: {use: tftp, attach: {ports: 6969}}}", "p.yaml", asked.append)
    assert asked == []


def test_problems_come_in_order_of_place() -> None:
    with pytest.raises(ProfileError) as caught:
        helpers("  tftp: {queue: x, attach: {ports: 0}, typo: 1}")
    places = [(p.line, p.column) for p in caught.value.problems]
    assert len(places) == 3
    assert places == sorted(places)


def test_the_schema_knows_every_key_and_is_json() -> None:
    document = json.loads(json.dumps(schema()))
    keys = {"profile", "netns", "backend", "families", "reconcile", "confirm_within_s", "helpers"}
    assert set(document["properties"]) == keys
    assert document["additionalProperties"] is False
    assert set(document["$defs"]) == {
        "HelperDoc", "AttachDoc", "PolicyDoc", "GuardDoc", "ProcessDoc",
    }  # fmt: skip


def test_looking_at_the_module_loads_neither_pydantic_nor_yaml_and_a_check_loads_no_kernel_library() -> None:
    program = """if True:
        import sys
        from orchestrator import profile
        assert not {"yaml", "pydantic"} & sys.modules.keys()
        profile.load("profile: x\\nhelpers: {tftp: {}}", "x")
        assert not {"pyroute2", "nftables", "jinja2"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.slow
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
