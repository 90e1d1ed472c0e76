"""The native engine through orch: a profile's life, and helpers of one's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.control import MODES, control
from lab.ends import FTP_PORT, TFTP_PORT, listening, opened
from lab.topology import CLIENT, CLIENT_IP, ROUTER, ROUTER_FILTER, SERVER, SERVER_IP, SERVER_IP6, load_filter
from orchestrator.errors import HelperProcessError
from tests.hosts import Harness
from tests.kernel.conftest import snapshot
from tests.kernel.native import (
    FIGURES,
    QUEUEINGS,
    Router,
    ftp_and_tftp,
    router,
)
from tests.waiting import until

THREE_PORT, RAISING_PORT, HOSTILE_PORT, STEAM_PORT = 7070, 7071, 7072, 27036
STEAM_QUERY = bytes.fromhex("ffffffff214c5fa0") + b"any"
NET_ADMIN = 1 << 12
ROUNDS = 20

FILTERS = (
    "add rule inet filter forward ct state new meta l4proto { tcp, udp } "
    f"th dport {{ {THREE_PORT}, {RAISING_PORT}, {HOSTILE_PORT} }} accept"
)
CLOSED = f"""
table inet filter {{
    chain input {{
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        udp dport {STEAM_PORT} accept
    }}
}}
"""
THREE = f"""
from orchestrator.engine.api import L4, NOTHING, Answer, Direction, Expect, Helper, Policy, Serves

class Three(Helper):
    serves = (Serves(L4.TCP, ({THREE_PORT},)), Serves(L4.UDP, ({THREE_PORT},)))
    policies = (Policy("three", expect_max=3, expect_timeout_s=60),)

    def inspect(self, payload, direction, flow, private):
        if direction is Direction.ORIGINAL and payload.startswith(b"three "):
            return Answer(tuple(Expect(flow.l4proto, int(port)) for port in payload.split()[1:]))
        return NOTHING
"""
RAISING = f"""
from orchestrator.engine.api import L4, Helper, Policy, Serves

class Raising(Helper):
    serves = (Serves(L4.TCP, ({RAISING_PORT},)), Serves(L4.UDP, ({RAISING_PORT},)))
    policies = (Policy("raising", expect_max=1, expect_timeout_s=60),)

    def inspect(self, payload, direction, flow, private):
        raise RuntimeError("whatever comes")
"""

HOSTILE = f"""
import ctypes, os, socket, subprocess, sys
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves

call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long

def raw(number, *arguments):
    return call(ctypes.c_long(number), *arguments) == -1 and ctypes.get_errno()

