"""What the author of a helper writes against: a class that turns a payload into expectations, and nothing else.

A helper is pure. It gets a payload, the direction it travels in, the connection, and its private data; it answers what
further connections that payload announces. It has no socket, no clock and no state of its own: what it must remember
between two packets of a connection is its private data, which lives in the kernel and survives the process. NAT, the
order of TCP segments, verdicts and limits are the engine's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar, NamedTuple


class Direction(IntEnum):
    """ORIGINAL packets come from the end that opened the connection, REPLY packets from the other."""

    ORIGINAL = 0
    REPLY = 1

    @property
    def opposite(self) -> Direction:
        return _OPPOSITES[self]


_OPPOSITES = (Direction.REPLY, Direction.ORIGINAL)


class L4(IntEnum):
    """Transport protocols, by their IP protocol number."""

    TCP = 6
    UDP = 17


class Tuple(NamedTuple):
    """One direction of a connection. Addresses are packed, 4 bytes for IPv4 and 16 for IPv6; ports are 0..65535."""

    src: bytes
    dst: bytes
    sport: int
    dport: int


class Flow(NamedTuple):
    """A connection as conntrack knows it. Without NAT the reply tuple is the original one turned round.

    `tuples` are indexed by direction: `flow.tuples[direction].src` is the sender of a packet as it was sent, and
    `flow.tuples[direction.opposite].dst` the same end as the receiver sees it, after NAT.
    """

    tuples: tuple[Tuple, Tuple]
    l4proto: L4
    is_nated: bool = False

    @property
    def is_ipv6(self) -> bool:
        return len(self.tuples[0].src) == 16


class Source(Enum):
    """Who may open the expected connection: the other end of the one that announced it, or anybody."""

    PEER = "peer"
    ANY = "any"


class Expect(NamedTuple):
    """A connection to come, from the receiver of this payload (or anybody) to its sender.

    `port` is where it goes, as the payload says it; None means the port that this very packet was sent from (TFTP, and
    answers to a multicast query). `address` is the one in the payload, None if it holds none. `text` says which bytes
    of the payload, first and end, announce port and address: the engine rewrites them with `Helper.announce` where NAT
    translates. `source_port` 0 is any. `policy` is an index into `Helper.policies`. A permanent expectation stays after
    a match. `helper` is the registration of another helper that the new connection gets.
    """

    l4proto: L4
    port: int | None = None
    address: bytes | None = None
    text: tuple[int, int] | None = None
    source: Source = Source.PEER
    source_port: int = 0
    policy: int = 0
    is_permanent: bool = False
    helper: str = ""


class Answer(NamedTuple):
    """What a helper makes of one payload. `private` None leaves the private data as it is.

    `is_finished` says that nothing in the rest of this connection can be read (it is encrypted, say): the engine stops
    inspecting it. `refused` is why a message that announces something leads to no expectation; it is counted.
    """

    expects: tuple[Expect, ...] = ()
    private: bytes | None = None
    is_finished: bool = False
    refused: str = ""


NOTHING = Answer()
"""The answer to most payloads."""


@dataclass(frozen=True, slots=True)
class Policy:
    """An expectation class: at most `expect_max` (1..255) of them per connection, each for `expect_timeout_s`."""

    name: str
    expect_max: int
    expect_timeout_s: int


@dataclass(frozen=True, slots=True)
class Serves:
    """A transport of the protocol and the usual ports of its server."""

    l4proto: L4
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the expectations of a helper may open; the engine refuses the rest. A profile may loosen each by name.

    Ports are those where the expected connection goes. `is_any_destination` lets a payload name another host.
    """

    first_port: int = 1024
    last_port: int = 65535
    is_any_source: bool = False
    is_any_destination: bool = False
    is_permanent: bool = False


class Helper:
    """Base class of all helpers. Override the attributes that differ, `inspect`, and `announce` if it rewrites.

    Attributes:
        summary      one line for people
        serves       transports and usual ports
        policies     expectation classes, 1 to 4
        families     `ip`, `ip6`, or both
        outgoing_only  attached by default only to connections that this host opens (multicast queries)
        private_len  bytes of private data, zeroes at first: at most 32 on UDP, 15 on TCP, where the engine has the rest
        delimiter    TCP: what ends a message, such as a newline. `inspect` then gets whole messages only, one or more,
                     however they were cut into segments; one above 512 bytes that is cut is skipped. Empty: it gets
                     each segment as it is
        bounds       what its expectations may open
        triggers     TCP: what the payloads begin with that can matter, for `inspect: triggers`; empty if everything can
    """

    summary: ClassVar[str] = ""
    serves: ClassVar[tuple[Serves, ...]]
    policies: ClassVar[tuple[Policy, ...]]
    families: ClassVar[tuple[str, ...]] = ("ip", "ip6")
    outgoing_only: ClassVar[bool] = False
    private_len: ClassVar[int] = 0
    delimiter: ClassVar[bytes] = b""
    bounds: ClassVar[Bounds] = Bounds()
    triggers: ClassVar[tuple[bytes, ...]] = ()

    def dull(self, direction: Direction, private: bytes) -> re.Pattern[bytes] | None:  # noqa: ARG002
        """Payloads that `inspect` answers with NOTHING while the private data is this, as one pattern; None if unknown.

        It saves time and changes nothing: what matches as a whole is not given to `inspect`. The engine asks once for
        each value of the private data that it meets, and adds by itself that messages must be whole. Flags of the
        pattern are arguments of `re.compile`, not part of it.
        """
        return None

    def inspect(self, payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer:
        """What the payload announces. `private` has `private_len` bytes. Any bytes may come; never raises for them.

        On TCP every byte comes once and in order: retransmissions are the engine's business. After bytes that the
        engine did not see, it goes on at the next delimiter, and `private` is all zero again.
        """
        raise NotImplementedError

    def announce(self, text: bytes, address: bytes, port: int) -> bytes:
        """`text`, which is what `Expect.text` pointed at, for another address and port, in the same form."""
        raise NotImplementedError
