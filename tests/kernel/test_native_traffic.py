"""What the native engine does to traffic on a real kernel: rewritten streams, two packets at once, stalls, overload.

Whatever happens to a helper process, traffic goes on; how long it was held is in the table below the results.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from lab.control import MODES, control
from lab.ends import TFTP_PORT, listening, opened
from lab.nat import Nat, load_nat
from lab.topology import CLIENT, ROUTER, SERVER, inside, load_filter
from tests.kernel.native import (
    ACTIVE,
    FIGURES,
    PASSIVE,
    QUEUEINGS,
    Router,
    families,
    ftp_and_tftp,
    losing,
    router,
    starts_with,
)
from tests.waiting import until

RRQ = b"\0\1file\0octet\0"
# An acknowledgement of segments that follow a lost one, where the lost one grew, is out of the window for the kernel:
# it looks for what to take off at the first byte that is missing (nf_conntrack_proto_tcp.c, tcp_in_window). It is not
# translated, so it comes to the router, which would reset the connection.
INVALID = "table inet filter { chain input { type filter hook input priority filter; ct state invalid drop; }; }"
LENGTH = 128
"""Packets that a queue of ours holds."""


@pytest.fixture(scope="module", params=QUEUEINGS)
def native(routed: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(ftp_and_tftp(request.param), request.param, tmp_path_factory.mktemp("state")) as made:
        load_nat(Nat.BOTH)
        load_filter(ROUTER, INVALID)
        yield made


# -- rewritten streams -------------------------------------------------------------------------------------------------


@families
def test_a_session_goes_on_after_payloads_grew_and_shrank(native: Router, *, ip6: bool) -> None:
    with control(ip6=ip6, nat=Nat.BOTH) as talk:
        talk.chat(2)
        for port, (mode, is_padded) in enumerate(
            ((mode, is_padded) for is_padded in (False, True) for mode in MODES[ip6]), start=40101
        ):
            heard = talk.transfer(mode, port, is_padded=is_padded)
            assert (heard == talk.announcement(mode, port, is_padded=is_padded)) is (mode == "EPSV"), heard
            talk.chat(3)
        talk.send(*(f"NOOP {number}" for number in range(40)))
        talk.send(*(f"200 {number}" for number in range(40)), end=talk.server)
        assert [talk.hear(talk.server) for _ in range(40)] == [f"NOOP {number}" for number in range(40)]
        assert [talk.hear(talk.client) for _ in range(40)] == [f"200 {number}" for number in range(40)]


@families
def test_a_rewritten_segment_that_is_lost_comes_again_the_same(native: Router, *, ip6: bool) -> None:
    """With what follows it arriving first, so that the receiver acknowledges selectively, and with nothing behind."""
    mode = ACTIVE[ip6]
    with control(ip6=ip6, nat=Nat.BOTH) as talk:
        for port, following in enumerate((["NOOP a", "NOOP b", "NOOP c", "NOOP d"], [], ["NOOP e"]), start=40121):
            with listening(CLIENT, port, ip6=ip6) as listener:
                with losing(SERVER, starts_with(mode)) as lost:
                    talk.send(talk.announcement(mode, port), *following)
                    lost.wait()
                talk.connect(mode, talk.hear(talk.server), listener)
            assert [talk.hear(talk.server) for _ in following] == following
            talk.chat(2)


def test_a_rewritten_reply_that_is_lost_comes_again_the_same(native: Router) -> None:
    with control(nat=Nat.BOTH) as talk:
        for port in (40131, 40132):
            talk.say("PASV")
            with listening(SERVER, port) as listener:
                with losing(CLIENT, starts_with("227 ")) as lost:
                    talk.send(talk.announcement("PASV", port), "200 a", "200 b", "200 c", end=talk.server)
                    lost.wait()
                talk.connect("PASV", talk.hear(talk.client), listener)
            assert [talk.hear(talk.client) for _ in range(3)] == ["200 a", "200 b", "200 c"]
            talk.chat(2)


def test_a_port_that_another_session_announced_is_announced_differently(native: Router) -> None:
    with control(nat=Nat.BOTH) as first, control(nat=Nat.BOTH) as second, listening(CLIENT, 40141) as listener:
        heard = [talk.announce("PORT", 40141) for talk in (first, second)]
        assert heard[0] != heard[1]
        for talk, line in zip((first, second), heard, strict=True):
            talk.connect("PORT", line, listener)
            talk.chat()


def test_nothing_is_read_once_a_session_is_encrypted(native: Router) -> None:
    """Nor queued, where rules queue; a rewritten stream stays adjusted."""
    with control(nat=Nat.BOTH) as talk:
        talk.transfer("PORT", 40145)
        talk.say("AUTH TLS")
        assert talk.reply("234 go ahead") == "234 go ahead"
        packets = native.counters().packets
        native.events.take()
        talk.chat(3)
        assert talk.announce("PORT", 40146) == talk.announcement("PORT", 40146)
        assert native.events.take() == ()
        if native.queueing == "rules":
            assert native.counters().packets == packets


# -- several packets at once -------------------------------------------------------------------------------------------


@families
def test_segments_of_one_session_that_wait_together(native: Router, *, ip6: bool) -> None:
    """Each shows the private data from before the first one's verdict, and some grow: questions, then the answers.

    A process that was behind reads what waits together, so it is made to be.
    """
    queues = native.queues()
    passive, active = PASSIVE[ip6], ACTIVE[ip6]
    with many_segments(), control(ip6=ip6, nat=Nat.BOTH) as talk:
        commands = [f"NOOP {number}" for number in range(20)]
        with native.stopped():
            talk.send(*commands)
            native.wait_for(len(commands), *queues)
        assert [talk.hear(talk.server) for _ in commands] == commands
        native.events.take()
        with native.stopped():
            ports = (talk.announcement(active, 40151), talk.announcement(active, 40152))
            talk.send("NOOP", passive, *ports, "NOOP 1", passive, "NOOP 2")
            native.wait_for(7, *queues)
        heard = [talk.hear(talk.server) for _ in range(7)]
        assert heard == ["NOOP", passive, *heard[2:4], "NOOP 1", passive, "NOOP 2"]
        with listening(CLIENT, 40152, ip6=ip6) as listener:
            talk.connect(active, heard[3], listener)
        with native.stopped():
            answers = (talk.announcement(passive, port) for port in (40153, 40154))
            talk.send("200 1", *answers, "200 2", end=talk.server)
            native.wait_for(4, *queues)
        told = [talk.hear(talk.client) for _ in range(4)]
        assert told == ["200 1", *told[1:3], "200 2"]
        assert [e.ends.dport for e in native.events.take()] == [40151, 40152, 40153, 40154]
        with listening(SERVER, 40154, ip6=ip6) as listener:
            talk.connect(passive, told[2], listener)
        talk.chat(3)


@families
def test_a_request_that_is_repeated_before_the_first_was_seen(native: Router, *, ip6: bool) -> None:
    """Both wait as first packets of one connection, of which only one can be confirmed."""
    with tftp(ip6=ip6) as (client, server, transfer, to):
        with native.stopped("tftp"):
            client.sendto(RRQ, to)
            client.sendto(RRQ, to)
            native.wait_for(2, *native.queues("tftp"))
        asker = server.recvfrom(1500)[1]
        assert server.recv(1500) == RRQ
        transfer.sendto(b"data", asker)
        assert client.recv(1500) == b"data"


@contextlib.contextmanager
def tftp(*, ip6: bool = False) -> Iterator[tuple[socket.socket, socket.socket, socket.socket, tuple[str, int]]]:
    """A client, the server's socket, one for its answers, and where the client finds the server."""
    with (
        opened(SERVER, socket.SOCK_DGRAM, ip6=ip6, port=TFTP_PORT) as server,
        opened(SERVER, socket.SOCK_DGRAM, ip6=ip6, port=40161) as transfer,
        opened(CLIENT, socket.SOCK_DGRAM, ip6=ip6) as client,
    ):
        yield client, server, transfer, (Nat.BOTH.server(ip6=ip6), TFTP_PORT)


