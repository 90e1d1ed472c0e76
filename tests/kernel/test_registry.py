"""The registry adapter on a kernel that has nfnetlink_cthelper: real errnos, and nobody else's entry touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.errors import KernelError
from orchestrator.kernel import cthelper_codec as codec
from orchestrator.kernel import netlink
from orchestrator.kernel.cthelper import MODULE, KernelRegistry
from orchestrator.kernel.modules import KernelModules
from orchestrator.kernel.netns import scratch
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status

pytestmark = pytest.mark.kernel

FTP = Registration(
    key=HelperKey("orch-ftp", L3Proto.IP, L4Proto.TCP),
    queue_num=16400,
    status=Status.DISABLED,
    policies=(Policy("control", 8, 300), Policy("data", 255, 2)),
    priv_data_len=24,
)
LONG = replace(FTP, policies=tuple(Policy(f"long-policy-{number:03}", 8, 300) for number in range(4)))
ENTRIES = 40  # of 248 bytes, where the first page has at most 8 KiB; each costs 0.3 s to delete again on 6.1
DEL_REFUSES_WHILE_REFERENCED = tuple(map(int, os.uname().release.split(".")[:2])) < (7, 0)

ASK_FROM_A_USER_NAMESPACE = """
from orchestrator.errors import KernelError
from orchestrator.kernel.cthelper import KernelRegistry
try:
    KernelRegistry().dump()
except KernelError as error:
    print(error, error.cause, sep="; ")
