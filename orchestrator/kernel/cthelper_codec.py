"""nfnetlink_cthelper messages as bytes, both ways. Source: nfnetlink_cthelper.c and its uapi header."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from orchestrator.errors import DecodeError
from orchestrator.kernel.netlink import HEADER_BYTES, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST
from orchestrator.kernel.pyroute import NFNL_SUBSYS_CTHELPER, NLA_F_NESTED, NetlinkDecodeError, nfgen_msg, nla
from orchestrator.model import POLICIES_MAX, HelperKey, L3Proto, L4Proto, Policy, Registration, Status

NFNL_MSG_CTHELPER_NEW = 0
NFNL_MSG_CTHELPER_GET = 1
NFNL_MSG_CTHELPER_DEL = 2
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

_CHANGE = NLM_F_REQUEST | NLM_F_ACK
_L3 = {number.number: number for number in L3Proto}
_L4 = {number.number: number for number in L4Proto}
_STATUS = {0: Status.DISABLED, 1: Status.ENABLED}
_STATUS_NUMBER = {status: number for number, status in _STATUS.items()}

T = TypeVar("T")


class cthelper_msg(nfgen_msg):  # type: ignore[misc]  # noqa: N801 (pyroute2 names messages as the kernel does)
    """One helper. Integers are big-endian, NFCTH_TUPLE_L4PROTONUM is a byte, strings end in NUL."""

    nla_map = (
        ("NFCTH_UNSPEC", "none"),
        ("NFCTH_NAME", "asciiz"),
        ("NFCTH_TUPLE", "tuple"),
        ("NFCTH_QUEUE_NUM", "be32"),
        ("NFCTH_POLICY", "policies"),
        ("NFCTH_PRIV_DATA_LEN", "be32"),
        ("NFCTH_STATUS", "be32"),
    )

    class tuple(nla):  # type: ignore[misc]  # noqa: N801
        nla_flags = NLA_F_NESTED
        nla_map = (
            ("NFCTH_TUPLE_UNSPEC", "none"),
            ("NFCTH_TUPLE_L3PROTONUM", "be16"),
            ("NFCTH_TUPLE_L4PROTONUM", "uint8"),
        )

    class policies(nla):  # type: ignore[misc]  # noqa: N801
        nla_flags = NLA_F_NESTED
        nla_map = (
            ("NFCTH_POLICY_SET_UNSPEC", "none"),
            ("NFCTH_POLICY_SET_NUM", "be32"),
            ("NFCTH_POLICY_SET1", "policy"),
            ("NFCTH_POLICY_SET2", "policy"),
            ("NFCTH_POLICY_SET3", "policy"),
            ("NFCTH_POLICY_SET4", "policy"),
        )

        class policy(nla):  # type: ignore[misc]  # noqa: N801
            nla_flags = NLA_F_NESTED
            nla_map = (
                ("NFCTH_POLICY_UNSPEC", "none"),
                ("NFCTH_POLICY_NAME", "asciiz"),
                ("NFCTH_POLICY_EXPECT_MAX", "be32"),
                ("NFCTH_POLICY_EXPECT_TIMEOUT", "be32"),
            )


@dataclass(frozen=True, slots=True)
class ForeignRegistration:
    """A registration that orch would never make, as the kernel holds it: `l3proto` and `l4proto` are raw numbers."""

    name: str
    l3proto: int
    l4proto: int


def encode_create(registration: Registration, *, sequence: int = 0) -> bytes:
    """NEW that answers EEXIST if the key is there already."""
    return _new(registration, flags=_CHANGE | NLM_F_CREATE | NLM_F_EXCL, sequence=sequence)


def encode_update(registration: Registration, *, keeps_status: bool = False, sequence: int = 0) -> bytes:
    """NEW that changes queue number, policy values and, unless it is kept, status of what is there.

    Else complete on purpose: the kernel compares the private data length and the policy names, and answers EBUSY where
    they differ. It has no way to say "only if it exists": without the key it registers.
    """
    return _new(registration, flags=_CHANGE, sequence=sequence, keeps_status=keeps_status)


def encode_status(key: HelperKey, status: Status, *, sequence: int = 0) -> bytes:
    """NEW that changes the status and nothing else; EINVAL, and nothing is made, if the key is not there."""
    attributes = [*_identity(key), ("NFCTH_STATUS", _STATUS_NUMBER[status])]
    return _message(NFNL_MSG_CTHELPER_NEW, attributes, flags=_CHANGE, sequence=sequence)


def encode_get(key: HelperKey, *, sequence: int = 0) -> bytes:
    """GET of one registration; ENOENT if it is not there."""
    return _message(NFNL_MSG_CTHELPER_GET, _identity(key), flags=_CHANGE, sequence=sequence)


def encode_dump(*, sequence: int = 0) -> bytes:
    """GET of all registrations of the host; the kernel ignores a filter in a dump."""
    return _message(NFNL_MSG_CTHELPER_GET, [], flags=NLM_F_REQUEST | NLM_F_DUMP, sequence=sequence)


def encode_delete(key: HelperKey, *, sequence: int = 0) -> bytes:
    """DEL of one registration. Always name *and* tuple: what is left out is not compared, an empty DEL removes all."""
    return _message(NFNL_MSG_CTHELPER_DEL, _identity(key), flags=_CHANGE, sequence=sequence)


def decode(data: bytes) -> Registration | ForeignRegistration:
    """The registration in one NEW message of the kernel; raises DecodeError for bytes that are not one."""
    try:
        length, kind = struct.unpack_from("=IH", data)
        if length != len(data) or length < HEADER_BYTES:
            raise DecodeError(f"a message of {len(data)} bytes says it has {length}")
        if kind != NFNL_SUBSYS_CTHELPER << 8 | NFNL_MSG_CTHELPER_NEW:
            raise DecodeError(f"not a helper but a message of type {kind:#06x}")
        # Flags, sequence number and port id are those of the request, and of no matter.
        return _decode_once(data[:6] + bytes(10) + data[16:])
    except (NetlinkDecodeError, struct.error) as error:
        raise DecodeError(f"not a helper: {error!r}") from error


@lru_cache(maxsize=4096)
def _decode_once(data: bytes) -> Registration | ForeignRegistration:
    """Decoded again only when it changed: the whole registry is read for every plan and every scrape."""
    message = cthelper_msg(data)
    message.decode()
    return _helper(message)


def _new(registration: Registration, *, flags: int, sequence: int, keeps_status: bool = False) -> bytes:
    policies = [(f"NFCTH_POLICY_SET{i}", _policy(policy)) for i, policy in enumerate(registration.policies, start=1)]
    attributes = [
        *_identity(registration.key),
        ("NFCTH_QUEUE_NUM", registration.queue_num),
        ("NFCTH_POLICY", {"attrs": [("NFCTH_POLICY_SET_NUM", len(policies)), *policies]}),
        ("NFCTH_PRIV_DATA_LEN", registration.priv_data_len),
        *([] if keeps_status else [("NFCTH_STATUS", _STATUS_NUMBER[registration.status])]),
    ]
    return _message(NFNL_MSG_CTHELPER_NEW, attributes, flags=flags, sequence=sequence)


def _message(command: int, attributes: list[tuple[str, Any]], *, flags: int, sequence: int) -> bytes:
    message = cthelper_msg()
    message["header"] = {"type": NFNL_SUBSYS_CTHELPER << 8 | command, "flags": flags, "sequence_number": sequence}
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)


def _identity(key: HelperKey) -> list[tuple[str, Any]]:
    numbers = [("NFCTH_TUPLE_L3PROTONUM", key.l3proto.number), ("NFCTH_TUPLE_L4PROTONUM", key.l4proto.number)]
    return [("NFCTH_NAME", key.name), ("NFCTH_TUPLE", {"attrs": numbers})]


def _policy(policy: Policy) -> dict[str, Any]:
    return {
        "attrs": [
            ("NFCTH_POLICY_NAME", policy.name),
            ("NFCTH_POLICY_EXPECT_MAX", policy.expect_max),
            ("NFCTH_POLICY_EXPECT_TIMEOUT", policy.expect_timeout_s),
        ]
    }


def _helper(message: Any) -> Registration | ForeignRegistration:
    name = _name(message, "NFCTH_NAME")
    numbers = _value(message, "NFCTH_TUPLE", nla)
    l3proto = _value(numbers, "NFCTH_TUPLE_L3PROTONUM", int)
    l4proto = _value(numbers, "NFCTH_TUPLE_L4PROTONUM", int)
    queue_num = _value(message, "NFCTH_QUEUE_NUM", int)
    status = _value(message, "NFCTH_STATUS", int)
    policies = _policies(_value(message, "NFCTH_POLICY", nla))
    priv_data_len = _value(message, "NFCTH_PRIV_DATA_LEN", int)
    try:
        return Registration(
            key=HelperKey(name, _L3[l3proto], _L4[l4proto]),
            queue_num=queue_num,
            status=_STATUS[status],
            policies=tuple(Policy(*policy) for policy in policies),
            priv_data_len=priv_data_len,
        )
    except (KeyError, ValueError):  # the kernel accepts more than orch does: its number or text is not in the model
        return ForeignRegistration(name, l3proto, l4proto)


def _policies(nest: Any) -> list[tuple[str, int, int]]:
    count = _value(nest, "NFCTH_POLICY_SET_NUM", int)
    if count > POLICIES_MAX:
        raise DecodeError(f"{count} policies")
    nests = [_value(nest, f"NFCTH_POLICY_SET{i}", nla) for i in range(1, count + 1)]
    return [
        (
            _name(policy, "NFCTH_POLICY_NAME"),
            _value(policy, "NFCTH_POLICY_EXPECT_MAX", int),
            _value(policy, "NFCTH_POLICY_EXPECT_TIMEOUT", int),
        )
        for policy in nests
    ]


def _name(message: Any, attribute: str) -> str:
    """A string; pyroute2 leaves one that is not UTF-8 as bytes, which is no name of ours but may be another's."""
    value = message.get_attr(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return _value(message, attribute, str)


def _value(message: Any, attribute: str, kind: type[T]) -> T:
    """An attribute that must be there; pyroute2 hands out raw bytes where it could not decode one."""
    value = message.get_attr(attribute)
    if not isinstance(value, kind):
        raise DecodeError(f"{attribute} is missing or malformed")
    return value
