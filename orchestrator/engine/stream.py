"""Where in its two byte streams a TCP connection is: 17 bytes of the helper's private data, kept in the kernel.

A helper may believe only bytes that it sees once, in order, and from the start of a message on: a retransmission would
open a port twice, and a command in the middle of somebody's line is not a command.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from orchestrator.engine.api import Direction

_LAYOUT = Struct("!IIIHBBB")

STREAM_STATE_LEN = _LAYOUT.size
"""Bytes that the engine takes of the private data of a TCP connection; the helper has the rest."""

PART_LEN = STREAM_STATE_LEN - 8
"""Bytes of it that follow the two sequence numbers."""

_SEEN = (0x01, 0x02)
_PARTIAL = (0x04, 0x08)
_REWRITTEN = (0x10, 0x20)
_FINISHED = 0x40

_FLAGS_AT = 8  # of the rest
_MODULUS = 1 << 32
_HALF = 1 << 31


def distance(seq: int, reference: int) -> int:
    """How far `seq` lies after `reference`, negative if before it; sequence numbers wrap at 2^32."""
    return (seq - reference + _HALF) % _MODULUS - _HALF


class Stream:
    """The state of both directions.

    `next_seq` is the sequence number that comes next. A direction is `partial` if what came last did not end with the
    delimiter. The last text that was rewritten is remembered by where it began and by both lengths, in bytes, with the
    port that was chosen: its retransmission must get identical bytes.
    """

    __slots__ = ("flags", "new_len", "next_seq", "old_len", "port", "text_seq")

    def __init__(self, state: bytes) -> None:
        """From the first bytes of the private data; all zero is a connection of which nothing was seen."""
        original, reply, self.text_seq, self.port, self.old_len, self.new_len, self.flags = _LAYOUT.unpack_from(state)
        self.next_seq = [original, reply]

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self.next_seq, self.text_seq, self.port, self.old_len, self.new_len, self.flags)

    @property
    def is_finished(self) -> bool:
        return bool(self.flags & _FINISHED)

    def finish(self) -> None:
        self.flags |= _FINISHED

    def offset(self, direction: Direction, seq: int) -> int:
        """How far a segment lies after what came last: 0 in order, negative a retransmission, positive a gap.

        The first segment of a direction is in order.
        """
        return distance(seq, self.next_seq[direction]) if self.flags & _SEEN[direction] else 0

    def is_partial(self, direction: Direction) -> bool:
        return bool(self.flags & _PARTIAL[direction])

    def advance(self, direction: Direction, seq: int, *, is_partial: bool) -> None:
        """Everything before `seq` was seen."""
        self.next_seq[direction] = seq % _MODULUS
        self.flags = self.flags & ~_PARTIAL[direction] | _SEEN[direction] | (_PARTIAL[direction] if is_partial else 0)

    def rewritten(self, direction: Direction) -> bool:
        """True if the remembered text was sent in this direction."""
        return bool(self.flags & _REWRITTEN[direction])

    def forget(self) -> None:
        """No text was rewritten after all."""
        self.flags &= ~(_REWRITTEN[0] | _REWRITTEN[1])

    def offset_of_text(self, seq: int) -> int:
        """Where the remembered text begins in a payload that begins at `seq`, in bytes; negative if before it."""
        return distance(self.text_seq, seq)

    def remember(self, direction: Direction, *, seq: int, port: int, old_len: int, new_len: int) -> None:
        """The text at `seq` was rewritten; the one before it is forgotten."""
        self.text_seq, self.port, self.old_len, self.new_len = seq % _MODULUS, port, old_len, new_len
        self.flags = self.flags & ~(_REWRITTEN[0] | _REWRITTEN[1]) | _REWRITTEN[direction]


TOO_LONG = b""
"""Instead of the beginning of a message: nobody reads it, and it ends at the next delimiter."""


def parts(private_len: int) -> Struct:
    """The private data of a connection with `private_len` bytes of the helper's, for those who only follow it.

    Next sequence numbers of both directions, and the rest: `PART_LEN` bytes of ours, and the helper's.
    """
    return Struct(f"!II{PART_LEN + private_len}s")


def is_followed(rest: bytes, direction: Direction) -> bool:
    """True if the next segment of a direction, when it comes in order, begins with a new message."""
    flags = rest[_FLAGS_AT] & (_SEEN[direction] | _PARTIAL[direction] | _FINISHED)
    return flags == _SEEN[direction]


class Partials:
    """The beginnings of messages that were cut by the end of a segment: only a process has room for them.

    They are lost with it: what follows is then unknown up to the next delimiter.
    """

    def __init__(self, *, connections: int = 1024, bytes_each: int = 512) -> None:
        self._connections = connections
        self._bytes_each = bytes_each
        self._kept: dict[tuple[int, Direction], tuple[int, bytes]] = {}

    def keep(self, ct_id: int, direction: Direction, *, seq: int, data: bytes) -> None:
        """`data` ends at sequence number `seq`. Of a message that is too long only the fact is kept."""
        self._kept.pop((ct_id, direction), None)
        if len(self._kept) >= self._connections:
            del self._kept[next(iter(self._kept))]
        self._kept[ct_id, direction] = (seq % _MODULUS, data if len(data) <= self._bytes_each else TOO_LONG)

    def take(self, ct_id: int, direction: Direction, *, seq: int) -> bytes | None:
        """The bytes that end at `seq`; TOO_LONG if they are to be skipped, None if nothing is known of them."""
        found = self._kept.pop((ct_id, direction), None)
        return found[1] if found is not None and found[0] == seq else None

    def memory(self) -> list[tuple[int, int, int, str]]:
        """Everything, for those of another process; JSON can hold it."""
        return [(*key, seq, data.hex()) for key, (seq, data) in self._kept.items()]

    def remember(self, memory: Iterable[tuple[int, int, int, str]]) -> None:
        """Take over what another process kept. Raises TypeError, ValueError for what is none."""
        for ct_id, direction, seq, data in memory:
            self.keep(int(ct_id), Direction(direction), seq=int(seq), data=bytes.fromhex(data))