"""


def numbered(number: int) -> HelperKey:
    return HelperKey(f"orch-{number}", L3Proto(["ip", "ip6"][number % 2]), L4Proto.UDP)


def register_raw(name: str, *, l3proto: int, policy: tuple[str, int] = ("p", 1)) -> None:
    """Register what the model would not express."""
    message = codec.cthelper_msg()
    message["header"] = {"type": 9 << 8, "flags": 0x5}
    numbers = [("NFCTH_TUPLE_L3PROTONUM", l3proto), ("NFCTH_TUPLE_L4PROTONUM", 6)]
    names = ("NFCTH_POLICY_NAME", "NFCTH_POLICY_EXPECT_MAX", "NFCTH_POLICY_EXPECT_TIMEOUT")
    nest = {"attrs": list(zip(names, (*policy, 60), strict=True))}
    message["attrs"] = [
        ("NFCTH_NAME", name),
        ("NFCTH_TUPLE", {"attrs": numbers}),
        ("NFCTH_POLICY", {"attrs": [("NFCTH_POLICY_SET_NUM", 1), ("NFCTH_POLICY_SET1", nest)]}),
        ("NFCTH_PRIV_DATA_LEN", 0),
    ]
    message.encode()
    netlink.perform(bytes(message.data))


def entries() -> list[Registration | codec.ForeignRegistration]:
    return netlink.dump(codec.encode_dump(), lambda messages: [codec.decode(message) for message in messages])


@pytest.fixture
def registry() -> Iterator[KernelRegistry]:
    """A registry with nothing in it; empty again afterwards."""
    KernelModules().load(MODULE)
    registry = KernelRegistry()
    assert entries() == [], "somebody else's registrations: run in a machine of your own"
    yield registry
    netlink.perform(bytes.fromhex("14000000 0209 0500") + bytes(12))  # DEL without a filter: all of them
    assert entries() == []


def refused(operation: str, number: int) -> pytest.RaisesExc[KernelError]:
    return pytest.RaisesExc(KernelError, check=lambda error: (error.operation, error.errno) == (operation, number))


def test_looking_loads_nothing() -> None:
    subprocess.run(["modprobe", "-r", MODULE], check=False, capture_output=True)
    registry = KernelRegistry()
    assert not registry.is_present()
    assert registry.dump() == ()
    for operation, act in (("update helper", registry.update), ("unregister helper", lambda r: registry.delete(r.key))):
        with refused(operation, errno.ENOENT):
            act(FTP)
    assert not registry.is_present()


def test_what_is_registered_is_listed(registry: KernelRegistry) -> None:
    other = replace(FTP, key=HelperKey("orch-ftp", L3Proto.IP6, L4Proto.TCP), status=Status.ENABLED)
    registry.create(other)
    registry.create(FTP)
    assert registry.is_present()
    assert registry.dump() == (FTP, other)


def test_a_second_registration_is_refused_and_changes_nothing(registry: KernelRegistry) -> None:
    registry.create(FTP)
    with refused("register helper", errno.EEXIST):
        registry.create(replace(FTP, queue_num=7))
    assert registry.dump() == (FTP,)


def test_a_name_of_a_loaded_kernel_helper_is_busy(registry: KernelRegistry) -> None:
    KernelModules().load("nf_conntrack_ftp")
    with refused("register helper", errno.EBUSY):
        registry.create(replace(FTP, key=HelperKey("ftp", L3Proto.IP, L4Proto.TCP)))
    udp = replace(FTP, key=HelperKey("ftp", L3Proto.IP, L4Proto.UDP))
    registry.create(udp)
    assert registry.dump() == (udp,)


def test_an_entry_for_all_families_makes_ours_busy(registry: KernelRegistry) -> None:
    register_raw("orch-ftp", l3proto=0)
    with refused("register helper", errno.EBUSY):
        registry.create(FTP)


@pytest.mark.parametrize(
    "changed",
    [
        replace(FTP, queue_num=7),
        replace(FTP, status=Status.ENABLED),
        replace(FTP, policies=(Policy("control", 1, 5), Policy("data", 2, 6))),
        FTP,
    ],
    ids=["queue", "status", "policies", "nothing"],
)
def test_what_can_be_changed_in_place_is(registry: KernelRegistry, changed: Registration) -> None:
    registry.create(FTP)
    registry.update(changed)
    assert registry.dump() == (changed,)


@pytest.mark.parametrize(
    "changed",
    [
        replace(FTP, priv_data_len=16, queue_num=7),
        replace(FTP, policies=(Policy("control", 8, 300),), queue_num=7),
        replace(FTP, policies=tuple(reversed(FTP.policies)), queue_num=7),
    ],
    ids=["priv_data_len", "fewer-policies", "policy-order"],
)
def test_identity_cannot_be_changed_and_nothing_else_is(registry: KernelRegistry, changed: Registration) -> None:
    assert not FTP.can_become(changed)
    registry.create(FTP)
    with refused("update helper", errno.EBUSY):
        registry.update(changed)
    assert registry.dump() == (FTP,)


def test_an_update_of_nothing_registers_nothing(registry: KernelRegistry) -> None:
    with refused("update helper", errno.ENOENT):
        registry.update(FTP)
    assert registry.dump() == ()


@pytest.mark.parametrize("neighbours", [0, 1])
def test_what_is_not_there_cannot_be_deleted(registry: KernelRegistry, neighbours: int) -> None:
    for number in range(neighbours):
        registry.create(replace(FTP, key=numbered(number)))
    with refused("unregister helper", errno.ENOENT):
        registry.delete(FTP.key)
    assert len(registry.dump()) == neighbours


def test_a_delete_takes_one_and_leaves_its_neighbours(registry: KernelRegistry) -> None:
    same_name = [replace(FTP, key=HelperKey("orch-ftp", l3, l4)) for l3 in L3Proto for l4 in L4Proto]
    same_tuple = replace(FTP, key=HelperKey("orch-ftp2", L3Proto.IP, L4Proto.TCP))
    for registration in (*same_name, same_tuple):
        registry.create(registration)
    registry.delete(FTP.key)
    assert set(registry.dump()) == {*same_name, same_tuple} - {FTP}


def test_ready_made_status_messages_change_the_status_alone(registry: KernelRegistry) -> None:
    registry.create(FTP)
    for status in (Status.ENABLED, Status.DISABLED):
        netlink.perform(codec.encode_status(FTP.key, status))
        assert registry.dump() == (replace(FTP, status=status),)


def test_a_status_message_registers_nothing(registry: KernelRegistry) -> None:
    with pytest.RaisesExc(OSError, check=lambda error: error.errno == errno.EINVAL):
        netlink.perform(codec.encode_status(FTP.key, Status.DISABLED))
    assert registry.dump() == ()


def test_entries_of_others_are_left_out_and_left_alone(registry: KernelRegistry) -> None:
    register_raw("two words", l3proto=2)
    register_raw("orch-ftp", l3proto=10, policy=("", 1))
    register_raw("both", l3proto=0)
    registry.create(FTP)
    assert registry.dump() == (FTP,)
    registry.delete(FTP.key)
    assert {(e.name, e.l3proto) for e in entries() if isinstance(e, codec.ForeignRegistration)} == {
        ("two words", 2),
        ("orch-ftp", 10),
        ("both", 0),
    }


def test_a_dump_of_many_pages_is_complete(registry: KernelRegistry) -> None:
    registrations = [replace(LONG, key=numbered(number), queue_num=number) for number in range(ENTRIES)]
    for registration in registrations:
        registry.create(registration)
    assert set(registry.dump()) == set(registrations)
    assert list(registry.dump()) == sorted(registry.dump(), key=lambda r: r.key)


def test_a_helper_that_rules_refer_to(registry: KernelRegistry) -> None:
    """Up to 6.12 the kernel refuses to delete it; later ones do not, and no caller may count on either."""
    registry.create(FTP)
    with scratch():
        rules = 'table ip t { ct helper h { type "orch-ftp" protocol tcp; }; }'
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        if DEL_REFUSES_WHILE_REFERENCED:
            with refused("unregister helper", errno.EBUSY):
                registry.delete(FTP.key)
            assert registry.dump() == (FTP,)
        subprocess.run(["nft", "delete", "table", "ip", "t"], check=True)
        registry.delete(FTP.key)
    assert registry.dump() == ()


def test_root_of_a_user_namespace_is_refused(registry: KernelRegistry) -> None:
    assert registry.is_present()
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", ASK_FROM_A_USER_NAMESPACE]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "CAP_NET_ADMIN of the host is needed; EPERM, list helpers" in answer
