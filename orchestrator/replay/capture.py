"""Frames out of pcap and pcapng files, and the IP packets in them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import dpkt.pcap
import pcapng
from pcapng import blocks
from pcapng.exceptions import PcapngException

IPV4 = 0x0800
IPV6 = 0x86DD

_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
_VLAN_TAGS = (0x8100, 0x88A8, 0x9100)
_LINK_TYPE_BITS = 0x03FFFFFF
"""The rest of that field of a pcap header says how long the frame check sequence is."""

# Link types (tcpdump.org, LINKTYPE_ registry) -> where the EtherType lies, and how long the header is.
_WITH_ETHER_TYPE = {
    1: (12, 14),  # Ethernet
    113: (14, 16),  # Linux cooked, SLL
    276: (0, 20),  # Linux cooked, SLL2
}
# Link types whose header says no more than the version field of the IP header behind it -> length of the header.
_WITHOUT_ETHER_TYPE = {0: 4, 108: 4, 12: 0, 14: 0, 101: 0, 228: 0, 229: 0}  # loopback, OpenBSD loopback, raw IP
_BY_VERSION = {4: IPV4, 6: IPV6}

_UNREADABLE = (PcapngException, struct.error, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
"""What python-pcapng raises for blocks that make no sense."""


class CaptureError(ValueError):
    """From here on the capture cannot be read; what was read before it counts."""


class NotACaptureError(CaptureError):
    """The file is neither pcap nor pcapng."""

    def __init__(self) -> None:
        super().__init__("it is neither pcap nor pcapng")


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a capture, counted from 1; `time_s` since 1970, None if the file does not tell (simple blocks)."""

    number: int
    time_s: float | None
    link_type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class IpPacket:
    """An IP packet, from its header to whatever padding the frame has, with its EtherType."""

    protocol: int
    data: memoryview

    @property
    def is_cut_short(self) -> bool:
        """True if the capture kept only its beginning, as the snapshot length of tcpdump makes it."""
        if self.protocol == IPV4:
            return len(self.data) < max(20, _u16(self.data, 2))
        return len(self.data) < 40 + _u16(self.data, 4)


def frames(stream: BinaryIO) -> Iterator[Frame]:
    """Every frame of a seekable capture file; raises CaptureError where the file ends too early or makes no sense."""
    file = _File(stream)
    return _pcapng_frames(file) if file.begins_with(_PCAPNG_MAGIC) else _pcap_frames(file)


def ip_packet(frame: Frame) -> IpPacket | None:
    """The IP packet in a frame, behind any VLAN tags; None if it has none or is of a link type that is not known."""
    data = memoryview(frame.data)
    if frame.link_type in _WITHOUT_ETHER_TYPE:
        packet = data[_WITHOUT_ETHER_TYPE[frame.link_type] :]
        protocol = _BY_VERSION.get(packet[0] >> 4, 0) if packet else 0
    else:
        position, header_len = _WITH_ETHER_TYPE.get(frame.link_type, (0, len(data) + 1))
        protocol = _u16(data, position)
        while protocol in _VLAN_TAGS:
            protocol = _u16(data, header_len + 2)
            header_len += 4
        packet = data[header_len:]
    return IpPacket(protocol, packet) if protocol in _BY_VERSION.values() and packet else None


def is_known(link_type: int) -> bool:
    return link_type in _WITH_ETHER_TYPE or link_type in _WITHOUT_ETHER_TYPE


def _u16(data: memoryview, position: int) -> int:
    return int.from_bytes(data[position : position + 2], "big")


class _File:
    """A file that is never asked for more than it has left: lengths in a damaged one reach up to 4 GiB.

    `is_short` says that the last read got less than it asked for; dpkt takes such a frame for a whole one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = stream.seek(0, os.SEEK_END)
        self.is_short = False
        stream.seek(0)

    def begins_with(self, magic: bytes) -> bool:
        start = self._stream.read(len(magic))
        self._stream.seek(0)
        return start == magic

    def read(self, size: int) -> bytes:
        left = self._size - self.tell()
        self.is_short = not 0 <= size <= left
        return self._stream.read(max(0, min(size, left)))

    def tell(self) -> int:
        return self._stream.tell()


def _pcap_frames(file: _File) -> Iterator[Frame]:
    try:
        reader = dpkt.pcap.Reader(file)
    except (ValueError, dpkt.UnpackError) as error:
        raise NotACaptureError from error
    link_type = reader.datalink() & _LINK_TYPE_BITS
    number = 0
    try:
        for number, (time_s, data) in enumerate(reader, 1):
            if file.is_short:
                raise CaptureError(f"it ends within frame {number}")
            yield Frame(number, float(time_s), link_type, data)
    except dpkt.UnpackError as error:
        raise CaptureError(f"after frame {number} it ends within the header of the next") from error


def _pcapng_frames(file: _File) -> Iterator[Frame]:
    number = 0
    whole_until = 0
    try:
        for block in pcapng.FileScanner(file):
            whole_until = file.tell()
            if isinstance(block, blocks.BasePacketBlock):
                time_s = getattr(block, "timestamp", None)
                frame = Frame(number + 1, time_s, block.interface.link_type, bytes(block.packet_data))
                number += 1
                yield frame
    except _UNREADABLE as error:
        if not whole_until:
            raise NotACaptureError from error
        reason = "it ends within the next block" if file.is_short else f"the next block makes no sense: {error}"
        raise CaptureError(f"after frame {number} {reason}") from error
    if file.tell() != whole_until:  # the library takes a file that ends in a block's header for complete
        raise CaptureError(f"after frame {number} it ends within the next block")
