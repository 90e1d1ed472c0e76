"""An FTP control connection through the router, both ends in one hand, word by word: for what goes wrong on the way."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from lab.dialogue import SCRIPTS, Ftp, announced
from lab.ends import ADDRESSES, FTP_PORT, WITHIN_S, listening, opened
from lab.nat import Nat
from lab.topology import CLIENT, SERVER

MODES = {False: ("PORT", "PASV", "EPRT", "EPSV"), True: ("EPRT", "EPSV")}
"""Ways to announce a data connection, by whether it is IPv6."""


class Control:
    """Opened through the router; what one end says is waited for at the other. All methods raise OSError."""

    def __init__(self, *, ip6: bool = False, nat: Nat = Nat.NONE, port: int = FTP_PORT) -> None:
        self._ip6 = ip6
        self._heard: dict[socket.socket, bytes] = {}
        self.client = opened(CLIENT, ip6=ip6)
        with listening(SERVER, port, ip6=ip6) as listener:
            self.client.connect((nat.server(ip6=ip6), port))
            self.server = listener.accept()[0]
        for end in (self.client, self.server):
            end.settimeout(WITHIN_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self.client.close()
        self.server.close()

    def say(self, line: str) -> str:
        """A line from the client; what the server hears."""
        self.send(line)
        return self.hear(self.server)

    def reply(self, line: str) -> str:
        """A line from the server; what the client hears."""
        self.send(line, end=self.server)
        return self.hear(self.client)

    def send(self, *lines: str, end: socket.socket | None = None) -> None:
        """Each line as a segment of its own, without waiting."""
        for line in lines:
            (end or self.client).sendall(f"{line}\r\n".encode())

    def hear(self, end: socket.socket) -> str:
        """The next line that arrives at an end."""
        heard = self._heard.pop(end, b"")
        while b"\n" not in heard:
            piece = end.recv(65536)
            if not piece:
                raise OSError("the connection was closed")
            heard += piece
        line, _, self._heard[end] = heard.partition(b"\n")
        return line.decode().rstrip("\r")

    def chat(self, rounds: int = 1) -> None:
        """Something that announces nothing, to and fro."""
        for number in range(rounds):
            assert self.say(f"NOOP {number}") == f"NOOP {number}"
            assert self.reply(f"200 {number}") == f"200 {number}"

    def announcement(self, mode: str, port: int, *, is_padded: bool = False) -> str:
        """The line that announces a port of the end that `announcer` names; padded, IPv4 numbers have leading zeros."""
        address = ADDRESSES[self.announcer(mode)][self._ip6]
        numbers = () if self._ip6 else (*map(int, address.split(".")), *divmod(port, 256))
        commas = ",".join(f"{number:03}" if is_padded else str(number) for number in numbers)
        return _script(mode).form.format(commas=commas, address=address, family=2 if self._ip6 else 1, port=port)

    def announcer(self, mode: str) -> str:
        return _script(mode).announcer

    def announce(self, mode: str, port: int, *, is_padded: bool = False) -> str:
        """Say all that leads to a data connection; the announcement as it is heard."""
        line = self.announcement(mode, port, is_padded=is_padded)
        if _script(mode).is_active:
            return self.say(line)
        self.say(_script(mode).request)
        return self.reply(line)

    def transfer(self, mode: str, port: int, *, is_padded: bool = False) -> str:
        """A data connection, announced, opened and used; the announcement as it was heard."""
        with listening(self.announcer(mode), port, ip6=self._ip6) as listener:
            heard = self.announce(mode, port, is_padded=is_padded)
            self.connect(mode, heard, listener)
        return heard

    def connect(self, mode: str, heard: str, listener: socket.socket) -> None:
        """Open the data connection that was announced, and say something over it."""
        is_active = _script(mode).is_active
        peer = (self.server if is_active else self.client).getpeername()[0]
        with opened(SERVER if is_active else CLIENT, ip6=self._ip6) as opener:
            opener.connect(announced(heard, default=peer))
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"data")
                assert opener.recv(16) == b"data"


def _script(mode: str) -> Ftp:
    script = SCRIPTS[mode]
    assert isinstance(script, Ftp)
    return script


@contextlib.contextmanager
def control(*, ip6: bool = False, nat: Nat = Nat.NONE, port: int = FTP_PORT) -> Iterator[Control]:
    with contextlib.closing(Control(ip6=ip6, nat=nat, port=port)) as made:
        yield made