@families
def test_a_chain_added_while_packets_wait(native: Router, *, ip6: bool) -> None:
    """The kernel counts chains, so a packet that goes on after it may meet the same chain again, rewritten already."""
    mode = ACTIVE[ip6]
    queues = native.queues()
    with (
        control(ip6=ip6, nat=Nat.BOTH) as talk,
        listening(CLIENT, 40171, ip6=ip6) as listener,
        tftp(ip6=ip6) as (client, server, transfer, to),
    ):
        with native.stopped(), native.stopped("tftp"):
            talk.send(talk.announcement(mode, 40171))
            client.sendto(RRQ, to)
            native.wait_for(2, *queues, *native.queues("tftp"))
            load_filter(ROUTER, "table inet other { chain late { type filter hook postrouting priority 0; }; }")
        try:
            talk.connect(mode, talk.hear(talk.server), listener)
            talk.chat(3)
            talk.transfer(mode, 40172)
            transfer.sendto(b"data", server.recvfrom(1500)[1])
            assert client.recv(1500) == b"data"
        finally:
            inside(ROUTER, "nft", "delete", "table", "inet", "other")


# -- death, stalls and overload ----------------------------------------------------------------------------------------


@families
def test_a_session_survives_the_death_of_its_helper(native: Router, *, ip6: bool) -> None:
    """Behind NAT, in the middle of PASV or EPSV, and with a rewritten payload lost that must be rewritten again."""
    active, passive = ACTIVE[ip6], PASSIVE[ip6]
    with control(ip6=ip6, nat=Nat.BOTH) as talk:
        talk.transfer(active, 40011)
        talk.say(passive)
        with losing(SERVER, starts_with(active)) as lost:
            talk.send(talk.announcement(active, 40012))
            lost.wait()
            native.kill()
            if native.queueing == "registration":
                native.wait_disabled("ftp-us")
            with control(ip6=ip6, nat=Nat.BOTH) as other:
                other.chat()  # without a process nobody is blocked
            native.apply()
            lost.wait()
        with listening(CLIENT, 40012, ip6=ip6) as listener:
            talk.connect(active, talk.hear(talk.server), listener)
        with listening(SERVER, 40013, ip6=ip6) as listener:
            talk.connect(passive, talk.reply(talk.announcement(passive, 40013)), listener)
        talk.chat(5)
        for mode in (active, passive):
            talk.transfer(mode, 40014)
        talk.chat(5)


