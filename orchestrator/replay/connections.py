"""Connection tracking as far as a helper can tell: connections, their directions, NAT, and their private data."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.engine.api import L4, Direction, Tuple
from orchestrator.engine.packet import Segment
from orchestrator.engine.stream import STREAM_STATE_LEN
from orchestrator.replay.capture import IPV4, IpPacket

_TCP_FLAGS = 13
_SYN, _ACK = 0x02, 0x10

Ends = tuple[bytes, int, bytes, int]
"""Source address, source port, destination address, destination port, as the capture has them."""


@dataclass(slots=True)
class Connection:
    """A connection that the helper is attached to.

    `private` is what the kernel would hold, `engine_len` bytes of the engine first. `first_seq` tells a connection from
    the next one between the same ports.
    """

    number: int
    l4proto: L4
    tuples: tuple[Tuple, Tuple]
    private: bytes
    engine_len: int
    first_seq: int
    is_confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Router:
    """The router between the ends: what it attaches the helper to, and how it translates.

    The capture shows both ends by the addresses that they have themselves. `snat` is what the server sees instead of
    the client's, `dnat` what the client asked for instead of the server's; packed, empty without translation.
    """

    services: frozenset[tuple[L4, int]]
    address_lens: frozenset[int]
    snat: bytes = b""
    dnat: bytes = b""

    def tuples(self, client: tuple[bytes, int], server: tuple[bytes, int]) -> tuple[Tuple, Tuple]:
        (own, port), (asked, service) = client, server
        seen = self.snat if len(self.snat) == len(own) else own
        called = self.dnat if len(self.dnat) == len(asked) else asked
        return Tuple(own, called, port, service), Tuple(asked, seen, service, port)


@dataclass(slots=True)
class Connections:
    """All connections of a capture that the helper is attached to; the helper has `private_len` bytes in each."""

    router: Router
    private_len: int
    count: int = 0
    _known: dict[tuple[L4, Ends], tuple[Connection, Direction]] = field(default_factory=dict)

    def find(self, packet: IpPacket, segment: Segment) -> tuple[Connection, Direction] | None:
        """The connection of a packet and its direction, made if it is new; None if the helper does not get it."""
        ends = ends_of(packet, segment)
        flags = packet.data[segment.transport + _TCP_FLAGS] if segment.l4proto is L4.TCP else 0
        known = self._known.get((segment.l4proto, ends))
        is_opening = flags & (_SYN | _ACK) == _SYN
        if known and not (is_opening and known[0].first_seq != segment.seq):
            return known
        is_answer = segment.l4proto is L4.TCP and not is_opening and (flags & _SYN != 0 or self._is_from_server(ends))
        return self._begin(segment, ends, Direction.REPLY if is_answer else Direction.ORIGINAL)

    def _is_from_server(self, ends: Ends) -> bool:
        """For a capture that began in the middle of the connection: only the ports tell who opened it."""
        services = self.router.services
        return (L4.TCP, ends[3]) not in services and (L4.TCP, ends[1]) in services

    def _begin(self, segment: Segment, ends: Ends, direction: Direction) -> tuple[Connection, Direction] | None:
        sender, receiver = ends[:2], ends[2:]
        client, server = (sender, receiver) if direction is Direction.ORIGINAL else (receiver, sender)
        if (segment.l4proto, server[1]) not in self.router.services or len(server[0]) not in self.router.address_lens:
            return None
        self.count += 1
        tuples = self.router.tuples(client, server)
        engine_len = STREAM_STATE_LEN if segment.l4proto is L4.TCP else 0
        private = bytes(engine_len + self.private_len)
        connection = Connection(self.count, segment.l4proto, tuples, private, engine_len, segment.seq)
        self._known[segment.l4proto, ends] = connection, direction
        self._known[segment.l4proto, (*receiver, *sender)] = connection, direction.opposite
        return connection, direction


def ends_of(packet: IpPacket, segment: Segment) -> Ends:
    data = packet.data
    first, length = (12, 4) if packet.protocol == IPV4 else (8, 16)
    source, destination = bytes(data[first : first + length]), bytes(data[first + length : first + 2 * length])
    port = segment.transport
    return (
        source,
        int.from_bytes(data[port : port + 2], "big"),
        destination,
        int.from_bytes(data[port + 2 : port + 4], "big"),
    )
