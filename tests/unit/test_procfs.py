"""Texts of /proc/net."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DecodeError
from orchestrator.kernel.procfs import parse_expectations, parse_queues
from orchestrator.model import QueueRow

QUEUES = """\
    7  12345     3 2 65531     4     5       42  1
16400 4294963200     0 0     0     0     0        0  1
"""

V4 = "l3proto = 2 proto=6 src=127.0.0.1 dst=127.0.0.1 sport=0 dport=51210 "
V6 = "l3proto = 10 proto=17 src=fe80:0000:0000:0000:0000:0000:0000:0001 dst=ff02::fb sport=0 dport=5353 "


def test_a_queue_row_is_read_by_column() -> None:
    assert parse_queues(QUEUES) == (
        QueueRow(queue_num=7, port_id=12345, waiting=3, queue_dropped=4, user_dropped=5, seen=42, copy_mode=2),
        QueueRow(queue_num=16400, port_id=4294963200, waiting=0, queue_dropped=0, user_dropped=0, seen=0, copy_mode=0),
    )


@pytest.mark.parametrize("row", ["7 1 2 3", "a b c d e f g h i", "7 12345 3 2 65531 4 5 42 1 9"])
def test_another_number_of_columns_is_refused(row: str) -> None:
    with pytest.raises(DecodeError):
        parse_queues(row)


@pytest.mark.parametrize(
    ("line", "helper"),
    [
        (f"300 {V4}ftp", "ftp"),
        (f"299 {V4}ftp-us/ftp", "ftp-us"),
        (f"- {V4}ftp/ftp", "ftp"),
        (f"-3 {V4}ftp/ftp", "ftp"),
        (f"5 {V6}PERMANENT mdns/mdns", "mdns"),
        (f"5 {V6}PERMANENT,INACTIVE,USERSPACE mdns/mdns", "mdns"),
        (f"5 {V6}USERSPACE rpc", "rpc"),
        (f"5 {V4}my helper/two words", "my helper"),
        (f"5 {V4}Q.931/RTP", "Q.931"),
    ],
)
def test_the_helper_is_what_follows_tuple_and_flags(line: str, helper: str) -> None:
    assert parse_expectations(line + "\n") == {helper: 1}


@pytest.mark.parametrize("line", [f"5 {V4}", f"5 {V4}PERMANENT"])
def test_an_expectation_without_a_helper_does_not_count(line: str) -> None:
    assert parse_expectations(line) == {}


def test_expectations_are_counted_by_helper() -> None:
    assert parse_expectations(f"1 {V4}a\n2 {V6}b/x\n3 {V4}a/y\n") == {"a": 2, "b": 1}


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(DecodeError):
        parse_queues(text)
    with contextlib.suppress(DecodeError):
        parse_expectations(text)


@given(st.lists(st.builds(QueueRow, *[st.integers(0, 0xFFFFFFFF)] * 6, copy_mode=st.integers(0, 2))))
def test_queue_rows_as_the_kernel_prints_them_are_read(rows: list[QueueRow]) -> None:
    """The format is that of nfnetlink_queue.c, seq_show."""
    text = "".join(
        f"{row.queue_num:5} {row.port_id:6} {row.waiting:5} {row.copy_mode:1} {65531:5} "
        f"{row.queue_dropped:5} {row.user_dropped:5} {row.seen:8} {1:2}\n"
        for row in rows
    )
    assert parse_queues(text) == tuple(rows)