@pytest.mark.parametrize("is_new", [False, True], ids=["known", "new"])
def test_datagrams_beyond_a_full_queue_pass(native: Router, *, is_new: bool) -> None:
    """A hung process holds as many as the queue has room for, and loses none."""
    (queue_num,) = native.queues("tftp")
    sent = [number.to_bytes(2, "big") for number in range(LENGTH + 50)]
    with tftp() as (client, server, _, to):
        if not is_new:
            client.sendto(b"first", to)
            assert server.recv(1500) == b"first"
        with native.stopped("tftp"):
            for words in sent:
                client.sendto(words, to)
            early = {server.recv(1500) for _ in range(50)}
            assert native.waiting(queue_num) == LENGTH
        late = {server.recv(1500) for _ in range(LENGTH)}
    assert early | late == set(sent)


def test_sessions_beyond_a_full_queue_pass(native: Router) -> None:
    """Once a hung process has a full queue, nobody waits for it: segments in it come again and pass."""
    queue_num = native.queues()[0]
    lines = [f"NOOP {number}" for number in range(LENGTH + 10)]
    with many_segments(), control(nat=Nat.BOTH) as talk, native.stopped():
        started = time.monotonic()
        talk.send(*lines)
        native.wait_for(LENGTH, queue_num)
        full = time.monotonic()
        with control(nat=Nat.BOTH) as other:
            other.chat()
        new = time.monotonic()
        assert [talk.hear(talk.server) for _ in lines] == lines
    FIGURES.append(
        f"{native.queueing}: hung with a full queue: a new session took {new - full:.3f} s, "
        f"segments that had waited came again after {time.monotonic() - started:.3f} s"
    )


def test_adjusted_sessions_are_never_accepted_unread(native: Router) -> None:
    """Accepted on the way past a full queue they would be adjusted twice: they are dropped and come again."""
    if native.queueing == "registration":
        assert len(native.queues()) == 1, "there an ACCEPT adjusts once, and one queue does"
        return
    plain, adjusted = native.queues()
    lines = [f"NOOP {number}" for number in range(LENGTH + 50)]
    with many_segments(), control(nat=Nat.BOTH) as talk:
        talk.transfer("PORT", 40181)
        with native.stopped():
            started = time.monotonic()
            talk.send(*lines)
            until(lambda: native.dropped(adjusted) > 0, "more segments than the queue holds")
            assert native.waiting(plain) == 0
            assert select.select([talk.server], [], [], 0)[0] == []
        assert [talk.hear(talk.server) for _ in lines] == lines
        held = time.monotonic() - started
        talk.transfer("PORT", 40182)
    FIGURES.append(f"full queue of adjusted sessions, {len(lines)} segments at once: all there after {held:.2f} s")


