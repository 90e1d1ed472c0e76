"""A helper of one's own: finding other machines that run Steam (Remote Play), by UDP broadcast.

A machine that looks for others broadcasts a datagram to port 27036. Each of them answers from an address of its own
to the port that asked, and a firewall takes the answers for strangers. This class says what to expect instead.
"""

from orchestrator.engine.api import L4, NOTHING, Answer, Bounds, Direction, Expect, Flow, Helper, Policy, Serves, Source

MAGIC = bytes.fromhex("ffffffff214c5fa0")  # every datagram of the protocol begins with it
QUERY = Expect(
    L4.UDP,  # `port` is left out: answers come to the port that the query was sent from
    source=Source.ANY,  # from any host, since the query names none,
    source_port=27036,  # but from this port only,
    is_permanent=True,  # and from several hosts
)


class Steam(Helper):
    summary = "Steam Remote Play, answers of machines on the local network"
    serves = (Serves(L4.UDP, (27036,)),)
    policies = (Policy("steam", expect_max=1, expect_timeout_s=10),)
    families = ("ip",)  # IPv6 has no broadcast
    outgoing_only = True  # for queries of this host, not of those behind it
    bounds = Bounds(is_any_source=True, is_permanent=True)  # what QUERY needs beyond the default

    def inspect(self, payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer:
        """Called for each datagram. It may hold anything: whoever sent it chose the bytes."""
        if direction is Direction.ORIGINAL and payload.startswith(MAGIC):
            return Answer((QUERY,))
        return NOTHING
