"""Hold a dialogue: both ends in one hand, word by word, and then the connections that it leads to."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.kernel.netns import entered
from orchestrator.model import L3Proto, L4Proto, Path
from orchestrator.verify.dialogues import BROADCAST, Dialogue, Ends, Opening, Side
from orchestrator.verify.disguise import Case
from orchestrator.verify.expectations import Events, Expectation
from orchestrator.verify.network import Host, Network

_WITHIN_S = 10.0
_OPEN_WITHIN_S = 3.0  # a filter that drops what nobody expects answers nothing
_RECEIVE_BYTES = 65536


def play(case: Case, network: Network, events: Events, ports: tuple[int, ...]) -> str:
    """Why a dialogue failed; empty if what it must lead to was expected, and came through the filter.

    `ports` are those to announce. Raises OSError only where the events of the kernel cannot be read.
    """
    assert case.dialogue is not None
    client = network.client if case.path is Path.INCOMING else network.router
    events.take()
    with contextlib.ExitStack() as sockets:
        stage = _Stage(case, case.dialogue, {Side.CLIENT: client, Side.SERVER: network.server}, ports, sockets)
        try:
            stage.talk()
        except OSError as error:
            return f"the dialogue itself broke off: {str(error) or type(error).__name__}"
        seen = events.take()
        return next(filter(None, (stage.open(opening, seen) for opening in case.dialogue.openings)), "")


@dataclass(slots=True)
class _Stage:
    """The sockets of one dialogue. All methods raise OSError."""

    case: Case
    dialogue: Dialogue
    hosts: dict[Side, Host]
    ports: tuple[int, ...]
    sockets: contextlib.ExitStack
    _masters: dict[Side, socket.socket] = field(default_factory=dict)
    _targets: dict[Opening, socket.socket] = field(default_factory=dict)

    def talk(self) -> None:
        """All that is said; each is heard at the other end before the next."""
        self._listen()
        connect = self._connect if self.dialogue.l4proto is L4Proto.TCP else self._meet
        connect()
        ends = self._ends()
        for say in self.dialogue.says:
            payload = say.payload(ends)
            listener = Side.SERVER if say.speaker is Side.CLIENT else Side.CLIENT
            self._send(say.speaker, payload, ends)
            self._hear(listener, len(payload))

    def open(self, opening: Opening, seen: Sequence[Expectation]) -> str:
        """Open a connection that should be expected; why it could not be."""
        target = self._other(opening.opener)
        port = self._port(opening)
        wanted = (opening.l4proto.number, self._address(target), port)
        what = f"{opening.l4proto} {self._address(opening.opener)} > {self._address(target)} {port}"
        if wanted not in [(e.ends.l4proto, e.ends.dst, e.ends.dport) for e in seen]:
            instead = "; ".join(str(e.ends) for e in seen)
            return f"{what} was not expected" + (f"; instead: {instead}" if instead else "")
        try:
            self._attempt(opening, (self._address(target), port))
        except OSError as error:
            return f"{what} was expected, and does not come through: {str(error) or type(error).__name__}"
        return ""

    # -- the first connection ------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        client = self._socket(Side.CLIENT, socket.SOCK_STREAM, self.dialogue.sport)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._server(Side.SERVER, self.case.port) as listener:
            client.connect((self._address(Side.SERVER), self.case.port))
            server = self.sockets.enter_context(listener.accept()[0])
        server.settimeout(_WITHIN_S)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._masters = {Side.CLIENT: client, Side.SERVER: server}

    def _meet(self) -> None:
        """Two UDP sockets; that of a server which many ask listens to all of them."""
        client = self._socket(Side.CLIENT, socket.SOCK_DGRAM, self.dialogue.sport)
        group = self.dialogue.group(self.case.l3proto)
        if not group:
            server = self._socket(Side.SERVER, socket.SOCK_DGRAM, self.case.port)
        else:
            server = self._socket(Side.SERVER, socket.SOCK_DGRAM, self.case.port, address="")
            self._many(client, server, group)
        self._masters = {Side.CLIENT: client, Side.SERVER: server}

    def _many(self, client: socket.socket, server: socket.socket, group: str) -> None:
        if group == BROADCAST:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        elif self.case.l3proto is L3Proto.IP:
            ours, theirs = (socket.inet_aton(self._address(side)) for side in (Side.CLIENT, Side.SERVER))
            client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ours)
            server.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + theirs)
        else:
            client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, self._index(Side.CLIENT))
            member = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@i", self._index(Side.SERVER))
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)

    def _ends(self) -> Ends:
        sport = self._masters[Side.CLIENT].getsockname()[1]
        return Ends(self._address(Side.CLIENT), self._address(Side.SERVER), sport, self.case.port, self.ports)

    def _send(self, speaker: Side, payload: bytes, ends: Ends) -> None:
        if self.dialogue.l4proto is L4Proto.TCP:
            self._masters[speaker].sendall(payload)
            return
        to = (ends.server, ends.dport) if speaker is Side.CLIENT else (ends.client, ends.sport)
        group = self.dialogue.group(self.case.l3proto)
        if speaker is Side.CLIENT and group:
            to = (self.hosts[Side.CLIENT].broadcast if group == BROADCAST else group, ends.dport)
        self._masters[speaker].sendto(payload, to)

    def _hear(self, listener: Side, count: int) -> None:
        end = self._masters[listener]
        heard = 0
        while heard < count:
            piece = end.recv(_RECEIVE_BYTES)
            if not piece:
                raise OSError("the connection was closed")
            heard += len(piece)

    # -- what it leads to ----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for opening in self.dialogue.openings:
            if opening.announced is None:
                continue
            target = self._other(opening.opener)
            if opening.l4proto is L4Proto.TCP:
                self._targets[opening] = self.sockets.enter_context(self._server(target, self._port(opening)))
            else:
                self._targets[opening] = self._socket(target, socket.SOCK_DGRAM, self._port(opening))

    def _attempt(self, opening: Opening, to: tuple[str, int]) -> None:
        kind = socket.SOCK_STREAM if opening.l4proto is L4Proto.TCP else socket.SOCK_DGRAM
        opener = self._socket(opening.opener, kind, opening.sport)
        opener.settimeout(_OPEN_WITHIN_S)
        target = self._targets.get(opening, self._masters[Side.CLIENT])
        opener.connect(to)
        if kind == socket.SOCK_STREAM:
            target.accept()[0].close()
            return
        opener.send(b"data")
        target.settimeout(_OPEN_WITHIN_S)
        while target.recvfrom(_RECEIVE_BYTES)[1][:2] != opener.getsockname()[:2]:
            pass  # an answer to the first packet that came late

    def _port(self, opening: Opening) -> int:
        if opening.announced is None:
            return int(self._masters[Side.CLIENT].getsockname()[1])
        return self.ports[opening.announced]

    # -- sockets -------------------------------------------------------------------------------------------------------

    def _socket(self, side: Side, kind: socket.SocketKind, port: int, *, address: str | None = None) -> socket.socket:
        """A socket at the address of a side, or at any of its addresses; port 0 is any port."""
        with entered(self.hosts[side].netns):
            made = self.sockets.enter_context(socket.socket(self._family, kind))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.settimeout(_WITHIN_S)
        made.bind((self._address(side) if address is None else address, port))
        return made

    def _server(self, side: Side, port: int) -> socket.socket:
        with entered(self.hosts[side].netns):
            listener = socket.create_server((self._address(side), port), family=self._family)
        listener.settimeout(_WITHIN_S)
        return listener

    def _index(self, side: Side) -> int:
        with entered(self.hosts[side].netns):
            return socket.if_nametoindex(self.hosts[side].interface)

    @property
    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET if self.case.l3proto is L3Proto.IP else socket.AF_INET6

    def _address(self, side: Side) -> str:
        return self.hosts[side].address(self.case.l3proto)

    @staticmethod
    def _other(side: Side) -> Side:
        return Side.SERVER if side is Side.CLIENT else Side.CLIENT