IN_PYTHON = (
    lambda: open("/etc/passwd"),
    lambda: open("/tmp/hostile", "w"),
    lambda: open("/proc/self/mem", "wb"),
    lambda: os.listdir("/"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    lambda: socket.create_connection(("127.0.0.1", 80)),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.fork(),
    lambda: subprocess.run(["/bin/true"]),
    lambda: os.kill(os.getppid(), 9),
)
PAST_PYTHON = (  # x86-64: openat, socket, connect, fork, kill, setuid, mount, unshare, bpf, seccomp
    (257, -100, b"/etc/passwd", 0), (41, 2, 1, 0), (42, 0, b"", 0), (57,), (62, os.getppid(), 9), (105, 0),
    (165, b"none", b"/tmp", b"tmpfs", 0, 0), (272, 0x40000000), (321, 0, 0, 0), (317, 1, 0, 0),
)

class Hostile(Helper):
    serves = (Serves(L4.UDP, ({HOSTILE_PORT},)),)
    policies = (Policy("hostile", 1, 30),)

    def inspect(self, payload, direction, flow, private):
        if payload == b"all ways out":
            print("in Python", sum(self.fails(way) for way in IN_PYTHON), "of", len(IN_PYTHON), flush=True)
            print("past it", sum(raw(*way) == 1 for way in PAST_PYTHON), "of", len(PAST_PYTHON), flush=True)
        if payload == b"memory":
            bytearray(1 << 30)
        if payload == b"fault":
            raise KeyError("a fault")  # of this line
        return NOTHING

    def fails(self, way):
        try:
            way()
        except PermissionError:
            return True
        return False
"""


def transfer_by_tftp(port: int, *, ip6: bool = False) -> None:
    """A request to the scripted port, and the answer from another one."""
    with (
        opened(SERVER, socket.SOCK_DGRAM, ip6=ip6, port=TFTP_PORT) as server,
        opened(SERVER, socket.SOCK_DGRAM, ip6=ip6, port=port) as transfer,
        opened(CLIENT, socket.SOCK_DGRAM, ip6=ip6) as client,
    ):
        client.sendto(b"\0\1file\0octet\0", (SERVER_IP6 if ip6 else SERVER_IP, TFTP_PORT))
        transfer.sendto(b"data", server.recvfrom(1500)[1])
        assert client.recv(1500) == b"data"


@pytest.mark.parametrize(
    ("backend", "queueing"),
    [("nftables", "rules"), ("nftables", "registration"), ("iptables", "registration")],
)
def test_the_life_of_a_profile(orch: Harness, backend: str, queueing: str) -> None:
    """Transfers of all modes pass a filter that drops them otherwise; status, diff and teardown say what is true."""
    load_filter(ROUTER, ROUTER_FILTER)
    before = snapshot()
    text = f"backend: {backend}\n{ftp_and_tftp(queueing)}"
    orch.apply(text, ROUTER)
    for ip6, modes in MODES.items():
        with control(ip6=ip6) as talk:
            for port, mode in enumerate(modes, start=40001):
                talk.transfer(mode, port)
        transfer_by_tftp(40009, ip6=ip6)
    (profile,) = orch.status().profiles
    assert profile.drift == ()
    users = set()
    for helper, made in zip(profile.helpers, (6, 2), strict=True):
        assert helper.counters is not None
        seen = helper.counters.counters
        assert (seen.expectations, seen.refused, seen.exceptions, seen.kernel_errors, seen.stale) == (made, 0, 0, 0, 0)
        assert seen.packets >= made
        assert (helper.engine, helper.queueing) == ("native", queueing)
        users.add(_user_with_one_capability(helper.pid))
    assert len(users) == 2
    assert orch.diff(text, ROUTER).plan.is_empty
    assert [report.leftovers for report in orch.teardown(netns=ROUTER).reports] == [()]
    assert snapshot() == before


def _user_with_one_capability(pid: int) -> str:
    """Whom a process runs as; test_helper_process.py has the rest of what it may do."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert {int(fields[kind], 16) for kind in ("CapEff", "CapPrm")} == {NET_ADMIN}
    (user,) = set(fields["Uid"].split())
    assert user != "0"
    return user


LOOPED = "10.66.200.200"
"""An address that the server's host reaches itself under."""


@pytest.mark.parametrize("queueing", QUEUEINGS)
def test_on_loopback_an_announcement_keeps_its_length_and_the_session_goes_on(orch: Harness, queueing: str) -> None:
    chain = f"type nat hook output priority -100; ip daddr {LOOPED} dnat to {SERVER_IP};"
    load_filter(SERVER, f"table ip looped {{ chain output {{ {chain} }}; }}")
    attach = f"{{path: outgoing, ports: {FTP_PORT}}}"
    orch.apply(f"profile: looped\nfamilies: ip\nhelpers: {{ftp: {{queueing: {queueing}, attach: {attach}}}}}", SERVER)
    passive = f"227 Passive ({SERVER_IP.replace('.', ',')},200,10)"
    with listening(SERVER, FTP_PORT) as listener, opened(SERVER) as client:
        client.connect((LOOPED, FTP_PORT))
        server = listener.accept()[0]
        with server:
            for speaker, hearer, line in (
                (client, server, "PASV"),
                (server, client, passive),
                *((client, server, f"NOOP {number}") for number in range(3)),
                *((server, client, f"200 {number}") for number in range(3)),
            ):
                speaker.sendall(f"{line}\r\n".encode())
                assert hearer.recv(1500).decode() == f"{line}\r\n"

    def refused() -> bool:
        (helper,) = orch.status().profiles[0].helpers
        assert helper.counters is not None
        return helper.counters.counters.refused == 1 and "on loopback" in helper.counters.note

    until(refused, "the rewriting is refused")


# -- helpers of one's own ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_directory() -> Iterator[Path]:
    """A directory that only root can write, like those above it."""
    with tempfile.TemporaryDirectory(prefix="orch-test-", dir="/run") as name:
        yield Path(name)


@pytest.fixture(scope="module", params=QUEUEINGS)
def own(routed: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with own_directory() as directory:
        helpers = ""
        for name, source in (("three", THREE), ("raising", RAISING), ("hostile", HOSTILE)):
            (directory / f"{name}.py").write_text(source)
            helpers += (
                f"  {name}: {{use: {directory}/{name}.py, queueing: {request.param}, attach: {{path: incoming}}}}\n"
            )
        text = f"profile: own\nhelpers:\n{helpers}"
        with router(text, request.param, tmp_path_factory.mktemp("state"), filters=FILTERS) as made:
            yield made


def test_traffic_goes_on_whatever_a_helper_raises(own: Router) -> None:
    """Each exception is counted, and what one place in the code raises is told once."""
    with control(port=RAISING_PORT) as talk:
        talk.chat(10)
    with (
        opened(SERVER, socket.SOCK_DGRAM, port=RAISING_PORT) as server,
        opened(CLIENT, socket.SOCK_DGRAM) as client,
    ):
        for number in range(10):
            client.sendto(b"%d" % number, (SERVER_IP, RAISING_PORT))
            assert server.recv(1500) == b"%d" % number
    assert own.counters("raising").exceptions == 30
    assert own.log("raising").count("RuntimeError: whatever comes") == 1
    helper = next(h for h in own.orch.status().profiles[0].helpers if h.name == "raising")
    assert helper.counters is not None
    assert helper.counters.note == "RuntimeError: whatever comes"


def test_a_helper_that_wants_out_stays_in(own: Router) -> None:
    """What it tries fails, is counted if Python knows of it, and costs nobody a packet; nor does a lack of memory."""
    with (
        opened(SERVER, socket.SOCK_DGRAM, port=HOSTILE_PORT) as server,
        opened(CLIENT, socket.SOCK_DGRAM) as client,
    ):
        for payload in (b"all ways out", b"fault", b"memory", b"and on"):
            client.sendto(payload, (SERVER_IP, HOSTILE_PORT))
            assert server.recv(1500) == payload
    counters = own.counters("hostile")
    assert (counters.denied, counters.exceptions) == (10, 2)
    log = own.log("hostile")
    assert "in Python 10 of 10\n" in log
    assert "past it 10 of 10\n" in log or os.uname().machine != "x86_64"
    assert 'raise KeyError("a fault")  # of this line\n' in log
    helper = next(h for h in own.orch.status().profiles[0].helpers if h.name == "hostile")
    assert helper.counters is not None
    assert helper.counters.note.startswith("MemoryError")


def test_three_expectations_of_a_segment_exist_before_it_arrives(own: Router) -> None:
    with control(port=THREE_PORT) as talk:
        own.events.take()
        talk.say("three 41001 41002 41003")
        assert sorted(e.ends.dport for e in own.events.take()) == [41001, 41002, 41003]
        for port in (41001, 41002, 41003):
            with listening(CLIENT, port) as listener, opened(SERVER) as opener:
                opener.connect((CLIENT_IP, port))
                listener.accept()[0].close()


def test_three_expectations_of_a_first_datagram_exist_soon(own: Router) -> None:
    """ctnetlink knows the connection only after the verdict, so the last two come after the datagram went on."""
    own.events.take()
    late_s, blocked = [], 0
    with opened(SERVER, socket.SOCK_DGRAM, port=THREE_PORT) as server:
        for first in range(41100, 41100 + 3 * ROUNDS, 3):
            ports = [first, first + 1, first + 2]
            with (
                opened(CLIENT, socket.SOCK_DGRAM) as client,
                opened(CLIENT, socket.SOCK_DGRAM, port=first + 2) as third,
            ):
                client.sendto(b"three %d %d %d" % tuple(ports), (SERVER_IP, THREE_PORT))
                server.recv(1500)
                arrived = time.monotonic()
                server.sendto(b"at once", (CLIENT_IP, first + 2))
                made = [e.ends.dport for e in own.events.take()]
                assert made[:1] == [first]
                while len(made) < len(ports):
                    made += [e.ends.dport for e in own.events.take()]
                    assert time.monotonic() < arrived + 20
                late_s.append(time.monotonic() - arrived)
                assert made == ports
                server.sendto(b"later", (CLIENT_IP, first + 2))
                if third.recv(1500) == b"at once":
                    assert third.recv(1500) == b"later"
                else:
                    blocked += 1
    FIGURES.append(
        f"{own.queueing}: second and third expectation of a first datagram: seen {statistics.median(late_s) * 1e3:.1f} "
        f"ms after it arrived (median of {ROUNDS}; most {max(late_s) * 1e3:.1f} ms); {blocked} answers at once blocked"
    )


def test_a_changed_file_that_does_not_start_leaves_what_ran_before(orch: Harness) -> None:
    """It passes the description, and raises only where it serves."""
    with own_directory() as directory:
        file = directory / "three.py"
        file.write_text(THREE)
        text = f"profile: own\nhelpers: {{three: {{use: {file}, attach: {{path: incoming}}}}}}\n"
        orch.apply(text, ROUTER)
        file.write_text(THREE + "import sys\nif sys.argv[0].endswith('process.py'): raise RuntimeError('late')\n")
        with pytest.raises(HelperProcessError) as caught:
            orch.apply(text + "# read again\n", ROUTER)
        assert "RuntimeError: late" in caught.value.hint
        (profile,) = orch.status().profiles
        assert profile.drift == ()
        assert orch.diff(text, ROUTER).plan.is_empty
        (copy,) = orch.state_dir.glob("own@*/helper-three.py")
        assert copy.read_text() == THREE


def test_steam_finds_machines_through_a_closed_firewall(orch: Harness) -> None:
    """A broadcast of this host; answers pass from any host, but from Steam's port only. This host hears it too."""
    load_filter(CLIENT, CLOSED)
    with own_directory() as directory, contextlib.ExitStack() as ends:
        shutil.copy("profiles/steam.py", directory)
        orch.apply(Path("profiles/steam.yaml").read_text().replace("./steam.py", f"{directory}/steam.py"), CLIENT)
        asker, ourselves = (ends.enter_context(opened(CLIENT, socket.SOCK_DGRAM)) for _ in range(2))
        hears, one, other, stranger = (ends.enter_context(opened(ROUTER, socket.SOCK_DGRAM)) for _ in range(4))
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for end, address, port in (
            (ourselves, "", STEAM_PORT),
            (hears, "10.66.1.255", STEAM_PORT),
            (one, "10.66.1.1", STEAM_PORT),
            (other, "10.66.1.101", STEAM_PORT),
            (stranger, "10.66.1.1", STEAM_PORT + 1),
        ):
            end.bind((address, port))
        asker.sendto(STEAM_QUERY, ("10.66.1.255", STEAM_PORT))
        query, asking = hears.recvfrom(1500)
        assert query == ourselves.recv(1500) == STEAM_QUERY
        for end in (stranger, one, other, stranger, one):
            end.sendto(b"here", asking)
        answers = [asker.recvfrom(1500) for _ in range(3)]
        (helper,) = orch.status().profiles[0].helpers
    assert answers == [(b"here", (host, STEAM_PORT)) for host in ("10.66.1.1", "10.66.1.101", "10.66.1.1")]
    assert helper.counters is not None
    assert helper.counters.counters.expectations == 1
