"""An expectation as the kernel is given it: complete by construction.

Linux 6.1 and 6.12 dereference NULL where TUPLE or MASK is missing from an expectation in a verdict, so there is no way
to leave one out. Sources: ctnetlink_glue_attach_expect and ctnetlink_alloc_expect in nf_conntrack_netlink.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from orchestrator.engine import tuples
from orchestrator.engine.api import L4, Direction, Tuple
from orchestrator.engine.netlink import attribute, nest

PERMANENT = 1  # NF_CT_EXPECT_PERMANENT: stays after a match

_CTA_EXPECT_TUPLE = 2
_CTA_EXPECT_MASK = 3
_CTA_EXPECT_HELP_NAME = 6
_CTA_EXPECT_FLAGS = 8
_CTA_EXPECT_CLASS = 9
_CTA_EXPECT_NAT = 10
_CTA_EXPECT_FN = 11
_CTA_EXPECT_NAT_DIR = 1
_CTA_EXPECT_NAT_TUPLE = 2

_FOLLOW_MASTER = attribute(_CTA_EXPECT_FN, b"nat-follow-master\0")
_CLASSES = 4  # NF_CT_MAX_EXPECT_CLASSES
_HELPER_NAME_LEN = 16  # NF_CT_HELPER_NAME_LEN, with the NUL
_ADDRESS_LENGTHS = (4, 16)
_LAST_PORT = 0xFFFF
_NUMBER = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Nat:
    """How the expected connection is translated, after its master (nat-follow-master).

    `direction` is that of the master in which the expected connection goes. Its destination becomes `port` at the
    master's sender of the other direction; the kernel takes that address from the master and ignores `address`.
    """

    direction: Direction
    address: bytes
    port: int

    def __post_init__(self) -> None:
        _require_port(self.port)
        if len(self.address) not in _ADDRESS_LENGTHS:
            raise ValueError(f"an address has 4 or 16 bytes, not {len(self.address)}")


@dataclass(frozen=True, slots=True)
class Expectation:
    """A connection to come: `tuple` under a mask that is exact for the destination, and as given for the source.

    `mask_src` has the length of an address, and `mask_sport` is 0..65535. `policy` is the expectation class, 0..3.
    `flags` is 0 or PERMANENT. `helper`, of at most 15 bytes, is the registration that the new connection
    gets. Raises ValueError for anything that the kernel would refuse or misread.
    """

    tuple: Tuple
    mask_src: bytes
    mask_sport: int
    l4proto: L4
    policy: int
    flags: int
    helper: str = ""
    nat: Nat | None = None

    def __post_init__(self) -> None:
        length = len(self.tuple.src)
        if length not in _ADDRESS_LENGTHS or not length == len(self.tuple.dst) == len(self.mask_src):
            raise ValueError("source, destination and mask are addresses of one family")
        if self.nat is not None and len(self.nat.address) != length:
            raise ValueError("the address of the translation is of another family")
        for port in (self.tuple.sport, self.tuple.dport, self.mask_sport):
            _require_port(port)
        if not 0 <= self.policy < _CLASSES:
            raise ValueError(f"an expectation class is 0..{_CLASSES - 1}, not {self.policy}")
        if self.flags not in (0, PERMANENT):
            raise ValueError(f"unknown expectation flags {self.flags:#x}")
        if len(self.helper.encode()) >= _HELPER_NAME_LEN or "\0" in self.helper:
            raise ValueError(f"{self.helper!r} is no name of a helper")


def encode_expectation(expectation: Expectation) -> bytes:
    """The contents of NFQA_EXP; EXP NEW takes the same after its CTA_EXPECT_MASTER."""
    length = len(expectation.mask_src)
    mask = Tuple(expectation.mask_src, b"\xff" * length, expectation.mask_sport, _LAST_PORT)
    parts = [
        tuples.encode(_CTA_EXPECT_TUPLE, expectation.tuple, expectation.l4proto),
        tuples.encode(_CTA_EXPECT_MASK, mask, expectation.l4proto),
        attribute(_CTA_EXPECT_CLASS, _NUMBER.pack(expectation.policy)),
        attribute(_CTA_EXPECT_FLAGS, _NUMBER.pack(expectation.flags)),
    ]
    if expectation.helper:
        parts.append(attribute(_CTA_EXPECT_HELP_NAME, expectation.helper.encode() + b"\0"))
    if expectation.nat is not None:
        parts += (_FOLLOW_MASTER, _encode_nat(expectation.nat, expectation.l4proto))
    return b"".join(parts)


def _encode_nat(nat: Nat, l4proto: L4) -> bytes:
    """The tuple must be complete, though the kernel takes its source port alone."""
    original = Tuple(nat.address, bytes(len(nat.address)), nat.port, 0)
    return nest(
        _CTA_EXPECT_NAT,
        attribute(_CTA_EXPECT_NAT_DIR, _NUMBER.pack(nat.direction)),
        tuples.encode(_CTA_EXPECT_NAT_TUPLE, original, l4proto),
    )


def _require_port(port: int) -> None:
    if not 0 <= port <= _LAST_PORT:
        raise ValueError(f"a port is 0..{_LAST_PORT}, not {port}")