@contextlib.contextmanager
def many_segments() -> Iterator[None]:
    """Let the client send many segments before the first acknowledgement."""
    routes = (
        "route change 10.66.1.0/24 dev eth0 proto kernel src 10.66.1.2",
        "-6 route replace fd66:1::/64 dev eth0 proto kernel metric 256",
    )
    for route in routes:
        inside(CLIENT, "ip", *route.split(), "initcwnd", "500")
    try:
        yield
    finally:
        for route in routes:
            inside(CLIENT, "ip", *route.split())


@families
def test_segments_as_large_as_a_packet_can_be(native: Router, *, ip6: bool) -> None:
    """64 KiB in one packet, which a netlink message cannot hold whole, and super-packets of offloading; both ways."""
    lines = b"".join(b"%d\r\n" % number for number in random.Random(1).choices(range(10**9), k=60_000))
    digest = hashlib.sha256(lines).hexdigest()
    for mtu in (65535, 1500):
        with large_packets(mtu), control(ip6=ip6, nat=Nat.BOTH) as talk:
            talk.transfer(ACTIVE[ip6], 40191)
            before = native.counters().packets
            started = time.monotonic()
            for sender, receiver in ((talk.client, talk.server), (talk.server, talk.client)):
                feeder = threading.Thread(target=sender.sendall, args=(lines,))
                feeder.start()
                assert hashlib.sha256(received(receiver, len(lines))).hexdigest() == digest
                feeder.join()
            took = time.monotonic() - started
            talk.chat()  # a queue that was full let segments pass unread, and then a helper waits for the next line
            talk.transfer(ACTIVE[ip6], 40192)
        packets = native.counters().packets - before
        FIGURES.append(
            f"{native.queueing}, {'ip6' if ip6 else 'ip'}, MTU {mtu}: {2 * len(lines) / 1e6:.1f} MB through an "
            f"inspected session in {took:.1f} s, {packets} packets queued"
        )


def received(end: socket.socket, count: int) -> bytes:
    pieces = []
    while count:
        pieces.append(end.recv(count))
        assert pieces[-1]
        count -= len(pieces[-1])
    return b"".join(pieces)


@contextlib.contextmanager
def large_packets(mtu: int) -> Iterator[None]:
    links = ((CLIENT, "eth0"), (SERVER, "eth0"), (ROUTER, "lan0"), (ROUTER, "wan0"))
    for netns, device in links:
        inside(netns, "ip", "link", "set", device, "mtu", str(mtu))
    try:
        yield
    finally:
        for netns, device in links:
            inside(netns, "ip", "link", "set", device, "mtu", "1500")


def test_a_rewritten_segment_of_64_kib(native: Router) -> None:
    """Its checksum is ours, and its receiver checks it."""
    with large_packets(65535), control(nat=Nat.BOTH) as talk, listening(CLIENT, 40195) as listener:
        rest = "NOOP " + "x" * 60_000
        talk.send(f"{talk.announcement('PORT', 40195)}\r\n{rest}")
        talk.connect("PORT", talk.hear(talk.server), listener)
        assert talk.hear(talk.server) == rest
        talk.chat(2)


def test_a_process_killed_while_packets_wait(native: Router) -> None:
    """What waits is lost and sent again; the next packets pass without a process. Leaves the process dead."""
    queues = native.queues()
    with control() as talk:
        talk.chat()
        with native.stopped():
            talk.send("NOOP")
            native.wait_for(1, *queues)
            started = time.monotonic()
            native.kill()
        assert talk.hear(talk.server) == "NOOP"
        held = time.monotonic() - started
        talk.chat()
    started = time.monotonic()
    with control() as talk:
        talk.chat()
    FIGURES.append(
        f"{native.queueing}: killed while a segment waited: it arrived {held:.3f} s later; "
        f"a new session then began within {time.monotonic() - started:.3f} s"
    )
    native.apply()
