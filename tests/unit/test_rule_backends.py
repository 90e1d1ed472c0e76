"""Rule backends on this machine's kernel, in namespaces of their own; its helpers stand in for registered ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import profile, render
from orchestrator.errors import KernelError, PreflightError
from orchestrator.kernel import conntrack, iptables, modules, netns
from orchestrator.kernel.filters import unrelated_filters
from orchestrator.kernel.foreign_queues import foreign_queues
from orchestrator.kernel.iptables import IptablesRules
from orchestrator.kernel.nft import NftRules, NftSession, nft_tables
from orchestrator.model import (
    Attachment,
    Backend,
    Desired,
    Engine,
    Helper,
    HelperKey,
    L3Proto,
    L4Proto,
    Netns,
    Path,
    PortRange,
    Rules,
)
from orchestrator.ports import RuleBackend
from orchestrator.supervise.traces import born
from tests.waiting import until

SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = ("ip", "nft", "iptables-legacy", "iptables-nft")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(p, path=SBIN) for p in NEEDED)
    or len(modules.available(("nf_conntrack_tftp", "nf_conntrack_ftp"))) < 2,
    reason=f"needs root, {', '.join(NEEDED)}, and the kernel's ftp and tftp helpers",
)

PROFILE = """
profile: unit
helpers:
  ftp:
    engine: kernel
    attach:
      - {path: [incoming], iif: lan0, saddr: [10.0.0.0/8, "fd00::/8"], ports: [21, 2121-2125]}
      - {path: [outgoing], ports: [21]}
  tftp:
    engine: kernel
    attach:
      - {path: [incoming], ports: [69]}
      - {path: [incoming], ports: [1069-1070]}
