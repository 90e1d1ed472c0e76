"""How expectations end: opened by a connection, not in time, or taken away; told by the events of ctnetlink.

It runs beside a supervisor, so it imports the standard library and the engine alone. The kernel tells of an expectation
when it comes and when it goes, never why it goes. The reason follows from what the event carries, see `Tracker`.
Connections that began while nobody on the host listened to ctnetlink have no events (nf_conntrack_events=2, the
default; nf_ct_ecache_ext_add), and neither have their expectations.
Sources: ctnetlink_expect_event, ctnetlink_exp_dump_expect in nf_conntrack_netlink.c; nf_conntrack_expect.c.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from struct import Struct
from typing import Any, NamedTuple, Protocol

from orchestrator.engine import netlink, tuples
from orchestrator.engine.api import L4, Tuple
from orchestrator.engine.ctnetlink import CTA_TUPLE_ORIG, Client
from orchestrator.engine.expectation import PERMANENT
from orchestrator.engine.netlink import HEADER_LEN, DecodeError, attributes

LIVE_LIMIT = 65_536
"""Expectations that a tracker remembers; of more it forgets the oldest, whose end then counts nothing."""

_GROUPS = (4, 6)  # NFNLGRP_CONNTRACK_EXP_NEW and _DESTROY
_EXP_NEW, _EXP_DELETE = 0x200, 0x202
_CT_GET = 0x101
_CTA_EXPECT_MASTER = 1
_CTA_EXPECT_TUPLE = 2
_CTA_EXPECT_MASK = 3
_CTA_EXPECT_TIMEOUT = 4
_CTA_EXPECT_ID = 5
_CTA_EXPECT_HELP_NAME = 6
_CTA_EXPECT_FLAGS = 8
_CTA_EXPECT_CLASS = 9
_NETLINK_ADD_MEMBERSHIP = 1
_SOL_NETLINK = 270
_RECEIVE_BUFFER = 1 << 20
_DATAGRAM_LEN = 1 << 16
_PAIR_WITHIN_S = 0.0002
_DATAGRAMS_AT_ONCE = 512  # then whoever polls looks after its other descriptors

_HEADER = Struct("=IHHII")
_NUMBER = Struct(">I")


class Expected(NamedTuple):
    """An expectation as an event tells of it: `is_new` when it came, else when it went.

    `timeout_s` is what was left of its time, in whole seconds, rounded down. `policy` is its class. `is_requested`
    tells that a program asked for its end. `id` is the same in both events, and unlikely to be another's.
    """

    is_new: bool
    id: int
    helper: str
    policy: int
    l4proto: L4
    tuple: Tuple
    mask: Tuple
    master: Tuple
    master_l4proto: L4
    timeout_s: int
    is_permanent: bool
    is_requested: bool


class Fate(StrEnum):
    """What became of an expectation; the names are those of the fields of ports.Lifetimes."""

    MADE = "made"
    USED = "used"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


def decode(data: bytes) -> Iterator[Expected]:
    """The expectations in a datagram; others than of TCP and UDP, and what cannot be read, are left out."""
    offset = 0
    while offset + HEADER_LEN <= len(data):
        length, kind, _, _, port_id = _HEADER.unpack_from(data, offset)
        if not HEADER_LEN <= length <= len(data) - offset:
            return
        if kind in (_EXP_NEW, _EXP_DELETE):
            with contextlib.suppress(DecodeError):
                yield _decode_one(data[offset + HEADER_LEN : offset + length], is_new=kind == _EXP_NEW, port_id=port_id)
        offset += length + 3 & ~3


def _decode_one(body: bytes, *, is_new: bool, port_id: int) -> Expected:
    parts = attributes(body)
    expected, l4proto = tuples.decode(parts.get(_CTA_EXPECT_TUPLE, b""))
    mask, _ = tuples.decode(parts.get(_CTA_EXPECT_MASK, b""))
    master, master_l4proto = tuples.decode(parts.get(_CTA_EXPECT_MASTER, b""))
    name = parts.get(_CTA_EXPECT_HELP_NAME, b"").rstrip(b"\0").decode(errors="backslashreplace")
    return Expected(
        is_new=is_new,
        id=_number(parts, _CTA_EXPECT_ID),
        helper=name,
        policy=_number(parts, _CTA_EXPECT_CLASS),
        l4proto=l4proto,
        tuple=expected,
        mask=mask,
        master=master,
        master_l4proto=master_l4proto,
        timeout_s=_number(parts, _CTA_EXPECT_TIMEOUT),
        is_permanent=bool(_number(parts, _CTA_EXPECT_FLAGS) & PERMANENT),
        is_requested=not is_new and port_id != 0,
    )


def _number(parts: dict[int, bytes], kind: int) -> int:
    value = parts.get(kind, b"")
    if len(value) != _NUMBER.size:
        raise DecodeError(f"attribute {kind} of {len(value)} bytes")
    return int(_NUMBER.unpack(value)[0])


class Tracker:
    """Tells how each expectation ended; pure but for what it remembers: which ones came and have not gone yet.

    An expectation that goes with no time left has expired: one used in the last second of its time counts so, too. The
    kernel looks for expired ones now and then, so that is told up to a minute late (nf_ct_expectation_gc). With time
    left it was used, unless a program asked for its end, its master connection is gone, it is a permanent one (those
    stay after they were used), or the very next event is a new one of the same master and class: the kernel then made
    room for that (expect_max), or was told of the same again (nf_ct_expect_related_report holds a lock over both).
    """

    def __init__(self, limit: int = LIVE_LIMIT) -> None:
        self._limit = limit
        self._live: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._live)

    def follow(
        self, events: Sequence[Expected], has_master: Callable[[Expected], bool]
    ) -> Iterator[tuple[Fate, Expected]]:
        """What became of each, in the order of the events; the end of one whose beginning was not seen is left out."""
        for event, following in zip(events, (*events[1:], None), strict=False):
            if event.is_new:
                self._remember(event.id)
                yield Fate.MADE, event
            elif event.id in self._live:
                del self._live[event.id]
                yield _fate(event, following, has_master), event

    def _remember(self, number: int) -> None:
        self._live[number] = None
        if len(self._live) > self._limit:
            del self._live[next(iter(self._live))]


def _fate(event: Expected, following: Expected | None, has_master: Callable[[Expected], bool]) -> Fate:
    if event.is_requested:
        return Fate.CANCELLED
    if event.timeout_s == 0:
        return Fate.EXPIRED
    if event.is_permanent or _makes_room(event, following) or not has_master(event):
        return Fate.CANCELLED
    return Fate.USED


def _makes_room(event: Expected, following: Expected | None) -> bool:
    if following is None or not following.is_new:
        return False
    return (following.master, following.master_l4proto, following.policy) == (
        event.master,
        event.master_l4proto,
        event.policy,
    )


class Listener:
    """The expectations of the network namespace that this thread is in, as they come and go.

    Nothing else wakes whoever polls `fileno()`. Needs CAP_NET_ADMIN there. The kernel loads nf_conntrack_netlink for
    it. Raises OSError.
    """

    def __init__(self) -> None:
        self._events = netlink.open_queue_socket(_RECEIVE_BUFFER)
        try:
            self._events.bind((0, 0))  # what has no port id of its own is left out of every event from the kernel
            for group in _GROUPS:
                self._events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
            self._requests = netlink.open_control_socket()
        except OSError:
            self._events.close()
            raise
        self._client = Client(self._requests)
        self._lost = 0

    def fileno(self) -> int:
        return self._events.fileno()

    def close(self) -> None:
        self._events.close()
        self._requests.close()

    def read(self) -> list[Expected]:
        """What has come since; of very much a part, and `fileno()` is readable still. Waits for 0.2 ms at most."""
        events = self._read()
        if events and not events[-1].is_new:  # what it makes room for comes some microseconds later
            select.select([self._events], [], [], _PAIR_WITHIN_S)
            events += self._read()
        return events

    def _read(self) -> list[Expected]:
        events: list[Expected] = []
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                events += decode(self._events.recv(_DATAGRAM_LEN, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        return events

    def lost(self) -> int:
        """How many events did not fit into the socket since this was asked last."""
        before, self._lost = self._lost, netlink.lost_messages(self._events)
        return self._lost - before

    def has_master(self, event: Expected) -> bool:
        """False once the connection that an expectation belonged to is gone; one in a conntrack zone is not found."""
        body = tuples.encode(CTA_TUPLE_ORIG, event.master, event.master_l4proto)
        family = socket.AF_INET if len(event.master.src) == 4 else socket.AF_INET6
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
        return self._client.request(netlink.message(_CT_GET, body, flags=flags, family=family)) != errno.ENOENT


class Census:
    """Counts the expectations of a namespace: `counts` are by the name of the helper, then by what became of them."""

    def __init__(self, listener: Listener) -> None:
        self.counts: dict[str, dict[Fate, int]] = {}
        self._listener = listener
        self._tracker = Tracker()

    def fileno(self) -> int:
        return self._listener.fileno()

    def take(self) -> None:
        """Count what has happened since; to be called when `fileno()` is readable."""
        for fate, event in self._tracker.follow(self._listener.read(), self._listener.has_master):
            counts = self.counts.setdefault(event.helper, dict.fromkeys(Fate, 0))
            counts[fate] += 1


class Supervisor(Protocol):
    """What the counting needs of orchestrator.supervise.supervisor.Supervisor."""

    extra: dict[str, Any]

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None: ...
    def counted(self) -> None: ...


def attach(supervisor: Supervisor) -> None:
    """Let a supervisor count the expectations of its namespace; where that is not allowed nobody counts."""
    try:
        census = Census(Listener())
    except OSError:
        return

    def take() -> None:
        census.take()
        supervisor.counted()

    supervisor.extra["lifetimes"] = census.counts
    supervisor.watch(census.fileno(), take)
