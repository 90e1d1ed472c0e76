"""TFTP: the transfer that a read or write request starts, from another port of the server (RFC 1350, 2347).

Policies are those of the kernel's helper: net/netfilter/nf_conntrack_tftp.c, nf_conntrack_tftp_init.
"""

from __future__ import annotations

import re

from orchestrator.engine.api import L4, NOTHING, Answer, Direction, Expect, Flow, Helper, Policy, Serves

_OTHERS = re.compile(rb"(?!\0[\1\2]).*", re.DOTALL)  # neither a read request nor a write request
_ANY = re.compile(rb".*", re.DOTALL)
_REQUEST = re.compile(rb"\0[\1\2][^\0]+\0[^\0]+\0")  # file name and mode; options may follow
_EXPECTED = Answer((Expect(L4.UDP),))
_REFUSED = Answer(refused="a request without file name and mode")


class Tftp(Helper):
    summary = "TFTP transfers, boot servers"
    serves = (Serves(L4.UDP, (69,)),)
    policies = (Policy("tftp", expect_max=1, expect_timeout_s=300),)

    def dull(self, direction: Direction, private: bytes) -> re.Pattern[bytes]:
        return _OTHERS if direction is Direction.ORIGINAL else _ANY

    def inspect(self, payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer:
        if direction is Direction.REPLY or _OTHERS.fullmatch(payload):
            return NOTHING
        return _EXPECTED if _REQUEST.match(payload) else _REFUSED
