"""Scripted FTP and TFTP sessions through the router, both ends played by one thread over plain sockets.

Much quicker than real software, and the same bytes every time: made to compare what engines make of them.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

from lab.ends import ADDRESSES, FTP_PORT, TFTP_PORT, listening, opened
from lab.nat import Nat
from lab.topology import CLIENT, SERVER
from orchestrator.verify.expectations import Events, Expectation

_ANSWER_WITHIN_S = 5.0
_DATA_WITHIN_S = 2.0  # a filter that drops what nobody expects answers nothing


@dataclass(frozen=True, slots=True)
class Ftp:
    """One way to announce a data connection; `form` takes address, commas (address and port of IPv4), family, port."""

    form: str
    is_active: bool
    request: str = ""

    @property
    def announcer(self) -> str:
        return CLIENT if self.is_active else SERVER


@dataclass(frozen=True, slots=True)
class Tftp:
    """One kind of request, as it is on the wire."""

    request: bytes


SCRIPTS: dict[str, Ftp | Tftp] = {
    "PORT": Ftp("PORT {commas}", is_active=True),
    "PASV": Ftp("227 Entering Passive Mode ({commas}).", is_active=False, request="PASV"),
    "EPRT": Ftp("EPRT |{family}|{address}|{port}|", is_active=True),
    "EPSV": Ftp("229 Entering Extended Passive Mode (|||{port}|)", is_active=False, request="EPSV"),
    "port": Ftp("port {commas}", is_active=True),
    "227 bare": Ftp("227 Entering Passive Mode {commas}", is_active=False, request="PASV"),
    "PORT elsewhere": Ftp("PORT 10,66,1,77,200,1", is_active=True),
    "RRQ": Tftp(b"\0\1file\0octet\0"),
    "RRQ options": Tftp(b"\0\1file\0octet\0blksize\x001428\0tsize\x000\0"),
    "WRQ": Tftp(b"\0\2file\0octet\0"),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What one session brought about.

    `heard` is the announcement as it arrived, `data_from` who opened the data connection as its acceptor sees it, or
    who answered: empty where nothing was expected and so nothing was tried, `blocked` where it did not come through.
    `trouble` says why the session broke off.
    """

    expectations: tuple[Expectation, ...] = ()
    heard: str = ""
    data_from: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """A script, played over one family and through one kind of NAT; data goes to `port` or, with TFTP, comes to it."""

    script: str
    nat: Nat
    ip6: bool
    port: int

    def __str__(self) -> str:
        return f"{self.script}, {'ip6' if self.ip6 else 'ip'}, {self.nat}"

    @property
    def what(self) -> Ftp | Tftp:
        return SCRIPTS[self.script]

    def play(self, events: Events) -> Seen:
        """Play it to its end. What goes wrong on the way is part of what is seen."""
        events.take()  # an announcement of the session before this one that was sent again is expected again
        with contextlib.ExitStack() as sockets:
            if isinstance(self.what, Ftp):
                return _Control(self, self.what, sockets).play(events)
            return self._request(self.what, events, sockets)

    def listen(self, netns: str, port: int) -> socket.socket:
        return listening(netns, port, ip6=self.ip6, within_s=_ANSWER_WITHIN_S)

    def open(self, netns: str, kind: socket.SocketKind, port: int = 0) -> socket.socket:
        return opened(netns, kind, ip6=self.ip6, port=port, within_s=_ANSWER_WITHIN_S)

    def _request(self, script: Tftp, events: Events, sockets: contextlib.ExitStack) -> Seen:
        client, server, transfer = (
            sockets.enter_context(self.open(netns, socket.SOCK_DGRAM, port))
            for netns, port in ((CLIENT, self.port), (SERVER, TFTP_PORT), (SERVER, self.port))
        )
        client.sendto(script.request, (self.nat.server(ip6=self.ip6), TFTP_PORT))
        try:
            request, asker = server.recvfrom(1500)
        except TimeoutError:
            return Seen(events.take(), trouble="the request did not arrive")
        transfer.sendto(b"\0\3\0\1data", asker)
        client.settimeout(_DATA_WITHIN_S)
        try:
            _, answerer = client.recvfrom(1500)
        except TimeoutError:
            return Seen(events.take(), repr(request), "blocked")
        return Seen(events.take(), repr(request), f"{answerer[0]} {answerer[1]}")


