"""Wire format of nfnetlink_cthelper, against bytes that people and kernels have looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator.errors import DecodeError
from orchestrator.kernel import cthelper_codec as codec
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status

GOLDEN = Path(__file__).parent.parent / "golden" / "cthelper"

FTP = Registration(
    key=HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP),
    queue_num=16400,
    status=Status.ENABLED,
    policies=(Policy("ftp", 8, 300), Policy("data", 255, 2)),
    priv_data_len=24,
)
MDNS = HelperKey("mdns", L3Proto.IP6, L4Proto.UDP)

ENCODED = {
    "create": codec.encode_create(FTP, sequence=7),
    "update": codec.encode_update(FTP, sequence=8),
    "status": codec.encode_status(MDNS, Status.DISABLED),
    "get": codec.encode_get(FTP.key),
    "delete": codec.encode_delete(FTP.key, sequence=9),
    "dump": codec.encode_dump(),
}

little_endian = pytest.mark.skipif(sys.byteorder == "big", reason="netlink headers are in host byte order")


def golden(name: str) -> bytes:
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return bytes.fromhex("".join(line.partition("#")[0] for line in lines))


@little_endian
@pytest.mark.parametrize("name", ENCODED)
def test_encodes_as_recorded(name: str) -> None:
    assert ENCODED[name].hex(" ") == golden(name).hex(" ")


@little_endian
def test_decodes_what_a_kernel_sent() -> None:
    assert codec.decode(golden("reply")) == FTP


def test_every_recording_is_tested() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {*ENCODED, "reply"}


@pytest.mark.parametrize("name", ["status", "get", "delete", "dump"])
def test_a_message_without_all_attributes_is_no_helper(name: str) -> None:
    with pytest.raises(DecodeError):
        codec.decode(ENCODED[name])


@pytest.mark.parametrize(
    ("old", "new", "foreign"),
    [
        (b"ftp-us\0", b"f p-us\0", codec.ForeignRegistration("f p-us", 2, 6)),
        (b"ftp-us\0", b"f\xff-\xc3\xa4\0\0", codec.ForeignRegistration("f\\xff-ä", 2, 6)),
        (b"\x06\0\x01\0\0\x02", b"\x06\0\x01\0\0\0", codec.ForeignRegistration("ftp-us", 0, 6)),
        (b"\x06\0\x01\0\0\x02", b"\x06\0\x01\0\0\x63", codec.ForeignRegistration("ftp-us", 99, 6)),
        (b"\x05\0\x02\0\x06", b"\x05\0\x02\0\x84", codec.ForeignRegistration("ftp-us", 2, 132)),
        (b"\0\0\0\xff", b"\0\0\0\0", codec.ForeignRegistration("ftp-us", 2, 6)),
        (b"\0\0\x40\x10", b"\0\x01\0\x09", codec.ForeignRegistration("ftp-us", 2, 6)),
    ],
    ids=["space", "not-utf8", "unspec", "l3-99", "sctp", "expect_max-0", "queue-65545"],
)
@little_endian
def test_what_orch_would_never_register_is_foreign(old: bytes, new: bytes, foreign: codec.ForeignRegistration) -> None:
    reply = golden("reply")
    assert reply.count(old) == 1
    assert codec.decode(reply.replace(old, new)) == foreign


@little_endian
def test_more_policies_than_the_kernel_has_are_refused() -> None:
    reply = golden("reply").replace(bytes.fromhex("080001000000 0002"), bytes.fromhex("0800010000000005"))
    with pytest.raises(DecodeError, match="5 policies"):
        codec.decode(reply)
