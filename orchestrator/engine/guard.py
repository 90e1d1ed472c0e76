"""What an expectation may open: the last word before the kernel gets it. Whatever a payload says, these bounds hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.engine.api import Bounds, Direction, Expect, Flow, Policy, Source


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an expected connection goes, as its announcer says it: packed address, port."""

    address: bytes
    port: int


def announced(expect: Expect, flow: Flow, direction: Direction) -> Endpoint:
    """The endpoint that an expectation opens, before NAT: what the payload says, else where the packet came from."""
    sender = flow.tuples[direction]
    return Endpoint(
        sender.src if expect.address is None else expect.address,
        sender.sport if expect.port is None else expect.port,
    )


def ends_of(flow: Flow, direction: Direction) -> tuple[bytes, bytes]:
    """The addresses of the sender of a packet: its own, and the one that the receiver sees; equal without NAT."""
    return flow.tuples[direction].src, flow.tuples[direction.opposite].dst


def refusal(
    expect: Expect, flow: Flow, direction: Direction, *, bounds: Bounds, policies: Sequence[Policy], payload_len: int
) -> str:
    """Why an expectation is refused, in words; empty if it is within bounds.

    `payload_len` is that of the payload given to the helper, in bytes. The lifetime needs no test: the kernel takes it
    from the policy of the registration (nf_conntrack_expect.c, nf_ct_expect_insert).
    """
    end = announced(expect, flow, direction)
    if not 0 <= expect.policy < len(policies):
        return f"policy {expect.policy} does not exist, there are {len(policies)}"
    if expect.text is not None and not 0 <= expect.text[0] < expect.text[1] <= payload_len:
        return f"text {expect.text[0]}-{expect.text[1]} is not within the payload of {payload_len} bytes"
    if not 0 <= expect.source_port <= 0xFFFF:
        return f"source port {expect.source_port} is not a port"
    if len(end.address) != len(flow.tuples[0].src):
        return "the address is of another family than the connection"
    if not bounds.is_any_destination and end.address not in ends_of(flow, direction):
        return f"{show_address(end.address)} is not the sender's address"
    if not max(1, bounds.first_port) <= end.port <= min(bounds.last_port, 0xFFFF):
        return f"port {end.port} is outside {bounds.first_port}-{bounds.last_port}"
    if expect.source is Source.ANY and not bounds.is_any_source:
        return "any source may open it, and only the peer is allowed to"
    if expect.is_permanent and not bounds.is_permanent:
        return "it would be permanent"
    return ""


def show_address(address: bytes) -> str:
    """A packed address as text; hexadecimal if it is none."""
    if len(address) == 4:
        return ".".join(map(str, address))
    if len(address) != 16:
        return address.hex()
    import socket

    return socket.inet_ntop(socket.AF_INET6, address)