"""
ONLY_IP = PROFILE.replace("profile: unit", "profile: unit\nfamilies: [ip]").replace(', "fd00::/8"', "")


def rules(backend: Backend, text: str = PROFILE) -> Rules:
    return render.target(replace(profile.load(text, "p.yaml"), backend=backend)).rules


def unknown_helper(backend: Backend) -> Rules:
    """Rules of which the last family attaches a helper that nobody registered."""
    desired = profile.load(ONLY_IP, "p.yaml")
    key = HelperKey("nosuch", L3Proto.IP6, L4Proto.TCP)
    extra = Attachment(key, Path.INCOMING, (PortRange(7, 7),))
    helper = replace(desired.helpers[0], attachments=(*desired.helpers[0].attachments, extra))
    return render.target(replace(desired, backend=backend, helpers=(helper, *desired.helpers[1:]))).rules


def run(*argv: str, given: str = "") -> None:
    subprocess.run(argv, check=True, capture_output=True, env={"PATH": SBIN}, input=given.encode())


@pytest.fixture
def space() -> Iterator[Netns]:
    with netns.scratch():
        yield netns.own()


@pytest.fixture(params=list(Backend), ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend(request.param)


def adapter_of(backend: Backend) -> RuleBackend:
    return NftRules() if backend.is_nftables else IptablesRules(backend)


@pytest.fixture
def adapter(backend: Backend) -> RuleBackend:
    return adapter_of(backend)


def test_nothing_is_seen_in_a_new_namespace(adapter: RuleBackend, space: Netns) -> None:
    assert adapter.listing(space, "unit") is None
    assert adapter.profiles(space) == ()
    assert adapter.foreign_references(space) == frozenset()


def test_looking_leaves_no_trace_and_loads_no_module(adapter: RuleBackend, space: Netns) -> None:
    before = sorted(p.name for p in FilePath("/sys/module").iterdir())
    adapter.listing(space, "unit")
    adapter.profiles(space)
    adapter.foreign_references(space)
    unrelated_filters(space)
    foreign_queues(space)
    adapter.flush(space, "unit")
    adapter.remove(space, "unit")
    assert sorted(p.name for p in FilePath("/sys/module").iterdir()) == before
    assert nft_tables() == ()
    names = FilePath("/proc/thread-self/net/ip_tables_names")
    assert not names.exists() or names.read_text() == ""


def test_what_is_loaded_lists_as_expected_and_loading_again_changes_nothing(
    adapter: RuleBackend, backend: Backend, space: Netns
) -> None:
    wanted = rules(backend)
    adapter.load(space, wanted)
    listing = adapter.listing(space, "unit")
    assert listing
    assert listing == adapter.expected(wanted)
    assert listing.digest == wanted.digest
    names = {"ftp/ip/tcp", "ftp/ip6/tcp", "tftp/ip/udp", "tftp/ip6/udp"}
    assert {str(k) for k in listing.helpers} == names
    assert adapter.profiles(space) == ("unit",)
    assert adapter.foreign_references(space) == frozenset()
    adapter.load(space, wanted)
    assert adapter.listing(space, "unit") == listing


def test_what_is_no_longer_wanted_goes_with_the_next_load(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    adapter.load(space, rules(backend))
    adapter.load(space, rules(backend, ONLY_IP))
    listing = adapter.listing(space, "unit")
    assert listing == adapter.expected(rules(backend, ONLY_IP))
    assert listing
    assert {k.l3proto for k in listing.helpers} == {L3Proto.IP}


def test_what_is_new_comes_with_the_next_load(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    """Added to a table that exists, chains and objects are listed elsewhere than in one that is made anew."""
    adapter.load(space, rules(backend, "profile: unit\nhelpers: {tftp: {engine: kernel, attach: [{path: outgoing}]}}"))
    adapter.load(space, rules(backend))
    assert adapter.listing(space, "unit") == adapter.expected(rules(backend))


def test_a_refused_load_leaves_everything_as_it_was(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    with pytest.raises(KernelError, match="not registered"):
        adapter.load(space, unknown_helper(backend))
    assert adapter.listing(space, "unit") is None
    adapter.load(space, rules(backend, ONLY_IP))
    before = adapter.listing(space, "unit")
    with pytest.raises(KernelError, match="not registered"):
        adapter.load(space, unknown_helper(backend))
    assert adapter.listing(space, "unit") == before


def test_a_flush_detaches_and_a_removal_leaves_nothing(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    adapter.load(space, rules(backend))
    adapter.flush(space, "unit")
    flushed = adapter.listing(space, "unit")
    assert flushed
    assert "dport" not in flushed.text
    assert flushed.digest == ""
    adapter.remove(space, "unit")
    adapter.remove(space, "unit")
    assert adapter.listing(space, "unit") is None


def test_profiles_do_not_touch_each_other(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    adapter.load(space, rules(backend))
    listing = adapter.listing(space, "unit")
    adapter.load(space, rules(backend, PROFILE.replace("profile: unit", "profile: unit-2")))
    assert adapter.profiles(space) == ("unit", "unit-2")
    adapter.remove(space, "unit-2")
    assert adapter.listing(space, "unit") == listing


@pytest.mark.parametrize(
    "commands",
    [
        ["add chain {t} foreign", "add rule {t} foreign ct state related accept"],
        ["add set {t} foreign {{ type ipv4_addr ; }}"],
        ["add counter {t} foreign"],
        ["add map {t} foreign {{ type ipv4_addr : verdict ; }}", "add element {t} foreign {{ 10.0.0.1 : jump about }}"],
        ['add ct helper {t} foreign {{ type "irc" protocol tcp ; }}'],
        ["add rule {t} about counter"],
        ["add chain {t} prerouting-mangle150 {{ policy drop ; }}"],
        [
            "flush chain {t} {output}",
            "delete chain {t} {output}",
            "add chain {t} {output} {{ type filter hook output priority 7 ; }}",
        ],
        ["flush chain {t} {output}"],
        ["add table {t} {{ flags dormant ; }}"],
        ["add table {t} {{ flags dormant ; }}", "add chain {t} foreign {{ type filter hook input priority 0 ; }}"],
    ],
)
def test_whatever_others_do_to_the_table_is_seen_and_put_right(commands: list[str], space: Netns) -> None:
    adapter, wanted = NftRules(), rules(Backend.NFTABLES)
    adapter.load(space, wanted)
    expected = adapter.listing(space, "unit")
    for command in commands:
        run("nft", command.format(t="inet orch-unit", output="output-mangle150"))
    assert adapter.listing(space, "unit") != expected
    adapter.load(space, wanted)
    assert adapter.listing(space, "unit") == expected


def test_an_object_that_became_another_helper_is_put_right(space: Netns) -> None:
    adapter, wanted = NftRules(), rules(Backend.NFTABLES)
    run("nft", "add table inet orch-unit")
    run("nft", 'add ct helper inet orch-unit ftp/ip/tcp { type "irc" protocol tcp ; l3proto ip ; }')
    adapter.load(space, wanted)
    assert adapter.listing(space, "unit") == adapter.expected(wanted)


@pytest.mark.parametrize("variant", [Backend.IPTABLES_LEGACY, Backend.IPTABLES_NFT])
def test_jumps_that_others_changed_are_seen_and_put_right(variant: Backend, space: Netns) -> None:
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    expected = adapter.listing(space, "unit")
    run(variant, "-t", "raw", "-I", "OUTPUT", "-o", "lo", "-m", "comment", "--comment", 'a "b', "-j", "orch-unit-pre")
    assert adapter.listing(space, "unit") != expected
    adapter.load(space, wanted)
    assert adapter.listing(space, "unit") == expected


PROGRAMS = {"iptables": L3Proto.IP, "ip6tables": L3Proto.IP6}
FOREIGN = ("-p", "tcp", "-j", "ACCEPT")
FIRST, LAST = ("ours", "theirs"), ("theirs", "ours")


def foreign_rules(variant: Backend, verb: str = "-A") -> None:
    for program in PROGRAMS:
        for hook in ("PREROUTING", "OUTPUT"):
            run(variant.replace("iptables", program), "-t", "raw", verb, hook, *FOREIGN)


def order(variant: Backend) -> set[tuple[str, ...]]:
    """The orders in which our jumps and the rules of others stand, over all hooks and families."""
    return {
        tuple("ours" if "-j orch-unit" in line else "theirs" for line in saved.splitlines() if f"-A {hook}" in line)
        for program in PROGRAMS
        for hook in ("PREROUTING", "OUTPUT")
        if (saved := iptables.saved_table(variant.replace("iptables", program), "raw"))
    }


IN_TWO_VARIANTS = pytest.mark.parametrize("variant", [Backend.IPTABLES_LEGACY, Backend.IPTABLES_NFT], ids=str)


@IN_TWO_VARIANTS
def test_a_jump_keeps_its_place_among_rules_of_others(variant: Backend, space: Netns) -> None:
    """Behind one that ends the way through the table nothing is attached."""
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    foreign_rules(variant)
    assert order(variant) == {FIRST}
    narrower = rules(variant, PROFILE.replace(", 2121-2125", ""))
    for loaded in (wanted, narrower, wanted):
        adapter.load(space, loaded)
        assert order(variant) == {FIRST}
        assert adapter.listing(space, "unit") == adapter.expected(loaded)
    adapter.flush(space, "unit")
    adapter.load(space, wanted)
    assert order(variant) == {FIRST}


@IN_TWO_VARIANTS
def test_a_jump_that_others_moved_keeps_that_place(variant: Backend, space: Netns) -> None:
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    foreign_rules(variant, "-I")
    adapter.load(space, wanted)
    assert order(variant) == {LAST}


@IN_TWO_VARIANTS
def test_only_a_jump_that_is_missing_is_appended(variant: Backend, space: Netns) -> None:
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    foreign_rules(variant)
    run(variant, "-t", "raw", "-D", "OUTPUT", "-j", "orch-unit-out")
    adapter.load(space, wanted)
    assert order(variant) == {FIRST, LAST}
    assert adapter.listing(space, "unit") == adapter.expected(wanted)


@IN_TWO_VARIANTS
def test_a_jump_too_many_goes(variant: Backend, space: Netns) -> None:
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    run(variant, "-t", "raw", "-I", "PREROUTING", "-j", "orch-unit-pre")
    run(variant, "-t", "raw", "-A", "PREROUTING", "-g", "orch-unit-pre")
    run(variant, "-t", "raw", "-N", "theirs")
    run(variant, "-t", "raw", "-A", "theirs", "-j", "orch-unit-out")
    foreign_rules(variant)
    adapter.load(space, wanted)
    assert adapter.listing(space, "unit") == adapter.expected(wanted)
    assert order(variant) == {FIRST}


@IN_TWO_VARIANTS
def test_a_refused_load_moves_no_jump(variant: Backend, space: Netns) -> None:
    """The family that was loaded already is put back."""
    adapter = IptablesRules(variant)
    adapter.load(space, rules(variant))
    foreign_rules(variant)
    before = adapter.listing(space, "unit")
    with pytest.raises(KernelError, match="not registered"):
        adapter.load(space, unknown_helper(variant))
    assert order(variant) == {FIRST}
    assert adapter.listing(space, "unit") == before


@IN_TWO_VARIANTS
def test_a_chain_that_was_not_there_before_goes_again(variant: Backend, space: Netns) -> None:
    adapter, wanted = IptablesRules(variant), rules(variant)
    adapter.load(space, wanted)
    run(variant, "-t", "raw", "-D", "OUTPUT", "-j", "orch-unit-out")
    run(variant, "-t", "raw", "-F", "orch-unit-out")
    run(variant, "-t", "raw", "-X", "orch-unit-out")
    before = adapter.listing(space, "unit")
    with pytest.raises(KernelError, match="not registered"):
        adapter.load(space, unknown_helper(variant))
    assert adapter.listing(space, "unit") == before


JUMPS = st.lists(st.sampled_from(["-A OUTPUT -j orch-x-out", "-A OUTPUT -o lan0 -j orch-x-out"]), max_size=4)


@given(JUMPS, JUMPS)
def test_jumps_become_those_that_are_wanted(current: list[str], wanted: list[str]) -> None:
    chain = [":orch-x-out -"]
    steps = iptables._replacement([*chain, *wanted], [*chain, *current]).splitlines()
    there = list(current)
    for step in steps[2:-1]:
        if step.startswith("-D"):
            there.remove(step.replace("-D", "-A", 1))
        else:
            there.append(step)
    assert there == wanted
    assert steps[2:-1] == [] or current != wanted


def test_helpers_that_others_attach_are_seen(adapter: RuleBackend, backend: Backend, space: Netns) -> None:
    adapter.load(space, rules(backend))
    if backend.is_nftables:
        run("nft", "add table ip other")
        run("nft", 'add ct helper ip other x { type "irc" protocol tcp ; }')
    else:
        run(backend, "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "--dport", "6667", "-j", "CT", "--helper", "irc")
    assert adapter.foreign_references(space) == {"irc"}
    assert adapter.profiles(space) == ("unit",)


def test_a_missing_program_is_named(space: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "_SYSTEM_PATH", "/nonexistent")
    adapter = IptablesRules(Backend.IPTABLES)
    assert adapter.listing(space, "unit") is None
    with pytest.raises(PreflightError, match="iptables-restore is not installed"):
        adapter.load(space, rules(Backend.IPTABLES))


def test_without_libnftables_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    ignored: list[str] = []
    monkeypatch.setattr(ctypes.cdll, "LoadLibrary", refuse)
    monkeypatch.setattr(sys, "unraisablehook", lambda what: ignored.append(str(what.exc_value)))
    with pytest.raises(PreflightError, match="libnftables is not installed"):
        NftSession()
    gc.collect()
    assert ignored == []


def test_dropping_filters_are_found_in_every_kind_of_table(space: Netns) -> None:
    assert unrelated_filters(space) == ()
    run("nft", "add table inet f")
    run("nft", "add chain inet f c { type filter hook forward priority 0 ; policy drop ; }")
    run("iptables-legacy", "-P", "FORWARD", "DROP")
    run("iptables-nft", "-P", "FORWARD", "DROP")
    run("iptables-nft", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    found = ("inet f c", "ip filter (iptables-legacy) FORWARD", "ip filter FORWARD")
    assert unrelated_filters(space) == found
    run("nft", "add rule inet f c ct state related accept")
    run("iptables-legacy", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED", "-j", "ACCEPT")
    run("iptables-nft", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "RELATED", "-j", "ACCEPT")
    assert unrelated_filters(space) == ()


def test_queues_of_others_are_found_in_every_kind_of_table(space: Netns) -> None:
    NftRules().load(space, rules(Backend.NFTABLES))
    assert foreign_queues(space) == ()
    for program in ("iptables-legacy", "ip6tables-nft"):
        run(program, "-t", "mangle", "-N", "ips")
        run(program, "-t", "mangle", "-A", "ips", "-p", "tcp", "-j", "NFQUEUE", "--queue-num", "3")
    assert foreign_queues(space) == ()
    for program in ("iptables-legacy", "ip6tables-nft"):
        run(program, "-t", "mangle", "-A", "FORWARD", "-j", "ips")
    assert foreign_queues(space) == ("ip mangle (iptables-legacy) FORWARD", "ip6 mangle FORWARD")


@pytest.fixture
def router() -> Iterator[tuple[Netns, Netns]]:
    """A client and a server namespace with a cable between them: 10.1.0.1 to 10.1.0.2, fd00:1::1 to fd00:1::2.

    Neighbours are permanent, so that a packet has arrived when it was sent.
    """
    modules.KernelModules().load(conntrack.MODULE)  # a look at the connections would not
    names = [f"orch-{side}-{uuid.uuid4().hex[:6]}" for side in ("client", "server")]
    for name in names:
        run("ip", "netns", "add", name)
    try:
        run("ip", "-n", names[0], "link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", names[1])
        for name, here, there in ((names[0], 1, 2), (names[1], 2, 1)):
            commands = f"""
                address add 10.1.0.{here}/24 dev lan0
                address add fd00:1::{here}/64 dev lan0 nodad
                link set lan0 address 02:00:00:00:00:0{here} up
                neighbour replace 10.1.0.{there} lladdr 02:00:00:00:00:0{there} dev lan0
                neighbour replace fd00:1::{there} lladdr 02:00:00:00:00:0{there} dev lan0
            """
            run("ip", "-n", name, "-batch", "-", given=commands)
        yield netns.find(names[0]), netns.find(names[1])
    finally:
        for name in names:
            run("ip", "netns", "delete", name)


def tftp(family: L3Proto, path: Path, ports: str, saddr: str = "", daddr: str = "", interface: str = "") -> Attachment:
    first, _, last = ports.partition("-")
    return Attachment(
        HelperKey("tftp", family, L4Proto.UDP),
        path,
        (PortRange(int(first), int(last or first)),),
        interface,
        tuple(filter(None, (saddr,))),
        tuple(filter(None, (daddr,))),
    )


def traffic_rules(backend: Backend, *attachments: Attachment) -> Rules:
    keys = tuple(sorted({a.key for a in attachments}))
    helper = Helper("tftp", "tftp", Engine.KERNEL, keys, (), attachments, ())
    return render.target(Desired("unit", "p.yaml", "", backend, (helper,), (), (), ())).rules


def send(address: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (address, port))


def test_traffic_gets_the_helper_where_the_rules_say_so(
    adapter: RuleBackend, backend: Backend, router: tuple[Netns, Netns]
) -> None:
    client, server = router
    shapes = [
        attachment
        for family, around, inside, outside, to in (
            (L3Proto.IP, "10.0.0.0/8", "10.1.0.0/16", "10.2.0.0/16", "10.1.0.2"),
            (L3Proto.IP6, "fd00::/8", "fd00:1::/32", "fd00:2::/32", "fd00:1::2"),
        )
        for attachment in (
            tftp(family, Path.INCOMING, "69"),
            tftp(family, Path.INCOMING, "70-71"),
            tftp(family, Path.INCOMING, "100-109", interface="lan0"),
            tftp(family, Path.INCOMING, "110", interface="lan0"),
            tftp(family, Path.INCOMING, "120-129", interface="wan0"),
            tftp(family, Path.INCOMING, "200-209", inside, to, "lan0"),
            tftp(family, Path.INCOMING, "210", inside, to, "lan0"),
            tftp(family, Path.INCOMING, "220-229", outside, to, "lan0"),
            tftp(family, Path.INCOMING, "300-309", inside),
            tftp(family, Path.INCOMING, "300-319", around),
            tftp(family, Path.INCOMING, "320", outside),
        )
    ]
    helped = [69, 70, 71, 100, 105, 109, 110, 200, 205, 210, 300, 309, 310, 319]
    left_alone = [68, 72, 99, 111, 120, 125, 199, 211, 220, 225, 299, 320, 321]
    adapter.load(server, traffic_rules(backend, *shapes))
    for address in ("10.1.0.2", "fd00:1::2"):
        before = conntrack.connections(server).get("tftp", 0)
        with netns.entered(client):
            for port in left_alone:
                send(address, port)
        assert conntrack.connections(server).get("tftp", 0) == before
        with netns.entered(client):
            for number, port in enumerate(helped, start=1):
                send(address, port)
                assert (port, conntrack.connections(server).get("tftp", 0)) == (port, before + number)


def test_traffic_of_this_host_gets_the_helper(
    adapter: RuleBackend, backend: Backend, router: tuple[Netns, Netns]
) -> None:
    client, _ = router
    wanted = traffic_rules(
        backend,
        tftp(L3Proto.IP, Path.OUTGOING, "69", daddr="10.1.0.2", interface="lan0"),
        tftp(L3Proto.IP, Path.OUTGOING, "70-75", daddr="10.1.0.2", interface="lan0"),
        tftp(L3Proto.IP6, Path.OUTGOING, "69"),
    )
    adapter.load(client, wanted)
    with netns.entered(client):
        for address, port in (("10.1.0.2", 69), ("10.1.0.2", 72), ("fd00:1::2", 69), ("10.1.0.2", 76)):
            send(address, port)
    assert conntrack.connections(client) == {"tftp": 3}


@pytest.mark.parametrize("backend", [Backend.IPTABLES_LEGACY, Backend.IPTABLES_NFT], ids=str)
def test_what_cannot_be_read_is_not_taken_for_nothing(
    backend: Backend, space: Netns, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules would be loaded twice, or left behind without the helpers that they name."""
    adapter = IptablesRules(backend)
    adapter.load(space, rules(backend))
    before = adapter.listing(space, "unit")
    failing = tmp_path / f"{backend}-save"
    failing.write_text("#!/bin/sh\necho it did not work >&2\nexit 4\n")
    failing.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(iptables, "_SYSTEM_PATH", f"{tmp_path}:{SBIN}")
        for look in (adapter.listing, adapter.flush, adapter.remove):
            with pytest.raises(KernelError, match=f"cannot list rules {backend} raw"):
                look(space, "unit")
        with pytest.raises(KernelError) as caught:
            adapter.load(space, rules(backend))
        assert "it did not work" in caught.value.cause
    assert adapter.listing(space, "unit") == before


def test_a_program_that_changes_rules_ends_with_orch(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for the lock of all iptables would load its rules after the next orch has undone them."""
    (tmp_path / "pid").touch()
    os.mkfifo(tmp_path / "never")
    program = tmp_path / "waits"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nread line < {tmp_path}/never\n")
    program.chmod(0o755)
    monkeypatch.setattr(iptables, "_SYSTEM_PATH", f"{tmp_path}:{SBIN}")
    orch = os.fork()
    if not orch:
        iptables._run("waits", given="*raw\nCOMMIT\n")
        os._exit(0)
    until(lambda: (tmp_path / "pid").read_text().endswith("\n"), "the program runs")
    pid = int((tmp_path / "pid").read_text())
    os.kill(orch, signal.SIGKILL)
    os.waitpid(orch, 0)
    try:
        until(lambda: not born(pid), "the program has ended", within_s=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
