"""The wire format of NFQUEUE and ctnetlink, against messages of kernels."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from pathlib import Path

import pytest

from orchestrator.engine import ctnetlink, netlink, nfqueue, tuples
from orchestrator.engine.api import L4, Direction, Flow, Tuple
from orchestrator.engine.ctnetlink import SequenceAdjustment
from orchestrator.engine.expectation import PERMANENT, Expectation, Nat, encode_expectation
from orchestrator.engine.nfqueue import Change, Decoder, Packet

GOLDEN = Path(__file__).parent.parent / "golden" / "nfqueue"
NO_ADJUSTMENT = SequenceAdjustment(0, 0, 0)
LABEL = 9

pytestmark = pytest.mark.skipif(sys.byteorder == "big", reason="the messages were recorded on a little-endian host")


def golden(name: str) -> bytes:
    lines = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return bytes.fromhex("".join(line.partition("#")[0] for line in lines))


def decode(name: str) -> Packet:
    return Decoder().decode(memoryview(golden(name)))


def address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def tuple_of(src: str, sport: int, dst: str, dport: int) -> Tuple:
    return Tuple(address(src), address(dst), sport, dport)


def tree(data: bytes) -> dict[int, bytes]:
    """The attributes of a message that we encoded, after checking its length."""
    assert struct.unpack_from("=I", data)[0] == len(data)
    return netlink.attributes(data[netlink.HEADER_LEN :])


# -- packets -----------------------------------------------------------------------------------------------------------

FLOWS = {
    "ipv4-tcp-original": Flow(
        (tuple_of("10.66.1.2", 58974, "10.66.2.2", 21), tuple_of("10.66.2.2", 21, "10.66.2.1", 58974)),
        L4.TCP,
        is_nated=True,
    ),
    "ipv6-tcp-original": Flow(
        (tuple_of("fd66:1::2", 46844, "fd66:2::2", 21), tuple_of("fd66:2::2", 21, "fd66:1::2", 46844)), L4.TCP
    ),
    "ipv4-udp-first": Flow(
        (tuple_of("10.66.1.2", 55557, "10.66.2.2", 69), tuple_of("10.66.2.2", 69, "10.66.2.1", 55557)),
        L4.UDP,
        is_nated=True,
    ),
    "ipv6-udp-first": Flow(
        (tuple_of("fd66:1::2", 59654, "fd66:2::2", 69), tuple_of("fd66:2::2", 69, "fd66:1::2", 59654)), L4.UDP
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_connection_of_a_packet(name: str) -> None:
    assert decode(name).flow() == FLOWS[name]


@pytest.mark.parametrize(
    ("name", "info", "end"),
    [
        ("ipv4-tcp-original", 3, b"PORT 10,66,1,2,200,10\r\n"),
        ("ipv4-tcp-reply", 2, b"200 OK\r\n"),
        ("ipv6-tcp-original", 3, b"EPRT |2|fd66:1::2|51210|\r\n"),
        ("ipv6-tcp-reply", 4, b"200 OK\r\n"),
    ],
)
def test_a_packet_with_private_data(name: str, info: int, end: bytes) -> None:
    packet = decode(name)
    assert (packet.helper, packet.info) == (b"ftp-blue", bytes([info]) * 32)
    assert packet.direction is (Direction.REPLY if "reply" in name else Direction.ORIGINAL)
    assert bytes(packet.payload).endswith(end)
    assert packet.payload[0] >> 4 == (4 if packet.protocol == 0x0800 else 6)
    assert (packet.queue_num, packet.hook, packet.zone()) == (7, 4, 0)
    assert packet.status & 0x8  # confirmed


def test_the_interface_by_which_a_packet_leaves_or_came() -> None:
    message = golden("ipv4-tcp-original")
    packet = decode("ipv4-tcp-original")
    assert (packet.device, packet.is_looped) == (3, False)
    outgoing = bytes.fromhex("0800060000000003")
    looped = Decoder().decode(memoryview(message.replace(outgoing, bytes.fromhex("0800060000000001"))))
    assert (looped.device, looped.is_looped) == (1, True)
    assert Decoder().decode(memoryview(message.replace(outgoing, b""))).device == 2


def test_the_first_packet_of_a_connection_is_not_confirmed() -> None:
    packet = decode("ipv4-udp-first")
    assert not packet.status & 0x8
    assert (packet.helper, packet.info, packet.direction) == (b"tftp", b"", Direction.ORIGINAL)


def test_the_zone_of_a_connection() -> None:
    assert decode("ipv4-udp-zone").zone() == 5


def test_sequence_adjustment_after_a_command_that_nat_made_longer() -> None:
    packet = decode("ipv4-tcp-adjusted")
    adjustment = packet.sequence_adjustment(Direction.ORIGINAL)
    assert (adjustment.before, adjustment.after) == (0, 2)
    assert packet.sequence_adjustment(Direction.REPLY) == NO_ADJUSTMENT
    assert decode("ipv4-tcp-original").sequence_adjustment(Direction.ORIGINAL) == NO_ADJUSTMENT


def test_a_remembered_layout_says_what_the_walk_through_attributes_says() -> None:
    decoder = Decoder()
    names = [path.stem for path in GOLDEN.iterdir()]
    for name in names * 3:
        assert decoder.decode(memoryview(golden(name))) == decode(name)


def test_a_packet_without_connection_has_no_flow() -> None:
    message = golden("ipv4-udp-first")
    at = message.index(bytes.fromhex("0b80"), netlink.HEADER_LEN) - 2
    end = at + struct.unpack_from("=H", message, at)[0]
    packet = Decoder().decode(memoryview(message[:at] + message[end:]))
    assert (len(packet.ct), packet.ct_id, packet.status, packet.helper, packet.info) == (0, 0, 0, b"", b"")
    assert packet.payload == decode("ipv4-udp-first").payload
    with pytest.raises(netlink.DecodeError, match="no connection"):
        packet.flow()


def test_the_layouts_that_a_decoder_remembers_are_bounded() -> None:
    decoder = Decoder()
    message = golden("ipv4-tcp-original")
    for number in range(100):
        name = f"ftp-{number:04}"
        packet = decoder.decode(memoryview(message.replace(b"ftp-blue", name.encode())))
        assert packet.helper == name.encode()
        assert len(decoder._layouts) <= 16


def test_what_cannot_be_decoded_can_still_be_answered() -> None:
    packet = decode("ipv4-tcp-original")
    message = memoryview(golden("ipv4-tcp-original"))
    assert nfqueue.identify(message) == (packet.packet_id, packet.queue_num)
    assert nfqueue.identify(message[:32]) == (packet.packet_id, packet.queue_num)
    assert nfqueue.identify(message[:27]) is None
    assert nfqueue.identify(memoryview(netlink.message(2, bytes(40), flags=0))) is None


@pytest.mark.parametrize("kind", [0x0301, 0x0100, 2])
def test_only_a_packet_is_decoded(kind: int) -> None:
    message = bytearray(golden("ipv4-tcp-original"))
    decoder = Decoder()
    decoder.decode(memoryview(message))
    struct.pack_into("=H", message, 4, kind)
    with pytest.raises(netlink.DecodeError):
        decoder.decode(memoryview(message))


# -- verdicts ----------------------------------------------------------------------------------------------------------

ORIGINAL = tuple_of("10.66.2.2", 0, "10.66.1.2", 51210)
EXPECTATION = Expectation(ORIGINAL, b"\xff" * 4, 0, L4.TCP, policy=1, flags=0)


def test_a_plain_verdict() -> None:
    packet = decode("ipv4-tcp-original")._replace(packet_id=0x01020304, queue_num=0x4010)
    verdict = "20000000 0103 0100 00000000 00000000 0000 4010  0c000200 00000005 01020304"
    assert nfqueue.encode_verdict(packet, nfqueue.STOP).hex() == verdict.replace(" ", "")
    assert nfqueue.encode_plain_verdict(0x01020304, 0x4010, nfqueue.STOP).hex() == verdict.replace(" ", "")


@pytest.mark.parametrize("length", [0, 1, 20, 31, 32])
def test_a_verdict_with_private_data_names_the_helper(length: int) -> None:
    info = bytes(range(1, length + 1))
    attributes = tree(nfqueue.encode_verdict(decode("ipv4-tcp-reply"), nfqueue.ACCEPT, Change(info=info)))
    help_attributes = netlink.attributes(netlink.attributes(attributes[11])[5])
    assert set(attributes) == {2, 11}
    assert help_attributes == {1: b"ftp-blue\0", 2: info}


def test_private_data_that_the_kernel_has_no_room_for_is_refused() -> None:
    with pytest.raises(ValueError, match="33 bytes"):
        nfqueue.encode_verdict(decode("ipv4-tcp-reply"), nfqueue.ACCEPT, Change(info=bytes(33)))


def test_an_expectation_goes_with_a_connection_that_need_not_change() -> None:
    attributes = tree(nfqueue.encode_verdict(decode("ipv4-tcp-original"), 1, Change(expectation=EXPECTATION)))
    assert attributes[11] == b""
    assert attributes[15] == encode_expectation(EXPECTATION)


def test_a_payload_is_adjusted_by_the_kernel_unless_it_is_bare() -> None:
    packet = decode("ipv4-tcp-original")
    assert tree(nfqueue.encode_verdict(packet, 1, Change(payload=b"12345"))).keys() == {2, 10, 11}
    assert tree(nfqueue.encode_verdict(packet, 1, Change(payload=b"12345", is_bare=True))).keys() == {2, 10}
    unknown = packet._replace(ct=memoryview(b""))
    assert tree(nfqueue.encode_verdict(unknown, 1, Change(payload=b"12345"))) == {
        2: struct.pack(">II", 1, packet.packet_id),
        10: b"12345",
    }


def test_a_payload_beyond_the_length_of_an_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match="65532 bytes"):
        nfqueue.encode_verdict(decode("ipv4-tcp-original"), 1, Change(payload=bytes(65532)))


def test_a_cleared_label_leaves_all_others() -> None:
    """The kernel computes old & ~mask ^ labels; its labels of the recorded connection are the bit itself."""
    packet = decode("ipv4-tcp-original")
    attributes = netlink.attributes(tree(nfqueue.encode_verdict(packet, 1, Change(clear_label=LABEL)))[11])
    recorded = netlink.attributes(packet.ct)[ctnetlink.CTA_LABELS]
    assert attributes == {ctnetlink.CTA_LABELS: bytes(16), ctnetlink.CTA_LABELS_MASK: recorded}
    assert recorded == bytes((0, 2)) + bytes(14)
    with pytest.raises(ValueError, match="128"):
        ctnetlink.encode_label_cleared(128)


# -- expectations ------------------------------------------------------------------------------------------------------


def test_an_expectation_is_complete() -> None:
    attributes = netlink.attributes(encode_expectation(EXPECTATION))
    assert tuples.decode(attributes[2]) == (ORIGINAL, L4.TCP)
    assert tuples.decode(attributes[3]) == (Tuple(b"\xff" * 4, b"\xff" * 4, 0, 0xFFFF), L4.TCP)
    assert (attributes[9], attributes[8]) == (bytes((0, 0, 0, 1)), bytes(4))
    assert attributes.keys() == {2, 3, 8, 9}


def test_an_expectation_with_everything() -> None:
    nat = Nat(Direction.REPLY, bytes(4), 51210)
    expectation = Expectation(
        ORIGINAL, bytes(4), 0xFFFF, L4.UDP, policy=0, flags=PERMANENT, helper="tftp-blue", nat=nat
    )
    attributes = netlink.attributes(encode_expectation(expectation))
    nat_attributes = netlink.attributes(attributes[10])
    assert attributes[6] == b"tftp-blue\0"
    assert attributes[8] == bytes((0, 0, 0, 1))
    assert attributes[11] == b"nat-follow-master\0"
    assert nat_attributes[1] == bytes((0, 0, 0, 1))
    assert tuples.decode(nat_attributes[2]) == (Tuple(bytes(4), bytes(4), 51210, 0), L4.UDP)


SIX = tuple_of("fd66:1::2", 0, "fd66:2::2", 1024)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Expectation(SIX, b"\xff" * 4, 0, L4.TCP, 0, 0),
        lambda: Expectation(Tuple(SIX.src, ORIGINAL.dst, 0, 1), b"\xff" * 16, 0, L4.TCP, 0, 0),
        lambda: Expectation(Tuple(b"", b"", 0, 1), b"", 0, L4.TCP, 0, 0),
        lambda: Expectation(Tuple(bytes(5), bytes(5), 0, 1), bytes(5), 0, L4.TCP, 0, 0),
        lambda: Expectation(Tuple(bytes(4), bytes(4), 65536, 1), bytes(4), 0, L4.TCP, 0, 0),
        lambda: Expectation(Tuple(bytes(4), bytes(4), 0, -1), bytes(4), 0, L4.TCP, 0, 0),
        lambda: Expectation(ORIGINAL, bytes(4), 65536, L4.TCP, 0, 0),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, 4, 0),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, -1, 0),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, 0, 2),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, 0, 0, "sixteen-letters-"),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, 0, 0, "a\0b"),
        lambda: Expectation(ORIGINAL, bytes(4), 0, L4.TCP, 0, 0, nat=Nat(Direction.REPLY, bytes(16), 1)),
        lambda: Nat(Direction.REPLY, bytes(4), 65536),
        lambda: Nat(Direction.REPLY, b"", 1),
    ],
)
def test_what_the_kernel_would_refuse_or_misread_is_no_expectation(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=r"port|address|class|flags|name"):
        make()


# -- requests ----------------------------------------------------------------------------------------------------------


def test_an_expectation_for_ctnetlink_is_exclusive() -> None:
    master = FLOWS["ipv4-tcp-original"].tuples[0]
    message = ctnetlink.encode_expect_new(master, L4.TCP, 5, EXPECTATION)
    attributes = tree(message)
    assert struct.unpack_from("=HH", message, 4) == (0x0200, 0x0605)  # EXP NEW: REQUEST, ACK, EXCL, CREATE
    assert message[16] == socket.AF_INET
    assert tuples.decode(attributes[1]) == (master, L4.TCP)
    assert attributes[7] == bytes((0, 5))
    rest = {kind: data for kind, data in attributes.items() if kind not in (1, 7)}
    assert rest == netlink.attributes(encode_expectation(EXPECTATION))


def test_a_connection_is_changed_where_it_is_said_to_be() -> None:
    original = FLOWS["ipv6-tcp-original"].tuples[0]
    adjustment = SequenceAdjustment(0xFFFFFFF0, -3, 4)
    message = ctnetlink.encode_conntrack_update(
        original,
        L4.TCP,
        0,
        helper=b"ftp-blue",
        info=b"12345",
        sequence_adjustments={Direction.REPLY: adjustment},
        clear_label=LABEL,
    )
    attributes = tree(message)
    assert struct.unpack_from("=HH", message, 4) == (0x0100, 0x0005)  # CT NEW without CREATE
    assert message[16] == socket.AF_INET6
    assert tuples.decode(attributes[1]) == (original, L4.TCP)
    assert netlink.attributes(attributes[5]) == {1: b"ftp-blue\0", 2: b"12345"}
    assert ctnetlink.decode_sequence_adjustment(attributes[16]) == adjustment
    assert attributes.keys() == {1, 5, 16, 22, 23}


def test_nothing_is_said_about_what_stays_as_it_is() -> None:
    message = ctnetlink.encode_conntrack_update(ORIGINAL, L4.TCP, 0, helper=b"ftp-blue")
    assert tree(message).keys() == {1}


def test_the_kernel_answers_a_request_at_once() -> None:
    """A type that no subsystem has: EINVAL; without CAP_NET_ADMIN the answer is EPERM."""
    with netlink.open_control_socket() as channel:
        client = ctnetlink.Client(channel)
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
        requests = [netlink.message(0xFF << 8, b"", flags=flags) for _ in range(3)]
        assert {client.request(request) for request in requests} <= {errno.EINVAL, errno.EPERM}
        assert client.request(netlink.message(netlink.NLMSG_NOOP, b"", flags=flags)) in (0, errno.EPERM)


def test_an_answer_that_was_lost_is_an_error() -> None:
    with netlink.open_control_socket() as channel:
        silent = netlink.message(netlink.NLMSG_NOOP, b"", flags=netlink.NLM_F_REQUEST)
        assert ctnetlink.Client(channel).request(silent) in (errno.ENOBUFS, errno.EPERM)


def test_a_queue_is_configured_in_one_message() -> None:
    message = nfqueue.encode_config(0x4010, is_fail_open=True, max_len=128, sequence=3)
    attributes = tree(message)
    assert message[18:20] == bytes((0x40, 0x10))
    assert struct.unpack_from("=I", message, 8) == (3,)
    assert attributes == {
        1: bytes((1, 0, 0, 0)),
        2: bytes((0, 0, 0, 0, 2)),
        3: bytes((0, 0, 0, 128)),
        4: bytes((0, 0, 0, 3)),
        5: bytes((0, 0, 0, 3)),
    }
    closed = tree(nfqueue.encode_config(7, is_fail_open=False, max_len=128))
    assert (closed[4], closed[5]) == (bytes((0, 0, 0, 3)), bytes((0, 0, 0, 2)))