class _Control:
    """A control connection, both ends, and what was seen of it so far."""

    def __init__(self, session: Session, script: Ftp, sockets: contextlib.ExitStack) -> None:
        self._session = session
        self._script = script
        self._sockets = sockets
        self.seen = Seen()

    def play(self, events: Events) -> Seen:
        with self._session.listen(self._script.announcer, self._session.port) as data:
            self.attempt(lambda: self.announce(events))
            self.attempt(lambda: self.transfer(data))
            self.attempt(self.go_on)
        return self.seen

    def attempt(self, act: Callable[[], None]) -> None:
        """Act, unless the session broke off before; an error is written down."""
        if self.seen.trouble:
            return
        try:
            act()
        except OSError as error:
            self.seen = replace(self.seen, trouble=str(error) or type(error).__name__)

    def announce(self, events: Events) -> None:
        """Begin a session, up to the announcement."""
        client, server = self._connect()
        _say("220 ready", server, client)
        _say("USER a", client, server)
        _say("230 welcome", server, client)
        if self._script.request:
            _say(self._script.request, client, server)
        ends = (client, server) if self._script.is_active else (server, client)
        self.seen = replace(self.seen, heard=_say(self._announcement(), *ends))
        self.seen = replace(self.seen, expectations=events.take())

    def transfer(self, data: socket.socket) -> None:
        """Open the data connection that was announced, if anybody expects it."""
        if not self.seen.expectations:
            return
        opener = self._session.open(SERVER if self._script.is_active else CLIENT, socket.SOCK_STREAM)
        self._sockets.enter_context(opener).settimeout(_DATA_WITHIN_S)
        try:
            opener.connect(announced(self.seen.heard, default=self._client.getpeername()[0]))
        except OSError:
            self.seen = replace(self.seen, data_from="blocked")
            return
        accepted, peer = data.accept()
        accepted.close()
        self.seen = replace(self.seen, data_from=peer[0])

    def go_on(self) -> None:
        """Whatever was rewritten, both directions go on."""
        for _ in range(2):
            _say("NOOP", self._client, self._server)
            _say("200 fine", self._server, self._client)

    def _connect(self) -> tuple[socket.socket, socket.socket]:
        session = self._session
        self._client = self._sockets.enter_context(session.open(CLIENT, socket.SOCK_STREAM))
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with session.listen(SERVER, FTP_PORT) as listener:
            self._client.connect((session.nat.server(ip6=session.ip6), FTP_PORT))
            self._server = self._sockets.enter_context(listener.accept()[0])
        self._server.settimeout(_ANSWER_WITHIN_S)
        return self._client, self._server

    def _announcement(self) -> str:
        ip, ip6 = ADDRESSES[self._script.announcer]
        port = self._session.port
        commas = ",".join((*ip.split("."), *map(str, divmod(port, 256))))
        address, family = (ip6, 2) if self._session.ip6 else (ip, 1)
        return self._script.form.format(commas=commas, address=address, family=family, port=port)


def play_rivals(session: Session, events: Events) -> tuple[Seen, Seen]:
    """An FTP session played twice at once: both announce the same port before either opens its data connection."""
    assert isinstance(session.what, Ftp)
    with contextlib.ExitStack() as sockets:
        data = sockets.enter_context(session.listen(session.what.announcer, session.port))
        first, second = (_Control(session, session.what, sockets) for _ in range(2))
        for control in (first, second):
            control.attempt(lambda control=control: control.announce(events))  # type: ignore[misc]
        for control in (first, second):
            control.attempt(lambda control=control: control.transfer(data))  # type: ignore[misc]
            control.attempt(control.go_on)
        return first.seen, second.seen


def announced(line: str, *, default: str) -> tuple[str, int]:
    """Address and port that a line announces; an answer to EPSV names no address."""
    if found := re.search(r"(\d+,\d+,\d+,\d+),(\d+),(\d+)", line):
        return found[1].replace(",", "."), int(found[2]) * 256 + int(found[3])
    if found := re.search(r"\|([^|]*)\|(\d+)\|", line):
        return found[1] or default, int(found[2])
    raise OSError(f"{line!r} announces nothing")


def _say(line: str, speaker: socket.socket, listener: socket.socket) -> str:
    """Send a line, and wait for it at the other end; return it as it arrives."""
    speaker.sendall(f"{line}\r\n".encode())
    heard = b""
    while not heard.endswith(b"\r\n"):
        heard += (piece := listener.recv(1500))
        if not piece:
            raise OSError("the connection was closed")
    return heard.decode().rstrip("\r\n")
