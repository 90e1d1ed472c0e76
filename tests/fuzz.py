"""Mutated input against laws that hold for any bytes, for as long as one likes; stops at the first that breaks one.

    python -m tests.fuzz [--parser NAME] [--count N] [--seconds S] [--seed N]

A law of one input takes bytes and raises if it does not hold. To add a parser, add a line to PARSERS.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random, SystemRandom
from typing import NamedTuple

from orchestrator.engine import nfqueue, packet
from orchestrator.engine.api import L4, NOTHING, Answer, Bounds, Direction, Expect, Flow, Helper, Tuple
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.netlink import DecodeError
from orchestrator.helpers.ftp import Ftp
from orchestrator.helpers.tftp import Tftp
from tests import packets

FLOW = Flow(
    (Tuple(packets.CLIENT, packets.SERVER, 40000, 21), Tuple(packets.SERVER, packets.CLIENT, 21, 40000)), L4.TCP
)
FLOW6 = Flow(
    (Tuple(packets.CLIENT6, packets.SERVER6, 40000, 21), Tuple(packets.SERVER6, packets.CLIENT6, 21, 40000)), L4.TCP
)
_OTHER = {False: bytes((203, 0, 113, 254)), True: bytes.fromhex("20010db800000000000000000000abcd")}

_FTP, _TFTP = Ftp(), Tftp()
_NOTHING_ASKED, _ALL_ASKED, _EPSV_ALL, _BANNER_OPEN = bytes(4), b"\2\2\x80\0", b"\0\0\x40\0", b"\1\1\0\xdc"
_FTP_CASES = [
    (Direction.ORIGINAL, FLOW, _NOTHING_ASKED),
    (Direction.ORIGINAL, FLOW6, b"\xff\xff\x80\0"),
    (Direction.ORIGINAL, FLOW, _EPSV_ALL),
    (Direction.REPLY, FLOW, _NOTHING_ASKED),
    (Direction.REPLY, FLOW, _ALL_ASKED),
    (Direction.REPLY, FLOW6, _ALL_ASKED),
    (Direction.REPLY, FLOW, _BANNER_OPEN),
]


class Parser(NamedTuple):
    """The law of a parser, and what its input is made of: whole examples, and words that mean something in them."""

    law: Callable[[bytes], None]
    examples: tuple[bytes, ...]
    words: tuple[bytes, ...]


def ftp(payload: bytes) -> None:
    """Expectations are complete, can be announced anew, and do not depend on how lines come together."""
    for direction, flow, private in _FTP_CASES:
        answer = _FTP.inspect(payload, direction, flow, private)
        assert answer == _FTP.inspect_lines(payload, direction, flow, private)
        assert answer == NOTHING or not _is_dull(_FTP, payload, direction, private)
        assert answer.private is None or len(answer.private) == _FTP.private_len
        announced = [_announced(payload, expect, flow) for expect in answer.expects]
        assert _line_by_line(payload, direction, flow, private) == announced
        _check_announced_anew(payload, answer, direction, flow, private)


def _is_dull(helper: Helper, payload: bytes, direction: Direction, private: bytes) -> bool:
    pattern = helper.dull(direction, private)
    return pattern is not None and pattern.fullmatch(payload) is not None


def _announced(payload: bytes, expect: Expect, flow: Flow) -> tuple[int, bytes | None, bytes]:
    """Port, address and text of a complete expectation."""
    assert expect.port is not None
    assert 1 <= expect.port <= 65535
    assert expect.address is None or len(expect.address) == len(flow.tuples[0].src)
    assert expect.text is not None
    first, end = expect.text
    assert 0 <= first < end <= len(payload)
    return expect.port, expect.address, payload[first:end]


def _line_by_line(
    payload: bytes, direction: Direction, flow: Flow, private: bytes
) -> list[tuple[int, bytes | None, bytes]]:
    found = []
    for line in payload.split(b"\n"):
        answer = _FTP.inspect(line + b"\n", direction, flow, private)
        found += [_announced(line, expect, flow) for expect in answer.expects]
        private = private if answer.private is None else answer.private
        if answer.is_finished:
            break
    return found


def _check_announced_anew(payload: bytes, answer: Answer, direction: Direction, flow: Flow, private: bytes) -> None:
    """With other endpoints written in their places, the payload announces these."""
    if not answer.expects:
        return
    address = _OTHER[flow.is_ipv6]
    wanted: list[tuple[int, bytes | None]] = []
    for number, expect in reversed(list(enumerate(answer.expects))):
        assert expect.text is not None
        first, end = expect.text
        port = 65535 - number
        payload = payload[:first] + _FTP.announce(payload[first:end], address, port) + payload[end:]
        wanted.insert(0, (port, expect.address and address))
    again = _FTP.inspect(payload, direction, flow, private)
    assert [(expect.port, expect.address) for expect in again.expects] == wanted


def tftp(payload: bytes) -> None:
    """Requests with a file name and a mode, and nothing else, expect an answer to the port they came from."""
    opcode, names = payload[:2], payload[2:].split(b"\0")
    is_request = opcode in (b"\0\1", b"\0\2") and len(names) > 2 and names[0] != b"" and names[1] != b""
    for direction in Direction:
        answer = _TFTP.inspect(payload, direction, FLOW, b"")
        assert answer == NOTHING or not _is_dull(_TFTP, payload, direction, b"")
        expected = is_request and direction is Direction.ORIGINAL
        assert answer.expects == ((Expect(L4.UDP),) if expected else ())


def locate(data: bytes) -> None:
    """A segment lies within its packet; what follows the packet in the buffer changes nothing."""
    segment = packet.locate(data)
    assert packet.locate(memoryview(data)) == segment
    if segment is None:
        return
    least = 20 if segment.l4proto is L4.TCP else 8
    assert 20 <= segment.transport <= segment.payload - least
    assert segment.payload <= segment.end <= len(data)
    assert packet.locate(data[: segment.end]) == segment
    assert packet.locate(data[: segment.end - 1]) is None


def replace(data: bytes) -> None:
    """The payload is edited as asked, lengths agree, and every checksum is as right or wrong as it was."""
    segment = packet.locate(data)
    if segment is None:
        return
    data = data[: segment.end]
    edits, payload = _edits(data[segment.payload :])
    try:
        replaced = packet.replace(data, segment, edits)
    except ValueError:
        assert segment.payload + len(payload) > 65535
        return
    assert replaced[segment.payload :] == payload
    assert packet.locate(replaced) == segment._replace(end=len(replaced))
    for before, after in zip(_sums(data, segment), _sums(replaced, segment), strict=True):
        assert before % 0xFFFF == after % 0xFFFF


_KNOWING = nfqueue.Decoder()


def message(data: bytes) -> None:
    """Whatever can be read gets a verdict; and a decoder that knows layouts reads what one that knows none reads.

    It may read more: the length of an attribute that nobody needs, it does not look at.
    """
    known, fresh = _read(_KNOWING, data), _read(nfqueue.Decoder(), data)
    assert fresh in (None, known)
    if known is None:
        return
    duty = Duty(names=frozenset((known.helper,)), bounds=Bounds(), by_rules=True, label=70)
    for helper in (_FTP, _TFTP):
        outcome = Inspector(helper, duty, _Refusing()).inspect(known)
        assert outcome.error is None or isinstance(outcome.error, DecodeError)
        assert nfqueue.encode_verdict(known, outcome.verdict, outcome.change)


def _read(decoder: nfqueue.Decoder, data: bytes) -> nfqueue.Packet | None:
    try:
        return decoder.decode(memoryview(data))
    except DecodeError:
        return None


class _Refusing:
    """A kernel that grants no request."""

    def request(self, message: bytes) -> int:
        return errno.ENOENT


def _edits(payload: bytes) -> tuple[list[tuple[int, int, bytes]], bytes]:
    """Some edits, always the same for a payload, and what they make of it."""
    random = Random(zlib.crc32(payload))
    places = sorted(random.randint(0, len(payload)) for _ in range(2 * random.randint(0, 3)))
    edits = [
        (first, end, random.randbytes(random.randint(0, 9)))
        for first, end in zip(places[::2], places[1::2], strict=True)
    ]
    for first, end, text in reversed(edits):
        payload = payload[:first] + text + payload[end:]
    return edits, payload


def _sums(data: bytes, segment: packet.Segment) -> list[int]:
    sums = [packets.header_sum(data)] if data[0] >> 4 == 4 else []
    has_checksum = segment.l4proto is L4.TCP or data[segment.transport + 6 : segment.transport + 8] != b"\0\0"
    return sums + ([packets.transport_sum(data, segment.l4proto, segment.transport)] if has_checksum else [])


_FTP_EXAMPLES = (
    b"PORT 10,0,0,1,4,5\r\n",
    b"port 10,0,0,1,4,5\r\nLIST\r\nPORT 10,0,0,1,4,6\r\n",
    b"EPRT |1|10.0.0.1|1029|\r\n",
    b"EPRT |2|2001:db8::1|1029|\r\n",
    b"PASV\r\nEPSV\r\n",
    b"EPSV ALL\r\nPORT 10,0,0,1,4,5\r\n",
    b"AUTH TLS\r\n",
    b"220-Hello\r\n227 Entering Passive Mode (192,0,2,7,4,5).\r\n220 Ready\r\n",
    b"227 Entering Passive Mode (192,0,2,7,4,5).\r\n",
    b"227 192,0,2,7,4,5\r\n229 Entering Extended Passive Mode (|||1029|)\r\n",
    b"234 Go ahead\r\n227 Entering Passive Mode (192,0,2,7,4,5).\r\n",
)
_FTP_WORDS = (
    *(b"PORT ", b"EPRT ", b"PASV", b"EPSV", b"AUTH TLS", b"227 ", b"227-", b"229 (", b"220-", b"220 ", b"234 "),
    *(b"10,0,0,1,4,5", b"|1|", b"|2|", b"|||", b"|", b"::1", b"(", b",", b" ", b"a", b"\r\n", b"\n"),
    *(b"0", b"255", b"256", b"65535", b"65536"),
)
_TFTP_EXAMPLES = (b"\0\1file\0octet\0", b"\0\2file\0netascii\0blksize\0" + b"1428\0", b"\0\4\0\1", b"\0\3\0\1data")
_PACKETS = (
    packets.ipv4(6, packets.tcp(b"PORT 10,0,0,1,4,5\r\n")),
    packets.ipv4(6, packets.tcp(b"227 (10,0,0,1,4,5)\r\n", options=bytes(12)), options=b"\1" * 8),
    packets.ipv4(17, packets.udp(_TFTP_EXAMPLES[0])),
    packets.ipv6(6, packets.tcp(b"EPSV\r\n")),
    packets.ipv6(17, packets.udp(_TFTP_EXAMPLES[1]), extensions=[(0, bytes(6)), (60, bytes(14))]),
    packets.ipv6(6, packets.tcp(b"PASV\r\n"), extensions=[(43, bytes(22)), (44, bytes(6)), (51, bytes(22))]),
)
_NUMBERS = (b"\0", b"\xff", b"\0\0", b"\xff\xff", b"\0\1", b"\6", b"\x11", b"\x2c", b"\x45", b"\x60")

_GOLDEN = Path(__file__).parent / "golden" / "nfqueue"
_MESSAGES = tuple(
    bytes.fromhex("".join(line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines()))
    for path in sorted(_GOLDEN.iterdir())
)

PARSERS = {
    "message": Parser(message, _MESSAGES, _NUMBERS),
    "ftp": Parser(ftp, _FTP_EXAMPLES, _FTP_WORDS),
    "tftp": Parser(tftp, _TFTP_EXAMPLES, _NUMBERS),
    "packet.locate": Parser(locate, _PACKETS, _NUMBERS),
    "packet.replace": Parser(replace, _PACKETS, _NUMBERS),
}


def mutated(parser: Parser, random: Random) -> bytes:
    """An example, or two, with up to eight things done to it."""
    data = bytearray(random.choice(parser.examples))
    if random.random() < 0.2:
        data += random.choice(parser.examples)
    for _ in range(random.choice((0, 1, 1, 2, 2, 4, 8))):
        first = random.randint(0, len(data))
        _change(data, first, parser, random)
    return bytes(data)


def _change(data: bytearray, first: int, parser: Parser, random: Random) -> None:
    end = min(first + random.choice((1, 1, 2, 8)), len(data))
    match random.randrange(6):
        case 0:
            data[first:end] = random.randbytes(end - first)
        case 1:
            data[first:first] = random.choice(parser.words)
        case 2:
            word = random.choice(parser.words)
            data[first : first + len(word)] = word
        case 3:
            del data[first:end]
        case 4:
            data[first:first] = data[first : first + random.randint(0, 30)]
        case _:
            if first < len(data):
                data[first] ^= 1 << random.randrange(8)


def fuzz(name: str, *, count: int | None, seconds: float | None, seed: int) -> bool:
    """Say how many inputs a parser stood, or which one it did not."""
    parser, random, begun, done = PARSERS[name], Random(seed), time.monotonic(), 0
    while (count is None or done < count) and (seconds is None or time.monotonic() - begun < seconds):
        data = mutated(parser, random)
        try:
            parser.law(data)
        except Exception:  # noqa: BLE001 - whatever it raises is what we look for
            traceback.print_exc()
            print(f"{name}: input {done + 1} of seed {seed} breaks the law:\n{data!r}", file=sys.stderr)
            return False
        done += 1
    rate = done / max(time.monotonic() - begun, 0.001)
    print(f"{name}: {done:,} inputs of seed {seed}, {rate:,.0f} per second", flush=True)
    return True


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    options.add_argument("--parser", choices=sorted(PARSERS), help="this one only; default: each in turn")
    options.add_argument("--count", type=int, help="inputs for each parser; default: no limit")
    options.add_argument("--seconds", type=float, help="time for each parser; default: 60 without --count")
    options.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="default: a new one")
    wanted = options.parse_args()
    seconds = 60.0 if wanted.seconds is None and wanted.count is None else wanted.seconds
    names = [wanted.parser] if wanted.parser else list(PARSERS)
    return 0 if all(fuzz(name, count=wanted.count, seconds=seconds, seed=wanted.seed) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
