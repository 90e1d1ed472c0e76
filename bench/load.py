"""Traffic for the data path: lines of FTP and datagrams of TFTP in closed loops, through whatever lies between.

Both ends of every connection are sockets of this process, in two network namespaces: one line costs two wake-ups of one
`epoll`, two receives and two sends, and no process is scheduled but this and the helper.
"""

from __future__ import annotations

import select
import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle

from orchestrator.kernel import netns

_FTP_PORT, _TFTP_PORT = 21, 69
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger: connections of a finished row leave nothing behind
_LOST_AFTER_S = 10.0  # of the guest's clock: longer than TCP needs to send again
_LONGEST = 512
# Ports that a connection announces in turn. Connections share none: an expectation is refused while another has it.
_FIRST_ANNOUNCED, _ANNOUNCED_EACH = 10_000, 64


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of transaction, a request and its answer; `expects` if the helper makes an expectation of each."""

    name: str
    helper: str
    expects: bool


PLAIN_LINE = Workload("plain line", "ftp", expects=False)
PORT = Workload("PORT", "ftp", expects=True)
PASV = Workload("PASV", "ftp", expects=True)
PLAIN_DATAGRAM = Workload("plain datagram", "tftp", expects=False)
RRQ = Workload("RRQ", "tftp", expects=True)
WORKLOADS = (PLAIN_LINE, PORT, PASV, PLAIN_DATAGRAM, RRQ)
_WARM_UP = {"ftp": PLAIN_LINE, "tftp": PLAIN_DATAGRAM}


@dataclass(frozen=True, slots=True)
class Exchange:
    """One transaction as bytes: what the client sends, and what the server answers."""

    request: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """The two ends of one connection, both non-blocking."""

    client: socket.socket
    server: socket.socket


@dataclass(frozen=True, slots=True)
class Timing:
    """How long `transactions` took altogether, and each of them: the median and the 99th percentile."""

    transactions: int
    seconds: float
    p50_us: float
    p99_us: float


_End = tuple[Callable[[bytearray], int], Callable[[bytes], int], Callable[[], bytes], bool]
"""How an end receives and sends, what it sends next, and whether it is the client."""


class LostError(Exception):
    """A request or an answer did not arrive."""


def exchanges(workload: Workload, connection: int, *, client: str, server: str) -> tuple[Exchange, ...]:
    """What a connection (numbered from 0) sends in turn, with the IPv4 addresses of its ends."""
    if workload is PLAIN_DATAGRAM:
        return (Exchange(b"\0\4\0\1", b"\0\3\0\1data"),)
    if workload is RRQ:
        return (Exchange(b"\0\1file\0octet\0", b"\0\3\0\1data"),)
    if workload is PLAIN_LINE:
        return (Exchange(b"NOOP\r\n", b"200 NOOP ok.\r\n"),)
    first = _FIRST_ANNOUNCED + connection * _ANNOUNCED_EACH
    ports = range(first, first + _ANNOUNCED_EACH)
    if workload is PORT:
        return tuple(Exchange(b"PORT %b\r\n" % _endpoint(client, port), b"200 PORT ok.\r\n") for port in ports)
    return tuple(Exchange(b"PASV\r\n", b"227 Entering Passive Mode (%b).\r\n" % _endpoint(server, p)) for p in ports)


def _endpoint(address: str, port: int) -> bytes:
    """An IPv4 address and port as FTP writes them. Source: RFC 959, HOST-PORT."""
    return ",".join((*address.split("."), str(port >> 8), str(port & 0xFF))).encode()


@dataclass(frozen=True, slots=True)
class Ends:
    """Where connections begin and end: named network namespaces and the IPv4 address of the server."""

    client: str
    server: str
    server_ip: str

    def connect(self, helper: str, count: int, stack: ExitStack) -> tuple[Pair, ...]:
        """That many connections to the usual port of the protocol, closed with the stack."""
        pairs = self._datagrams(count, stack) if helper == "tftp" else self._streams(count, stack)
        for pair in pairs:
            pair.client.settimeout(0)
            pair.server.settimeout(0)
        return pairs

    def _streams(self, count: int, stack: ExitStack) -> tuple[Pair, ...]:
        with netns.entered(netns.find(self.server)):
            listener = stack.enter_context(socket.create_server((self.server_ip, _FTP_PORT)))
        pairs = []
        for _ in range(count):
            with netns.entered(netns.find(self.client)):
                client = stack.enter_context(socket.create_connection((self.server_ip, _FTP_PORT), _LOST_AFTER_S))
            server = stack.enter_context(listener.accept()[0])
            for end in (client, server):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            pairs.append(Pair(client, server))
        return tuple(pairs)

    def _datagrams(self, count: int, stack: ExitStack) -> tuple[Pair, ...]:
        """Every client has a server socket of its own, connected to it, all on the one port of TFTP."""
        pairs = []
        for _ in range(count):
            with netns.entered(netns.find(self.client)):
                client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with netns.entered(netns.find(self.server)):
                server = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.connect((self.server_ip, _TFTP_PORT))
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((self.server_ip, _TFTP_PORT))
            server.connect(client.getsockname())
            pairs.append(Pair(client, server))
        return tuple(pairs)


def drive(pairs: Sequence[Pair], scripts: Sequence[Sequence[Exchange]], transactions: int) -> Timing:
    """Run that many transactions, on all connections at once, one at a time on each; returns when all are answered.

    Raises LostError if nothing arrives for a while.
    """
    ends: dict[int, _End] = {}
    for pair, script in zip(pairs, scripts, strict=True):
        ends |= _ends(pair, script)
    with select.epoll() as poller:
        for number in ends:
            poller.register(number, select.EPOLLIN)
        began_ns = time.perf_counter_ns()
        taken_ns = _run(ends, poller, transactions)
        seconds = (time.perf_counter_ns() - began_ns) / 1e9
    cuts = statistics.quantiles(taken_ns, n=100, method="inclusive")
    return Timing(transactions, seconds, p50_us=cuts[49] / 1e3, p99_us=cuts[98] / 1e3)


def _ends(pair: Pair, script: Sequence[Exchange]) -> dict[int, _End]:
    requests, answers = cycle([e.request for e in script]), cycle([e.answer for e in script])
    return {
        pair.client.fileno(): (pair.client.recv_into, pair.client.send, requests.__next__, True),
        pair.server.fileno(): (pair.server.recv_into, pair.server.send, answers.__next__, False),
    }


def _run(ends: dict[int, _End], poller: select.epoll, transactions: int) -> list[int]:
    """What each transaction took, in ns. One function without a call that can be spared: it is part of every figure."""
    clock, buffer = time.perf_counter_ns, bytearray(_LONGEST)
    taken_ns: list[int] = []
    started_ns: dict[int, int] = {}
    clients = [number for number, (_, _, _, is_client) in ends.items() if is_client]
    for number in clients[:transactions]:
        _, send, following, _ = ends[number]
        started_ns[number] = clock()
        send(following())
    begun = len(started_ns)
    while len(taken_ns) < transactions:
        events = poller.poll(_LOST_AFTER_S)
        if not events:
            raise LostError(f"{transactions - len(taken_ns)} of {transactions} transactions are not answered")
        for number, _ in events:
            receive, send, following, is_client = ends[number]
            receive(buffer)
            if is_client:
                now = clock()
                taken_ns.append(now - started_ns[number])
                if begun >= transactions:
                    continue
                begun += 1
                started_ns[number] = now
            send(following())
    return taken_ns


def warm_up(helper: str) -> Workload:
    """What goes over new connections first: conntrackd reads no command in the first line of a client."""
    return _WARM_UP[helper]
