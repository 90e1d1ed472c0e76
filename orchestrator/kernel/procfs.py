"""Texts of /proc/net, parsed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from orchestrator.errors import DecodeError
from orchestrator.model import QueueRow

# l3proto and proto are numbers, the tuple is `key=value` words, flags are upper case, and the helper is what remains.
_EXPECTATION = re.compile(
    r"\s*(?:-?\d+|-) l3proto = \d+ proto=\d+ (?:[a-z]+=\S+ )*"
    r"(?:(?:PERMANENT|INACTIVE|USERSPACE)(?:,(?:INACTIVE|USERSPACE))*(?: |$))?(?P<helper>.*)",
    re.ASCII,
)


def parse_queues(text: str) -> tuple[QueueRow, ...]:
    """Rows of /proc/net/netfilter/nfnetlink_queue, in the order of the file; raises DecodeError.

    Columns: queue number, port id, waiting, copy mode, copy range, dropped for a full queue, dropped for a full socket
    buffer, last packet id, a constant 1. Source: nfnetlink_queue.c, seq_show.
    """
    return tuple(_queue(line) for line in _lines(text))


def parse_expectations(text: str) -> dict[str, int]:
    """Expectations by helper name out of /proc/net/nf_conntrack_expect; raises DecodeError.

    A line is `ttl l3proto = N proto=N tuple [flags] helper[/policy]`; where the master's helper is gone the line ends
    before it and does not count. Source: nf_conntrack_expect.c, exp_seq_show.
    """
    names = (_expectation_helper(line) for line in _lines(text))
    return dict(Counter(name for name in names if name))


def read_text(path: str) -> str:
    """What a file says, without blanks around it; empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]  # a helper's name may hold what splitlines() takes for an end


def _queue(line: str) -> QueueRow:
    columns = line.split()
    if len(columns) != 9 or not all(column.isascii() and column.isdigit() for column in columns):
        raise DecodeError(f"not a row of nfnetlink_queue: {line!r}")
    queue_num, port_id, waiting, copy_mode, _, queue_dropped, user_dropped, seen, _ = map(int, columns)
    return QueueRow(queue_num, port_id, waiting, queue_dropped, user_dropped, seen, copy_mode)


def _expectation_helper(line: str) -> str:
    match = _EXPECTATION.fullmatch(line)
    if match is None:
        raise DecodeError(f"not a row of nf_conntrack_expect: {line!r}")
    return match["helper"].partition("/")[0].strip()
