"""The exchange with the kernel, against a peer that follows a script."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.kernel import netlink

REQUEST = netlink.dump_request(subsystem=9, command=1)
DONE, ERROR, DATA = 3, 2, 0x900

Script = Callable[..., None]


def message(kind: int, payload: bytes = b"", *, flags: int = 0, sequence: int = 0) -> bytes:
    padding = bytes(-len(payload) % 4)
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload + padding


def refusal(number: int, text: bytes = b"") -> bytes:
    """NLMSG_ERROR with the echoed header, and an extended acknowledgement if there is a text."""
    attribute = struct.pack("=HH", 4 + len(text), 1) + text if text else b""
    return message(ERROR, struct.pack("=i", -number) + bytes(16) + attribute, flags=0x300 if text else 0x100)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Script:
    """`peer(*connections)`: each connection is a list of datagrams; an errno stands for a receive that fails."""

    def follow(*connections: list[bytes | int]) -> None:
        waiting = list(connections)

        class Peer:
            def __init__(self, *_: int) -> None:
                self.script = waiting.pop(0)

            def __enter__(self) -> Peer:
                return self

            def __exit__(self, *_: object) -> None: ...

            def setsockopt(self, *_: int) -> None: ...

            def send(self, data: bytes) -> int:
                return len(data)

            def recv(self, _: int) -> bytes:
                answer = self.script.pop(0)
                if isinstance(answer, int):
                    raise OSError(answer, "")
                return answer

        monkeypatch.setattr(socket, "socket", Peer)

    return follow


def test_an_acknowledgement_is_all(peer: Script) -> None:
    peer([refusal(0)])
    netlink.perform(REQUEST)


def test_a_refusal_has_errno_and_text_of_the_kernel(peer: Script) -> None:
    peer([refusal(errno.EINVAL, b"Attribute failed policy validation\0")])
    with pytest.raises(OSError, match=r"Attribute failed policy validation$") as caught:
        netlink.perform(REQUEST)
    assert caught.value.errno == errno.EINVAL


def test_a_dump_ends_at_done_and_ignores_other_answers(peer: Script) -> None:
    one, two = message(DATA, b"1111"), message(DATA, b"2222")
    peer([one + message(DATA, b"late", sequence=5), two, message(DONE, bytes(4))])
    assert netlink.dump(REQUEST, list) == [one, two]


def test_an_error_at_the_end_of_a_dump_is_raised(peer: Script) -> None:
    peer([message(DATA), message(DONE, struct.pack("=i", -errno.EPERM))])
    with pytest.raises(PermissionError):
        netlink.dump(REQUEST, list)


@pytest.mark.parametrize(
    "spoilt",
    [[message(DATA, b"half", flags=netlink.NLM_F_DUMP_INTR), message(DONE, bytes(4))], [message(DATA), errno.ENOBUFS]],
    ids=["interrupted", "lost"],
)
def test_a_spoilt_dump_is_read_again_from_the_start(peer: Script, spoilt: list[bytes | int]) -> None:
    whole = message(DATA, b"whole...")
    peer(spoilt, [whole, message(DONE, bytes(4))])
    assert netlink.dump(REQUEST, list) == [whole]


def test_a_dump_that_is_always_interrupted_ends(peer: Script) -> None:
    peer(*([message(DONE, bytes(4), flags=netlink.NLM_F_DUMP_INTR)] for _ in range(10)))
    with pytest.raises(InterruptedError):
        netlink.dump(REQUEST, list)


@given(st.binary(max_size=100))
def test_any_datagram_is_split_or_refused(data: bytes) -> None:
    try:
        lengths = [len(part) for *_, part in netlink.split(data)]
    except OSError as error:
        assert error.errno == errno.EBADMSG  # noqa: PT017 (a refusal is one of two right outcomes)
    else:
        assert sum(lengths) <= len(data)
