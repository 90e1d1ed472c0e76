"""FTP: data connections that PORT, EPRT, and the answers to PASV and EPSV announce (RFC 959, 1123, 2428, 4217).

Policies are those of the kernel's helper: net/netfilter/nf_conntrack_ftp.c, nf_conntrack_ftp_init.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from orchestrator.engine.api import L4, NOTHING, Answer, Direction, Expect, Flow, Helper, Policy, Serves

# Every repetition that something may have to follow is bounded: no text makes these patterns slow.
_COMMAND = re.compile(rb"^ *(PORT|EPRT|PASV|EPSV|AUTH)(?![^ \r\n]) *([^\n]*)", re.IGNORECASE | re.MULTILINE)
_REPLY = re.compile(rb"^([1-6]\d\d)(?:(-)|(?![^ \r\n]))([^\n]*)", re.MULTILINE)
_SIX_NUMBERS = re.compile(rb"(?<!\d)(?<!\d,)" + rb",".join([rb"(\d{1,3})"] * 6) + rb"(?!\d|,\d)")
_EXTENDED_PORT = re.compile(rb"\((([!-/:-~])\2\2(\d{1,5})\2)")  # delimiters are ASCII 33 to 126, digits left out
_EXTENDED_ADDRESS = re.compile(rb"([!-/:-~])([12])\1((?:(?!\1).){1,45})\1(\d{1,5})\1")

# What nearly everybody says, in one line of its own; the patterns above would find the same in it.
_THREE_GROUPS = rb"(\d{1,3},\d{1,3},\d{1,3},\d{1,3}),(\d{1,3}),(\d{1,3})"
_USUAL_PORT = re.compile(rb"PORT %b\r\n" % _THREE_GROUPS)
_USUAL_227 = re.compile(rb"227 [^\d\n]*%b[^\d,\n][^\d\n]*\n" % _THREE_GROUPS)
_USUAL_229 = re.compile(rb"229 [^(\n]*\((\|\|\|(\d{1,5})\|)[^\n]*\n")
_ORIGINAL, _TCP, _LAST_PORT = Direction.ORIGINAL, L4.TCP, 65535

_PASSIVE, _EXTENDED_PASSIVE = 227, 229
_SECURE = (234, 334)
_DULL_COMMAND = re.compile(rb"(?![ AEPaep])[^\n]*\n")
_DULL_REPLY = re.compile(rb"(?!22[79]|234|334)[1-6]\d\d [^\n]*\n")
_FAMILIES = {b"1": AF_INET, b"2": AF_INET6}  # the address family numbers of RFC 2428

_PRIVATE = struct.Struct("!BBH")  # PASVs and EPSVs without their answer, then flags and the code of an open reply
_MOST = 255
_CODE, _EPSV_ALL, _TLS_ASKED = 0x3FF, 0x4000, 0x8000


class Ftp(Helper):
    summary = "FTP data connections, active and passive"
    serves = (Serves(L4.TCP, (21,)),)
    policies = (Policy("ftp", expect_max=1, expect_timeout_s=300),)
    private_len = _PRIVATE.size
    delimiter = b"\n"
    triggers = tuple(
        form.encode()
        for word in ("PORT", "EPRT", "PASV", "EPSV", "AUTH", "227", "229", "234")
        for form in sorted({word, word.lower()})
    )

    def dull(self, direction: Direction, private: bytes) -> re.Pattern[bytes] | None:
        if direction is Direction.ORIGINAL:
            return _DULL_COMMAND
        return None if _PRIVATE.unpack(private)[2] & _CODE else _DULL_REPLY

    def inspect(self, payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer:
        return usual_answer(payload, direction, flow, private) or self.inspect_lines(payload, direction, flow, private)

    def inspect_lines(self, payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer:
        """The answer to any payload: `inspect` without its short cut."""
        session = _Session(flow, private)
        if direction is Direction.ORIGINAL:
            session.read_commands(payload)
        else:
            session.read_replies(payload)
        return session.answer(private)

    def announce(self, text: bytes, address: bytes, port: int) -> bytes:
        """PORT and 227 have the form `10,0,0,1,4,5`, EPRT `|1|10.0.0.1|1029|`, 229 `|||1029|`."""
        if text[:1].isdigit():
            if len(address) != 4:
                raise ValueError("PORT and 227 cannot carry an IPv6 address")
            return b",".join(b"%d" % number for number in (*address, port >> 8, port & 0xFF))
        delimiter = text[:1]
        if text[:3] == delimiter * 3:
            return b"%b%d%b" % (text[:3], port, delimiter)
        protocol, family = (b"1", AF_INET) if len(address) == 4 else (b"2", AF_INET6)
        host = inet_ntop(family, address).encode()
        if delimiter in host:
            delimiter = b"|"
        return delimiter + delimiter.join((protocol, host, b"%d" % port)) + delimiter


def usual_answer(payload: bytes, direction: Direction, flow: Flow, private: bytes) -> Answer | None:
    """The answer to what nearly all clients and servers say, sooner than `_Session` has it; None to anything else."""
    pasv, epsv, rest = _PRIVATE.unpack(private)
    if rest & ~_TLS_ASKED:
        return None
    if direction is _ORIGINAL:
        if payload == b"PASV\r\n" and pasv < _MOST:
            return Answer((), _PRIVATE.pack(pasv + 1, epsv, rest))
        if payload == b"EPSV\r\n" and epsv < _MOST:
            return Answer((), _PRIVATE.pack(pasv, epsv + 1, rest))
        found = _USUAL_PORT.fullmatch(payload)
        return _usual_expect(found, flow, None) if found else None
    if epsv and (found := _USUAL_229.fullmatch(payload)):
        port = int(found[2])
        expect = Expect(_TCP, port, None, found.span(1))
        return Answer((expect,), _PRIVATE.pack(pasv, epsv - 1, rest)) if 0 < port <= _LAST_PORT else None
    if pasv and (found := _USUAL_227.fullmatch(payload)):
        return _usual_expect(found, flow, _PRIVATE.pack(pasv - 1, epsv, rest))
    return None


def _usual_expect(found: re.Match[bytes], flow: Flow, private: bytes | None) -> Answer | None:
    """For a match with three groups: four numbers of an address, and two of a port."""
    numbers, high, low = found.groups()
    address, port = _address(numbers), int(high) << 8 | int(low)
    if not address or not port or int(high) > 255 or int(low) > 255 or flow.is_ipv6:
        return None
    return Answer((Expect(_TCP, port, address, (found.start(1), found.end(3))),), private)


@lru_cache(maxsize=1024)
def _address(numbers: bytes) -> bytes:
    """The packed address of `10,0,0,1`; empty if a number is above 255."""
    values = [int(number) for number in numbers.split(b",")]
    return bytes(values) if max(values) <= 255 else b""


class _RefusedError(ValueError):
    """The text announces something, and not what can be expected; the message says why."""


class _Session:
    """What the two ends have said so far, as private data holds it, and what the payload at hand announces."""

    def __init__(self, flow: Flow, private: bytes) -> None:
        self._flow = flow
        self._pasv, self._epsv, rest = _PRIVATE.unpack(private)
        self._open_reply = rest & _CODE  # its further lines are text, whatever they look like
        self._flags = rest & ~_CODE
        self._expects: list[Expect] = []
        self._refused = ""
        self._is_finished = False

    def answer(self, private: bytes) -> Answer:
        now = _PRIVATE.pack(self._pasv, self._epsv, self._flags | self._open_reply)
        if now == private and not (self._expects or self._refused or self._is_finished):
            return NOTHING
        return Answer(tuple(self._expects), None if now == private else now, self._is_finished, self._refused)

    def read_commands(self, payload: bytes) -> None:
        for line in _COMMAND.finditer(payload):
            argument = line[2].rstrip(b" \r")
            try:
                self._command(line[1].upper(), argument, line.start(2))
            except _RefusedError as error:
                self._refused = self._refused or f"{line[1].upper().decode()}: {error}"

    def _command(self, verb: bytes, argument: bytes, start: int) -> None:
        if verb == b"AUTH":
            if argument.upper().startswith((b"TLS", b"SSL")):
                self._flags |= _TLS_ASKED
        elif verb == b"EPSV" and argument.upper() == b"ALL":
            self._flags |= _EPSV_ALL
        elif verb == b"EPSV":
            self._epsv = min(self._epsv + 1, _MOST)
        elif self._flags & _EPSV_ALL:
            raise _RefusedError("the client said EPSV ALL")
        elif verb == b"PASV":
            self._pasv = min(self._pasv + 1, _MOST)
        else:
            address, port = self._read_port(argument) if verb == b"PORT" else self._read_eprt(argument)
            self._expect(port, address, (start, start + len(argument)))

    def read_replies(self, payload: bytes) -> None:
        for line in _REPLY.finditer(payload):
            try:
                self._reply(int(line[1]), line[3], line.start(3), is_first=line[2] is not None)
            except _RefusedError as error:
                self._refused = self._refused or f"{line[1].decode()}: {error}"
            if self._is_finished:
                return

    def _reply(self, code: int, text: bytes, start: int, *, is_first: bool) -> None:
        """A line with a code. That of a multi-line reply counts as its last line, which is the reply itself."""
        if self._open_reply not in (0, code):
            return
        self._open_reply = code if is_first else 0
        if is_first:
            return
        if code == _PASSIVE:
            self._passive(text, start)
        elif code == _EXTENDED_PASSIVE:
            self._extended_passive(text, start)
        elif code in _SECURE and self._flags & _TLS_ASKED:
            self._is_finished = True

    def _passive(self, text: bytes, start: int) -> None:
        if not self._pasv:
            raise _RefusedError("no PASV before it")
        self._pasv -= 1
        found = _SIX_NUMBERS.search(text)  # RFC 1123 4.1.2.6: anywhere in the text
        if not found:
            raise _RefusedError("no h1,h2,h3,h4,p1,p2")
        address, port = self._read_port(found[0])
        self._expect(port, address, (start + found.start(), start + found.end()))

    def _extended_passive(self, text: bytes, start: int) -> None:
        if not self._epsv:
            raise _RefusedError("no EPSV before it")
        self._epsv -= 1
        found = _EXTENDED_PORT.search(text)
        if not found:
            raise _RefusedError("no (|||port|)")
        self._expect(int(found[3]), None, (start + found.start(1), start + found.end(1)))

    def _read_port(self, text: bytes) -> tuple[bytes, int]:
        """Address and port of `10,0,0,1,4,5`."""
        found = _SIX_NUMBERS.fullmatch(text)
        if not found:
            raise _RefusedError("not h1,h2,h3,h4,p1,p2")
        if self._flow.is_ipv6:
            raise _RefusedError("an IPv4 address on IPv6")
        numbers = [int(number) for number in found.groups()]
        if max(numbers) > 255:
            raise _RefusedError("a number above 255")
        return bytes(numbers[:4]), numbers[4] << 8 | numbers[5]

    def _read_eprt(self, text: bytes) -> tuple[bytes, int]:
        """Address and port of `|1|10.0.0.1|1029|`, with any delimiter."""
        found = _EXTENDED_ADDRESS.fullmatch(text)
        if not found:
            raise _RefusedError("not |1 or 2|address|port|")
        family = _FAMILIES[found[2]]
        if self._flow.is_ipv6 != (family == AF_INET6):
            raise _RefusedError("an address of the other family")
        try:
            address = inet_pton(family, found[3].decode("ascii"))
        except (OSError, ValueError):
            raise _RefusedError("not an address") from None
        return address, int(found[4])

    def _expect(self, port: int, address: bytes | None, text: tuple[int, int]) -> None:
        if not 1 <= port <= 65535:
            raise _RefusedError(f"port {port}")
        self._expects.append(Expect(L4.TCP, port, address, text))
