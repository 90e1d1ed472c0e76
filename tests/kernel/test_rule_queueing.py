"""Which packets our rules queue, and what becomes of the others: real rules, a small listener instead of a helper.

The rules are in the client, the router and the server at once, so that one dialogue goes all ways: what this host
sends, what is forwarded, and what is for this host.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import pytest

from lab import topology
from lab.topology import CLIENT, ROUTER, SERVER, SERVER_IP, SERVER_IP6, inside
from orchestrator import render
from orchestrator.engine.nfqueue import ACCEPT, STOP, Change, Decoder, Packet, encode_config, encode_verdict
from orchestrator.engine.packet import locate
from orchestrator.engine.packet import replace as rewrite
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.netns import entered, find
from orchestrator.kernel.nft import NftRules
from orchestrator.model import (
    Attachment,
    Backend,
    Desired,
    Engine,
    Helper,
    HelperKey,
    L3Proto,
    L4Proto,
    Path,
    Policy,
    PortRange,
    Queueing,
    Registration,
    RuleQueue,
    Status,
)

PORT, ASKING_PORT = 7021, 7353
LABEL, ASKING_LABEL = 69, 127
PLAIN, ADJUSTED, MANY = 40001, 40002, 40003
INPUT, OUTPUT, POSTROUTING = 1, 3, 4
CONFIRMED = 8
NAME, ASKING = "queued", "asking"
WITHIN_S = 20.0

EVERYWHERE = (CLIENT, ROUTER, SERVER)
ADDRESSES = {"ip": SERVER_IP, "ip6": SERVER_IP6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}

KEYS = tuple(HelperKey(NAME, family, l4proto) for family in L3Proto for l4proto in L4Proto)
ASKING_KEYS = tuple(HelperKey(ASKING, family, L4Proto.UDP) for family in L3Proto)
POLICY = Policy(NAME, 8, 60)

# New connections to the helped port only; an unconfirmed one would not be established when the answer comes.
FILTER = f"""
table inet filter {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        ct state new meta l4proto {{ tcp, udp }} th dport {PORT} accept
    }}
}}
"""
SNAT = """
table inet nat {
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan0" masquerade
    }
}
"""
# What comes by after our chains are done with it, and before.
WATCH = f"""
table inet watch {{
    chain postrouting-before {{
        type filter hook postrouting priority 2147483640; policy accept;
        th dport {PORT} @ih,0,8 >= 0 counter comment "before"
    }}
    chain postrouting-beside {{
        type filter hook postrouting priority 2147483646; policy accept;
        th dport {PORT} @ih,0,8 >= 0 counter comment "beside"
    }}
    chain input-beside {{
        type filter hook input priority 2147483645; policy accept;
        th dport {PORT} @ih,0,8 >= 0 counter comment "beside"
    }}
}}
"""


def desired(*, triggers: tuple[bytes, ...] = ()) -> Desired:
    ports = (PortRange(PORT, PORT),)
    served = tuple(
        attachment
        for key in KEYS
        for attachment in (
            Attachment(key, Path.INCOMING, ports, "lan0"),
            Attachment(key, Path.INCOMING, ports, "eth0"),
            Attachment(key, Path.OUTGOING, ports),
        )
    )
    asked = tuple(Attachment(key, Path.OUTGOING, (PortRange(ASKING_PORT, ASKING_PORT),)) for key in ASKING_KEYS)
    return Desired(
        profile="queued",
        source="test",
        netns="",
        backend=Backend.NFTABLES,
        helpers=(
            Helper("plain", "plain", Engine.NATIVE, KEYS, (), served, (), Queueing.RULES),
            Helper("asking", "asking", Engine.NATIVE, ASKING_KEYS, (), asked, (), Queueing.RULES),
        ),
        registrations=tuple(Registration(key, 0, Status.DISABLED, (POLICY,), 20) for key in (*KEYS, *ASKING_KEYS)),
        stock=(),
        processes=(),
        rule_queues=(
            RuleQueue("plain", KEYS, LABEL, PLAIN, ADJUSTED, triggers),
            RuleQueue("asking", ASKING_KEYS, ASKING_LABEL, MANY, None, is_multicast=True),
        ),
    )


@pytest.fixture(scope="module")
def registered(routed: None) -> Iterator[None]:
    registry = KernelRegistry()
    wanted = desired().registrations
    for registration in wanted:
        registry.create(registration)
    try:
        yield
    finally:
        for registration in wanted:
            registry.delete(registration.key)


@pytest.fixture(scope="module")
def everywhere(registered: None) -> Iterator[None]:
    """Our rules in all three namespaces, and a filter on the router."""
    try:
        for netns in EVERYWHERE:
            NftRules().load(find(netns), render.target(desired()).rules)
        topology.load_filter(ROUTER, FILTER)
        yield
    finally:
        for netns in EVERYWHERE:
            inside(netns, "nft", "flush", "ruleset")


@dataclass(frozen=True, slots=True)
class Seen:
    queue_num: int
    hook: int
    payload: bytes
    is_confirmed: bool


@dataclass(slots=True)
class Listener:
    """Answers what it is sent as the engine would, with a change if `change_of` makes one, and remembers it."""

    change_of: Callable[[Packet, bytes], Change | None] | None
    seen: list[Seen] = field(default_factory=list)

    @property
    def at(self) -> list[tuple[int, bytes]]:
        return [(s.hook, s.payload) for s in self.seen]

    def answer(self, packet: Packet) -> bytes:
        segment = locate(packet.payload)
        assert segment is not None
        payload = bytes(packet.payload[segment.payload : segment.end])
        is_confirmed = bool(packet.status & CONFIRMED)
        self.seen.append(Seen(packet.queue_num, packet.hook, payload, is_confirmed))
        assert packet.helper in (NAME.encode(), ASKING.encode())
        change = self.change_of(packet, payload) if self.change_of else None
        return encode_verdict(packet, STOP if is_confirmed else ACCEPT, change)


@contextlib.contextmanager
def listening(
    netns: str, queues: Mapping[int, bool], change_of: Callable[[Packet, bytes], Change | None] | None = None
) -> Iterator[Listener]:
    """A listener on queues (number: fails open) of a namespace; an exception in it fails the test."""
    listener = Listener(change_of)
    with entered(find(netns)):
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    ours, theirs = socket.socketpair()
    with netlink, ours, theirs:
        netlink.bind((0, 0))
        for queue_num, is_fail_open in queues.items():
            netlink.send(encode_config(queue_num, is_fail_open=is_fail_open, max_len=128))
            assert netlink.recv(4096)[16:20] == bytes(4), "the queue could not be bound"
        faults: list[Exception] = []
        thread = threading.Thread(target=_serve, args=(listener, netlink, theirs, faults))
        thread.start()
        try:
            yield listener
        finally:
            ours.send(b"x")
            thread.join()
        if faults:
            raise faults[0]


def _serve(listener: Listener, netlink: socket.socket, stop: socket.socket, faults: list[Exception]) -> None:
    decoder = Decoder()
    try:
        while stop not in select.select([netlink, stop], [], [])[0]:
            netlink.send(listener.answer(decoder.decode(memoryview(netlink.recv(70_000)))))
    except Exception as error:  # noqa: BLE001 (it is raised again by `listening`)
        faults.append(error)


_CLIENT_PORTS = itertools.count(20001)


class Dialogue:
    """Two ends of one connection, TCP or UDP, that say something in turn; every word must arrive."""

    def __init__(self, family: str, kind: str, *, near: str = CLIENT, far: str = SERVER, options: bool = False) -> None:
        is_ip6 = family == "ip6"
        domain = socket.AF_INET6 if is_ip6 else socket.AF_INET
        address = {"ip": "127.0.0.1", "ip6": "::1"}[family] if near == far else ADDRESSES[family]
        self.is_stream = kind == "tcp"
        with entered(find(far)):
            self._server = socket.socket(domain, KINDS[kind])
        with entered(find(near)):
            self._client = socket.socket(domain, KINDS[kind])
        self._sockets = [self._server, self._client]
        for end in self._sockets:
            end.settimeout(WITHIN_S)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if options:
                _add_options(end, is_ip6=is_ip6)
        self._server.bind((address, PORT))
        # Any port may be that of an earlier dialogue, whose entry in the connection table lives on.
        self._client.bind(("", next(_CLIENT_PORTS)))
        if self.is_stream:
            self._server.listen()
        self._client.connect((address, PORT))
        if self.is_stream:
            self._server = self._server.accept()[0]
            self._server.settimeout(WITHIN_S)
            self._sockets.append(self._server)

    def ask(self, words: bytes, heard: bytes | None = None) -> None:
        """The client says something, and the server hears it, or what became of it on the way."""
        self._client.send(words)
        arrived, peer = self._server.recvfrom(4096)
        if not self.is_stream:
            self._server.connect(peer)
        assert arrived == (words if heard is None else heard)

    def answer(self, words: bytes) -> None:
        self._server.send(words)
        assert self._client.recv(4096) == words

    def close(self) -> None:
        for end in self._sockets:
            end.close()


def _add_options(end: socket.socket, *, is_ip6: bool) -> None:
    """A destination options header of eight bytes of padding, or four bytes of IPv4 options."""
    if is_ip6:
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes((0, 0, 1, 4, 0, 0, 0, 0)))
    else:
        end.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((1, 1, 1, 0)))


@contextlib.contextmanager
def dialogue(family: str, kind: str, **options: str | bool) -> Iterator[Dialogue]:
    with contextlib.closing(Dialogue(family, kind, **options)) as talk:  # type: ignore[arg-type]
        yield talk


families = pytest.mark.parametrize("family", ADDRESSES)
kinds = pytest.mark.parametrize("kind", KINDS)
BOTH = {PLAIN: True, ADJUSTED: False}


def counted(netns: str) -> dict[str, int]:
    """Packets by chain of the table `watch`."""
    listed = json.loads(inside(netns, "nft", "-j", "list", "table", "inet", "watch").stdout)["nftables"]
    rules = [item["rule"] for item in listed if "rule" in item]
    return {r["chain"]: e["counter"]["packets"] for r in rules for e in r["expr"] if "counter" in e}


@families
@kinds
@pytest.mark.parametrize("options", [False, True], ids=["plain", "with-options"])
def test_each_payload_is_queued_once_on_each_host_and_nothing_else(
    everywhere: None, family: str, kind: str, *, options: bool
) -> None:
    """Also one that begins with NUL; not handshakes and bare ACKs. IP options and extension headers do not matter."""
    topology.load_filter(ROUTER, WATCH)
    topology.load_filter(SERVER, WATCH)
    with contextlib.ExitStack() as stack:
        client, router, server = (stack.enter_context(listening(netns, BOTH)) for netns in EVERYWHERE)
        talk = stack.enter_context(dialogue(family, kind, options=options))
        talk.ask(b"\0one")
        talk.answer(b"two")
        talk.ask(b"three")
        talk.close()
    watched = {netns: counted(netns) for netns in (ROUTER, SERVER)}
    for netns in (ROUTER, SERVER):
        inside(netns, "nft", "delete", "table", "inet", "watch")
    out, back, over = (POSTROUTING, b"\0one"), b"two", b"three"
    assert client.at == [out, (INPUT, back), (POSTROUTING, over)]
    assert router.at == [out, (POSTROUTING, back), (POSTROUTING, over)]
    assert server.at == [(INPUT, b"\0one"), (POSTROUTING, back), (INPUT, over)]
    for netns, listener in zip(EVERYWHERE, (client, router, server), strict=True):
        assert [s.is_confirmed for s in listener.seen] == [kind == "tcp", True, True], netns
        assert {s.queue_num for s in listener.seen} == {PLAIN}, netns
    # Our verdicts skip nobody's chain: what was queued is seen by all that come before the confirmation.
    assert watched[ROUTER] == {"postrouting-before": 2, "postrouting-beside": 2, "input-beside": 0}
    assert watched[SERVER] == {"postrouting-before": 0, "postrouting-beside": 0, "input-beside": 2}


@families
@kinds
def test_this_host_talking_to_itself_is_queued_once(everywhere: None, family: str, kind: str) -> None:
    with listening(CLIENT, BOTH) as listener, dialogue(family, kind, near=CLIENT, far=CLIENT) as talk:
        talk.ask(b"one")
        talk.answer(b"two")
    assert listener.at == [(POSTROUTING, b"one"), (POSTROUTING, b"two")]


@families
@kinds
def test_without_a_listener_connections_pass_and_are_confirmed(everywhere: None, family: str, kind: str) -> None:
    with dialogue(family, kind) as talk:
        talk.ask(b"one")
        talk.answer(b"two")
        talk.ask(b"three")
        entries = inside(ROUTER, "conntrack", "-L", "-f", {"ip": "ipv4", "ip6": "ipv6"}[family], "-p", kind).stdout
    ours = [line for line in entries.splitlines() if f"dport={PORT} " in line]
    assert ours
    assert all(f"helper={NAME}" in line for line in ours)


@kinds
def test_an_empty_datagram_or_segment_is_not_queued(everywhere: None, kind: str) -> None:
    with listening(ROUTER, BOTH) as listener, dialogue("ip", kind) as talk:
        if kind == "udp":
            talk.ask(b"")
        talk.ask(b"one")
    assert listener.at == [(POSTROUTING, b"one")]


@families
def test_a_datagram_that_came_in_fragments_is_queued_whole(everywhere: None, family: str) -> None:
    with listening(ROUTER, BOTH) as listener, dialogue(family, "udp") as talk:
        talk.ask(b"long" * 900)
        talk.answer(b"longer" * 600)
    assert [payload for _, payload in listener.at] == [b"long" * 900, b"longer" * 600]


@families
@kinds
def test_a_connection_whose_label_is_cleared_is_queued_no_more(everywhere: None, family: str, kind: str) -> None:
    def change(packet: Packet, payload: bytes) -> Change | None:
        return Change(clear_label=LABEL) if payload == b"AUTH" else None

    with listening(ROUTER, BOTH, change) as listener, dialogue(family, kind) as talk:
        talk.ask(b"one")
        talk.answer(b"two")
        talk.ask(b"AUTH")
        talk.answer(b"yes")
        talk.ask(b"secret")
        talk.answer(b"secret too")
    assert [payload for _, payload in listener.at] == [b"one", b"two", b"AUTH"]


def longer(packet: Packet, payload: bytes) -> Change | None:
    if payload != b"longer":
        return None
    segment = locate(packet.payload)
    assert segment is not None
    return Change(payload=rewrite(packet.payload, segment, [(0, 6, b"much longer")]))


def test_a_connection_that_was_resized_goes_to_the_queue_that_never_fails_open(everywhere: None) -> None:
    """IPv4 behind NAT; and the stream stays whole, though the packets come back from that queue adjusted already."""
    topology.load_filter(ROUTER, SNAT)
    try:
        with listening(ROUTER, BOTH, longer) as listener, dialogue("ip", "tcp") as talk:
            talk.ask(b"longer", b"much longer")
            talk.answer(b"yes")
            talk.ask(b"after")
            talk.ask(b"longer", b"much longer")
            talk.answer(b"again")
            talk.ask(b"at last")
    finally:
        inside(ROUTER, "nft", "delete", "table", "inet", "nat")
    assert [s.queue_num for s in listener.seen] == [PLAIN, *[ADJUSTED] * 5]


def test_only_payloads_that_begin_with_a_trigger_are_queued(everywhere: None) -> None:
    backend, router = NftRules(), find(ROUTER)
    backend.load(router, render.target(desired(triggers=(b"PORT", b"227", b"EPRT"))).rules)
    try:
        with listening(ROUTER, BOTH) as listener, dialogue("ip", "tcp") as talk:
            for words in (b"NOOP", b"PORT 1", b"XPORT", b"22", b"EPRT"):
                talk.ask(words)
            for words in (b"227 yes", b"2270", b"226"):
                talk.answer(words)
        with listening(ROUTER, BOTH) as others, dialogue("ip", "udp") as talk:
            talk.ask(b"NOOP")
    finally:
        backend.load(router, render.target(desired()).rules)
    assert [payload for _, payload in listener.at] == [b"PORT 1", b"EPRT", b"227 yes", b"2270"]
    assert others.at == [(POSTROUTING, b"NOOP")]


@pytest.mark.parametrize("group", ["239.66.0.1", "ff02::66", "10.66.1.255"])
def test_a_question_to_many_is_queued_once_and_reaches_this_host_too(everywhere: None, group: str) -> None:
    """Queued later than in the output hook, the copy for this host would be lost."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(CLIENT, {MANY: True}))
        members = [
            stack.enter_context(_member(netns, device, group)) for netns, device in ((CLIENT, "eth0"), (ROUTER, "lan0"))
        ]
        for words in (b"first", b"second"):
            members[0].sendto(words, (group, ASKING_PORT))
            assert [member.recv(4096) for member in members] == [words, words]
    assert listener.at == [(OUTPUT, b"first"), (OUTPUT, b"second")]


