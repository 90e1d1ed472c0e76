"""Writes the captures of these cases, always the same bytes: `python -m tests.golden.replay.make`.

vsftpd-curl.pcap is none of them: that is curl 7.88 and vsftpd 3.0.3 with EPSV, EPRT, PASV, and EPSV over IPv6, as
`tcpdump -i any port 21` saw them on the loopback device of a network namespace.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
TCP, UDP = 6, 17
FIN, SYN, PUSH, ACK = 0x01, 0x02, 0x08, 0x10

Timed = tuple[float, bytes]
"""Seconds since 1970, and a packet or a frame."""


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def checksum(data: bytes) -> int:
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    return ~int(sum(words)) % 0xFFFF


def ip_packet(src: str, dst: str, protocol: int, segment: bytes) -> bytes:
    """`segment` has zeroes where its checksum goes, which is filled in."""
    ends = packed(src) + packed(dst)
    total = checksum(ends + struct.pack("!HH", protocol, len(segment)) + segment)
    at = 16 if protocol == TCP else 6
    segment = segment[:at] + struct.pack("!H", total or 0xFFFF) + segment[at + 2 :]
    if ":" in src:
        return struct.pack("!IHBB", 0x60000000, len(segment), protocol, 64) + ends + segment
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + segment


def datagram(src: str, sport: int, dst: str, dport: int, payload: bytes) -> bytes:
    return ip_packet(src, dst, UDP, struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload)


@dataclass
class Talk:
    """A TCP connection as its packets; the client opens it."""

    client: str
    server: str
    sport: int = 40000
    dport: int = 21
    time_s: float = 1000.0
    first_seq: int = 1000
    packets: list[Timed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seq = {True: self.first_seq, False: 4_294_967_200}  # one of them wraps

    def open(self) -> Talk:
        self.segment(b"", is_client=True, flags=SYN)
        self.segment(b"", is_client=False, flags=SYN | ACK)
        return self.segment(b"", is_client=True, flags=ACK)

    def says(self, line: str) -> Talk:
        return self.segment(line.encode() + b"\r\n", is_client=True)

    def answers(self, line: str) -> Talk:
        return self.segment(line.encode() + b"\r\n", is_client=False)

    def segment(self, payload: bytes, *, is_client: bool, flags: int = PUSH | ACK) -> Talk:
        self.send(self._seq[is_client], payload, is_client=is_client, flags=flags)
        self._seq[is_client] += len(payload) + bool(flags & (SYN | FIN))
        return self

    def again(self, payload: bytes, *, is_client: bool) -> Talk:
        """A retransmission of what was sent last."""
        return self.send(self._seq[is_client] - len(payload), payload, is_client=is_client)

    def send(self, seq: int, payload: bytes, *, is_client: bool, flags: int = PUSH | ACK) -> Talk:
        ports = (self.sport, self.dport) if is_client else (self.dport, self.sport)
        ends = (self.client, self.server) if is_client else (self.server, self.client)
        ack = self._seq[not is_client] if flags & ACK else 0
        header = struct.pack("!HHIIBBHHH", *ports, seq % 2**32, ack % 2**32, 0x50, flags, 65535, 0, 0)
        self.packets.append((self.time_s, ip_packet(*ends, TCP, header + payload)))
        self.time_s += 0.001
        return self


def ether_type(packet: bytes) -> bytes:
    return b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\x00"


def ethernet(packet: bytes, *, vlans: tuple[int, ...] = ()) -> bytes:
    tags = b"".join(struct.pack("!HH", 0x8100, vlan) for vlan in vlans)
    frame = bytes.fromhex("020000000001020000000002") + tags + ether_type(packet) + packet
    return frame.ljust(60, b"\0")


def cooked(packet: bytes) -> bytes:
    return struct.pack("!HHH8s", 0, 1, 6, bytes(8)) + ether_type(packet) + packet


def cooked2(packet: bytes) -> bytes:
    return ether_type(packet) + struct.pack("!HIHBB8s", 0, 2, 1, 0, 6, bytes(8)) + packet


def loopback(packet: bytes) -> bytes:
    return struct.pack("<I", 30 if packet[0] >> 4 == 6 else 2) + packet


def pcap(frames: Iterable[Timed], *, link_type: int = 1, order: str = "<", is_nano: bool = False) -> bytes:
    magic, unit = (0xA1B23C4D, 1e9) if is_nano else (0xA1B2C3D4, 1e6)
    parts = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link_type)]
    for time_s, frame in frames:
        parts += (struct.pack(order + "IIII", int(time_s), round(time_s % 1 * unit), len(frame), len(frame)), frame)
    return b"".join(parts)


def pcapng(frames: Iterable[tuple[int, Timed]], *, link_types: tuple[int, ...], order: str = "<") -> bytes:
    """`frames` come with the number of their interface, `link_types` are those of the interfaces; nanoseconds."""
    parts = [block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))]
    for link_type in link_types:
        resolution = struct.pack(order + "HHB3xHH", 9, 1, 9, 0, 0)
        parts.append(block(order, 1, struct.pack(order + "HHI", link_type, 0, 0) + resolution))
    for interface, (time_s, frame) in frames:
        units = int(time_s) * 10**9 + round(time_s % 1 * 1e9)
        header = struct.pack(order + "IIIII", interface, units >> 32, units & 0xFFFFFFFF, len(frame), len(frame))
        parts.append(block(order, 6, header + frame))
    return b"".join(parts)


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def ftp() -> Talk:
    talk = Talk("10.0.0.1", "10.0.0.2").open()
    talk.answers("220 ready").says("USER anonymous").answers("230 welcome")
    talk.says("PORT 10,0,0,1,195,81").answers("200 PORT successful").says("LIST")
    talk.says("PASV").answers("227 Entering Passive Mode (10,0,0,2,195,82).").says("RETR file")
    talk.says("EPSV").answers("229 Entering Extended Passive Mode (|||50003|)").says("RETR file")
    return talk


def ftp_ipv6() -> Talk:
    talk = Talk("2001:db8:1::1", "2001:db8:2::2").open()
    talk.answers("220 ready").says("EPRT |2|2001:db8:1::1|50001|").answers("200 ok")
    return talk.says("EPSV").answers("229 Entering Extended Passive Mode (|||50002|)")


def ftp_hostile() -> Talk:
    """What the guard refuses, and what the helper does."""
    talk = Talk("10.0.0.1", "10.0.0.2").open()
    talk.says("PORT 10,0,0,99,195,81").says("PORT 10,0,0,1,0,22").says("PORT 10,0,0,1,300,1").says("PASV")
    return talk.answers("230-Welcome\r\n227 (10,0,0,2,195,82)\r\n230 \x1b[31mred").answers("227 (10,0,0,77,195,82)")


def ftp_segments() -> Talk:
    """A command in two segments, a retransmission, a gap, and two commands at once."""
    talk = Talk("10.0.0.1", "10.0.0.2").open()
    talk.segment(b"PORT 10,0,0", is_client=True).segment(b",1,195,81\r\n", is_client=True)
    talk.again(b",1,195,81\r\n", is_client=True)
    talk.segment(b"PORT 10,0,0,1,195,82\r\nPORT 10,0,0,1,195,83\r\n", is_client=True)
    lost = Talk("10.0.0.1", "10.0.0.2", sport=40001, time_s=talk.time_s).open()
    lost.says("USER x").says("PASS y")
    del lost.packets[-1]
    lost.segment(b"PORT 10,0,0,1,195,84\r\nPORT 10,0,0,1,195,85\r\n", is_client=True)
    talk.packets += lost.packets
    return talk


def ftp_tls() -> Talk:
    talk = Talk("10.0.0.1", "10.0.0.2").open().says("AUTH TLS").answers("234 go on")
    return talk.segment(b"\x16\x03\x01\nPORT 10,0,0,1,195,81\r\n", is_client=True)


def tftp() -> Iterator[Timed]:
    client, server = "192.0.2.1", "192.0.2.2"
    yield 1.5, datagram(client, 1024, server, 69, b"\0\1boot.img\0octet\0blksize\0001428\0")
    yield 1.500001001, datagram(server, 32768, client, 1024, b"\0\6blksize\0001428\0")
    yield 1.6, datagram(client, 1025, server, 69, b"\0\2file\0")
    yield 1.7, datagram(client, 1026, server, 69, b"hello")


def steam() -> Iterator[Timed]:
    query = bytes.fromhex("ffffffff214c5fa0") + b"\0\0\0\0"
    yield 1.0, datagram("192.168.1.5", 50000, "255.255.255.255", 27036, query)
    yield 1.1, datagram("192.168.1.9", 27036, "192.168.1.5", 50000, query)
    yield 1.2, datagram("192.168.1.5", 50001, "255.255.255.255", 27036, b"something else")


def captures() -> dict[str, bytes]:
    """Every capture by its name; between them they have all formats that are read."""
    hostile, segments = ftp_hostile().packets, ftp_segments().packets
    whole = pcap([(time_s, ethernet(packet)) for time_s, packet in ftp().packets])
    short = [(time_s, ethernet(packet)[:60]) for time_s, packet in ftp().packets]
    return {
        "ftp.pcap": whole,
        "ftp-cut.pcap": whole[:900],
        "ftp-snaplen.pcap": pcap(short),
        "ftp-ipv6.pcapng": pcapng(
            [(number % 2, (time_s, (ethernet, cooked2)[number % 2](packet)))
             for number, (time_s, packet) in enumerate(ftp_ipv6().packets)],
            link_types=(1, 276),
        ),
        "ftp-hostile.pcap": pcap([(time_s, cooked(packet)) for time_s, packet in hostile], link_type=113),
        "ftp-segments.pcap": pcap(segments, link_type=101),
        "ftp-tls.pcap": pcap([(time_s, loopback(packet)) for time_s, packet in ftp_tls().packets], link_type=0),
        "tftp.pcap": pcap(
            [(time_s, ethernet(packet, vlans=(7, 8))) for time_s, packet in tftp()], order=">", is_nano=True
        ),
        "steam.pcapng": pcapng([(0, (t, ethernet(p))) for t, p in steam()], link_types=(1,), order=">"),
        "wireless.pcap": pcap([(1.0, bytes(40))], link_type=105),
    }  # fmt: skip


if __name__ == "__main__":
    for name, content in captures().items():
        (HERE / "captures" / name).write_bytes(content)
