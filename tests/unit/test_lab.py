"""What the lab reads out of packets and lines, without a network; and that its suite runs every kernel test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab.dialogue import announced
from lab.software import verb
from lab.suite import KERNEL_TESTS, Result, guests, together

IP = bytes([0x45]) + bytes(19)
IP6 = bytes([0x60]) + bytes(39)
TCP = bytes(12) + bytes([0x50]) + bytes(7)
TCP_WITH_OPTIONS = bytes(12) + bytes([0x80]) + bytes(7) + b"\1\1\x08\x0a\0\0\0\0\0\0\0 "


@pytest.mark.parametrize(
    ("payload", "asked"),
    [
        (b"PORT 10,66,1,2,200,1\r\n", "PORT"),
        (b"EPRT |2|fd66:1::2|51201|\r\n", "EPRT"),
        (b"EPSV\r\n", "EPSV"),
        (b"EPSV 2\r\n", "EPSV"),
        (b"PASV\r\n", "PASV"),
        (b"200 PORT command successful. Consider using PASV.\r\n", ""),
        (b" EPSV\r\n", ""),
        (b"", ""),
    ],
)
def test_the_mode_that_a_client_asks_for(payload: bytes, asked: str) -> None:
    for header in (IP + TCP, IP + TCP_WITH_OPTIONS, IP6 + TCP, IP6 + TCP_WITH_OPTIONS):
        assert verb(header + payload) == asked


def test_a_packet_that_is_not_tcp_asks_for_nothing() -> None:
    assert verb(IP + bytes(8)) == ""


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("PORT 10,66,1,2,200,1", ("10.66.1.2", 51201)),
        ("227 Entering Passive Mode (10,66,2,2,200,1).", ("10.66.2.2", 51201)),
        ("EPRT |2|fd66:1::2|51201|", ("fd66:1::2", 51201)),
        ("229 Entering Extended Passive Mode (|||51201|)", ("server", 51201)),
    ],
)
def test_where_the_data_connection_goes(line: str, target: tuple[str, int]) -> None:
    assert announced(line, default="server") == target


def test_a_line_without_an_announcement_is_an_error() -> None:
    with pytest.raises(OSError, match="announces nothing"):
        announced("200 fine", default="server")


def test_the_suite_runs_every_kernel_test() -> None:
    """All of two directories, so nobody elsewhere may need a kernel."""
    assert all(Path(file.removeprefix("--ignore=")).exists() for _, _, files in guests() for file in files)
    needing = [path for path in Path("tests").rglob("*.py") if re.search(r"mark\.kernel", path.read_text())]
    assert {str(path.parent) for path in needing} == set(KERNEL_TESTS)


@pytest.mark.parametrize(
    ("part", "is_good"),
    [
        (Result("6.1-rest", 0, 2.0, 10, 0, 1), True),
        (Result("6.1-rest", 1, 2.0, 10, 1, 0), False),
        (Result("6.1-rest", 124, 2.0), False),
        (Result("6.1-rest", 0, 2.0), False),
        (Result("6.1-rest", 0, 2.0, 3, 0, 3), False),
    ],
)
def test_a_kernel_is_good_if_every_part_is(part: Result, *, is_good: bool) -> None:
    first = Result("6.1-first", 0, 3.0, 100, 0, 0)
    for parts in ((first, part), (part, first)):
        result = together("6.1", parts)
        assert (result.name, result.seconds, result.tests) == ("6.1", 5.0, 100 + part.tests)
        assert (result.failed, result.skipped, result.is_good) == (part.failed, part.skipped, is_good)
