"""Live connections, expectations and routes: in namespaces of their own, and messages as any bytes."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.engine import tuples
from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.netlink import DecodeError as EngineDecodeError
from orchestrator.engine.netlink import attribute, nest
from orchestrator.errors import DecodeError
from orchestrator.kernel import netlink, netns
from orchestrator.kernel.links import interfaces
from orchestrator.kernel.live import decode_connection, decode_expectation, live_connections, live_expectations
from orchestrator.kernel.netns import scratch
from orchestrator.kernel.probing import probe
from orchestrator.kernel.routes import route
from orchestrator.model import L3Proto, L4Proto
from orchestrator.ports import Ends, LiveConnection, LiveExpectation, Route
from tests.unit.test_conntrack import connection, live
from tests.waiting import until

root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")

ports = st.integers(0, 0xFFFF)
addresses = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


@st.composite
def flows(draw: st.DrawFn) -> Tuple:
    src = draw(addresses)
    return Tuple(src, draw(st.binary(min_size=len(src), max_size=len(src))), draw(ports), draw(ports))


def ends(flow: Tuple) -> Ends:
    return Ends(str(ipaddress.ip_address(flow.src)), flow.sport, str(ipaddress.ip_address(flow.dst)), flow.dport)


@given(flows(), st.sampled_from(L4), st.sampled_from(["", "ftp-us"]))
def test_a_connection_reads_as_it_was_written(flow: Tuple, transport: L4, helper: str) -> None:
    body = tuples.encode(1, flow, transport) + (nest(5, attribute(1, helper.encode() + b"\0")) if helper else b"")
    expected = L4Proto[transport.name]
    assert decode_connection(bytes(netlink.HEADER_BYTES) + body) == (expected, LiveConnection(ends(flow), helper))


@given(flows(), st.integers(1, 9))
def test_a_tcp_connection_that_ended_is_left_out(flow: Tuple, state: int) -> None:
    """It looks as if it had no helper, and `orch explain` would call it older than the rules."""
    body = tuples.encode(1, flow, L4.TCP) + nest(4, nest(1, attribute(1, bytes([state]))))
    message = bytes(netlink.HEADER_BYTES) + body
    with pytest.raises(EngineDecodeError) if state >= 6 else contextlib.nullcontext():  # LAST_ACK and what follows
        assert decode_connection(message)[1] == LiveConnection(ends(flow), "")


@given(flows(), flows(), st.sampled_from(L4), st.integers(0, 2**32 - 1))
def test_an_expectation_reads_as_it_was_written(master: Tuple, flow: Tuple, transport: L4, timeout_s: int) -> None:
    body = tuples.encode(1, master, L4.TCP) + tuples.encode(2, flow, transport) + tuples.encode(3, flow, transport)
    body += attribute(4, timeout_s.to_bytes(4, "big")) + attribute(6, b"ftp\0")
    found = decode_expectation(bytes(netlink.HEADER_BYTES) + body)
    assert found == LiveExpectation(ends(master), L4Proto[transport.name], ends(flow), "ftp", timeout_s)


@settings(max_examples=300)
@given(st.binary(max_size=150))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for decode in (decode_connection, decode_expectation):
        with contextlib.suppress(DecodeError, EngineDecodeError):
            decode(bytes(netlink.HEADER_BYTES) + data)


@live
def test_what_the_kernel_has() -> None:
    with scratch():
        here = netns.own()
        for number in range(3):
            netlink.perform(connection(number, b"ftp" if number == 1 else b""))
        found = live_connections(here, L3Proto.IP, L4Proto.TCP)
        assert sorted(c.helper for c in found) == ["", "", "ftp"]
        assert len({c.ends for c in found}) == 3
        assert live_connections(here, L3Proto.IP6, L4Proto.TCP) == ()
        assert live_connections(here, L3Proto.IP, L4Proto.UDP) == ()
        assert live_expectations(here, L3Proto.IP) == ()


@root
def test_routes() -> None:
    with scratch():
        here = netns.own()
        assert route(here, "192.0.2.1") == Route(is_local=False, interface="")
        for command in (
            "ip link set lo up",
            "ip link add lan0 type veth peer name lan1",
            "ip link set lan0 up",
            "ip addr add 192.0.2.1/24 dev lan0",
            "ip addr add fd66::1/64 dev lan0 nodad",
        ):
            subprocess.run(command.split(), check=True)
        assert route(here, "192.0.2.1").is_local
        # A worker of the kernel makes this route, with nodad as well.
        until(lambda: route(here, "fd66::1").is_local, "its own address is local")
        assert route(here, "192.0.2.9") == Route(is_local=False, interface="lan0")
        assert route(here, "fd66::9") == Route(is_local=False, interface="lan0")
        assert route(here, "203.0.113.1") == Route(is_local=False, interface="")
        with pytest.raises(ValueError, match="does not appear"):
            route(here, "nobody")


@root
def test_interfaces() -> None:
    with scratch():
        here = netns.own()
        subprocess.run(["ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1"], check=True)
        assert interfaces(here) == {"lo": "", "lan0": "", "lan1": ""}


@live
def test_the_kernel_answers_what_it_is_asked() -> None:
    answers = probe()
    assert answers["nf_conntrack_netlink"] == ""
    assert answers["nft_ct"] == ""
    assert set(answers) >= {"nfnetlink_cthelper", "nfnetlink_queue", "nft_queue"}
