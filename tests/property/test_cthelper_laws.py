"""Laws of the nfnetlink_cthelper codec."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import DecodeError
from orchestrator.kernel import cthelper_codec as codec
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status
from tests.examples import many

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,14}", fullmatch=True)
keys = st.builds(HelperKey, names, st.sampled_from(L3Proto), st.sampled_from(L4Proto))
registrations = st.builds(
    Registration,
    key=keys,
    queue_num=st.integers(0, 0xFFFF),
    status=st.sampled_from(Status),
    policies=st.lists(
        st.builds(Policy, names, st.integers(1, 255), st.integers(1, 0xFFFFFFFF)), min_size=1, max_size=4
    ).map(tuple),
    priv_data_len=st.integers(0, 32),
)


MESSAGES = tuple(
    codec.encode_create(
        Registration(
            HelperKey(name, l3proto, L4Proto.TCP),
            queue_num=40000,
            status=Status.ENABLED,
            policies=tuple(Policy(f"policy{i}", 1 + i, 300) for i in range(count)),
            priv_data_len=24,
        )
    )
    for name in ("h", "fifteen-letters")
    for l3proto in L3Proto
    for count in (1, 2, 4)
)


@pytest.fixture(autouse=True, scope="module")
def quiet_pyroute2() -> Iterator[None]:
    """pyroute2 logs a traceback for every attribute that it cannot decode: thousands, here."""
    logging.getLogger("pyroute2.netlink").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("pyroute2.netlink").setLevel(logging.NOTSET)


@given(registrations, st.integers(0, 0xFFFFFFFF))
def test_decode_is_the_inverse_of_encode(registration: Registration, sequence: int) -> None:
    assert codec.decode(codec.encode_create(registration, sequence=sequence)) == registration
    assert codec.decode(codec.encode_update(registration, sequence=sequence)) == registration


@given(registrations, registrations)
def test_create_and_delete_carry_name_and_tuple(one: Registration, other: Registration) -> None:
    """Equal requests only for equal keys: a DEL that names less removes what belongs to others."""
    assert (codec.encode_delete(one.key) == codec.encode_delete(other.key)) == (one.key == other.key)
    assert codec.encode_delete(one.key)[20:] == codec.encode_create(one)[20 : len(codec.encode_delete(one.key))]


@settings(max_examples=many(2000), deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        codec.decode(data)


@settings(max_examples=many(2000), deadline=None)
@given(st.sampled_from(MESSAGES), st.binary(min_size=2, max_size=16))
def test_a_damaged_message_decodes_or_is_refused(message: bytes, damage: bytes) -> None:
    """Bytes changed after the header, so that the damage reaches the attributes: pairs of where and what."""
    damaged = bytearray(message)
    for where, what in zip(damage[::2], damage[1::2], strict=False):
        damaged[20 + where % (len(message) - 20)] = what
    with contextlib.suppress(DecodeError):
        codec.decode(bytes(damaged))


@given(registrations, st.data())
def test_a_cut_message_is_refused(registration: Registration, data: st.DataObject) -> None:
    message = codec.encode_create(registration)
    length = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(DecodeError):
        codec.decode(message[:length])