@contextlib.contextmanager
def _member(netns: str, device: str, group: str) -> Iterator[socket.socket]:
    """A socket that hears what is said to a group, or to all, on one interface, and speaks to it there."""
    is_ip6 = ":" in group
    domain = socket.AF_INET6 if is_ip6 else socket.AF_INET
    with entered(find(netns)):
        member = socket.socket(domain, socket.SOCK_DGRAM)
        index = struct.pack("=i", socket.if_nametoindex(device))
    with member:
        member.settimeout(WITHIN_S)
        member.bind(("", ASKING_PORT))
        if is_ip6:
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(domain, group) + index)
        elif group.startswith("239."):
            member.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + index)
            member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4) + index)
        else:
            member.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        yield member


def test_rules_list_as_they_were_loaded_whatever_was_there_before(everywhere: None) -> None:
    rules, backend, router = render.target(desired()).rules, NftRules(), find(ROUTER)
    listing = backend.listing(router, "queued")
    assert listing
    assert (listing, listing.digest) == (backend.expected(rules), rules.digest)
    for before in (rules, render.target(replace(desired(), rule_queues=())).rules):
        backend.load(router, before)
        assert backend.listing(router, "queued") == backend.expected(before)
        backend.load(router, rules)
        assert backend.listing(router, "queued") == listing
