"""What adapters promise the rest of orch, with the errnos of the kernel."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from orchestrator.errors import KernelError, PreflightError
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Policy, Registration, Rules, Status
from tests.contract.conftest import World
from tests.hosts import both

BACKENDS = (Backend.NFTABLES, Backend.IPTABLES_NFT, Backend.IPTABLES_LEGACY)
KEY = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
FTP = Registration(KEY, 36160, Status.DISABLED, (Policy("ftp", 1, 300),), 24)


def rules(backend: Backend, ports: str = "21") -> Rules:
    helper = f"ftp: {{engine: conntrackd, attach: [{{ports: [{ports}]}}]}}"
    text = f"profile: ftp\nbackend: {backend}\nhelpers: {{{helper}}}\n"
    return both(text)[1].rules


def refused(error: pytest.ExceptionInfo[KernelError]) -> int:
    return error.value.errno


def test_create_dump_delete(world: World) -> None:
    assert world.system.registry.dump() == ()
    world.system.registry.create(FTP)
    assert world.system.registry.dump() == (FTP,)
    world.system.registry.delete(KEY)
    assert world.system.registry.dump() == ()


def test_dump_is_sorted_and_complete(world: World) -> None:
    made = [replace(FTP, key=HelperKey(f"h{n}", l3, l4)) for n in (2, 1) for l3 in L3Proto for l4 in L4Proto]
    for registration in made:
        world.system.registry.create(registration)
    assert world.system.registry.dump() == tuple(sorted(made, key=lambda r: r.key))


def test_create_again_is_eexist(world: World) -> None:
    world.system.registry.create(FTP)
    with pytest.raises(KernelError) as error:
        world.system.registry.create(replace(FTP, queue_num=9))
    assert refused(error) == errno.EEXIST
    assert world.system.registry.dump() == (FTP,)


@pytest.mark.parametrize(
    "after",
    [
        replace(FTP, status=Status.ENABLED),
        replace(FTP, queue_num=0xFFFF),
        replace(FTP, policies=(Policy("ftp", 255, 86400),)),
    ],
)
def test_values_are_updated_in_place(world: World, after: Registration) -> None:
    world.system.registry.create(FTP)
    world.system.registry.update(after)
    assert world.system.registry.dump() == (after,)


@pytest.mark.parametrize("status", Status)
def test_values_are_updated_and_the_status_kept(world: World, status: Status) -> None:
    world.system.registry.create(replace(FTP, status=status))
    after = replace(FTP, queue_num=0xFFFF, policies=(Policy("ftp", 255, 86400),), status=Status.ENABLED)
    world.system.registry.update(after, keeps_status=True)
    assert world.system.registry.dump() == (replace(after, status=status),)


@pytest.mark.parametrize(
    "after",
    [
        replace(FTP, queue_num=9, priv_data_len=16),
        replace(FTP, queue_num=9, policies=(Policy("other", 1, 300),)),
        replace(FTP, queue_num=9, policies=(Policy("ftp", 1, 300), Policy("second", 1, 300))),
    ],
)
def test_identity_is_not_updated(world: World, after: Registration) -> None:
    world.system.registry.create(FTP)
    with pytest.raises(KernelError) as error:
        world.system.registry.update(after)
    assert refused(error) == errno.EBUSY
    assert world.system.registry.dump() == (FTP,)


def test_update_and_delete_of_nothing_is_enoent(world: World) -> None:
    with pytest.raises(KernelError) as error:
        world.system.registry.update(FTP)
    assert refused(error) == errno.ENOENT
    with pytest.raises(KernelError) as error:
        world.system.registry.delete(KEY)
    assert refused(error) == errno.ENOENT


def test_delete_takes_only_its_key(world: World) -> None:
    other = replace(FTP, key=replace(KEY, l3proto=L3Proto.IP6))
    world.system.registry.create(FTP)
    world.system.registry.create(other)
    world.system.registry.delete(KEY)
    assert world.system.registry.dump() == (other,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_of_an_unregistered_helper_are_enoent_and_change_nothing(world: World, backend: Backend) -> None:
    adapter = world.system.rules[backend]
    with pytest.raises(KernelError) as error:
        adapter.load(world.netns, rules(backend))
    assert refused(error) == errno.ENOENT
    assert adapter.listing(world.netns, "ftp") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_are_loaded_replaced_and_removed(world: World, backend: Backend) -> None:
    adapter = world.system.rules[backend]
    world.system.registry.create(FTP)
    assert adapter.profiles(world.netns) == ()
    first, second = rules(backend), rules(backend, "21, 2121-2125")
    adapter.load(world.netns, first)
    before = adapter.listing(world.netns, "ftp")
    assert before is not None
    assert (before.digest, before.helpers) == (first.digest, frozenset({KEY}))
    adapter.load(world.netns, second)
    after = adapter.listing(world.netns, "ftp")
    assert after is not None
    assert after.digest == second.digest
    assert after.text != before.text
    adapter.load(world.netns, first)
    assert adapter.listing(world.netns, "ftp") == before
    assert adapter.profiles(world.netns) == ("ftp",)
    adapter.remove(world.netns, "ftp")
    assert adapter.listing(world.netns, "ftp") is None
    adapter.remove(world.netns, "ftp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_is_what_listing_says_after_load(world: World, backend: Backend) -> None:
    adapter = world.system.rules[backend]
    world.system.registry.create(FTP)
    expected = adapter.expected(rules(backend))
    assert adapter.listing(world.netns, "ftp") is None
    adapter.load(world.netns, rules(backend))
    assert adapter.listing(world.netns, "ftp") == expected
    adapter.remove(world.netns, "ftp")
    world.system.registry.delete(KEY)  # nothing of the probe refers to it any more


@pytest.mark.parametrize("backend", BACKENDS)
def test_flushed_rules_differ_and_can_be_loaded_again(world: World, backend: Backend) -> None:
    adapter = world.system.rules[backend]
    world.system.registry.create(FTP)
    adapter.load(world.netns, rules(backend))
    loaded = adapter.listing(world.netns, "ftp")
    adapter.flush(world.netns, "ftp")
    flushed = adapter.listing(world.netns, "ftp")
    assert flushed is None or (loaded is not None and flushed.text != loaded.text)
    adapter.load(world.netns, rules(backend))
    assert adapter.listing(world.netns, "ftp") == loaded


@pytest.mark.parametrize("backend", BACKENDS)
def test_delete_of_a_referenced_helper(world: World, backend: Backend) -> None:
    world.system.registry.create(FTP)
    world.system.rules[backend].load(world.netns, rules(backend))
    if world.deletes_referenced:
        world.system.registry.delete(KEY)
        assert world.system.registry.dump() == ()
        return
    with pytest.raises(KernelError) as error:
        world.system.registry.delete(KEY)
    assert refused(error) == errno.EBUSY
    world.system.rules[backend].remove(world.netns, "ftp")
    world.system.registry.delete(KEY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_replacement_leaves_the_old_rules(world: World, backend: Backend) -> None:
    adapter = world.system.rules[backend]
    world.system.registry.create(FTP)
    adapter.load(world.netns, rules(backend))
    before = adapter.listing(world.netns, "ftp")
    text = f"profile: ftp\nbackend: {backend}\nhelpers: {{ftp: {{engine: conntrackd}}, sane: {{}}}}\n"
    with pytest.raises(KernelError) as error:
        adapter.load(world.netns, both(text)[1].rules)
    assert refused(error) == errno.ENOENT
    assert adapter.listing(world.netns, "ftp") == before


def test_a_missing_namespace_is_told(world: World) -> None:
    with pytest.raises(PreflightError):
        world.system.host.find_netns("there-is-no-such-namespace")


def test_an_unbound_namespace_has_no_queues(world: World) -> None:
    assert world.system.host.queues(world.netns) == ()
    assert world.system.host.expectations(world.netns) == {}
    assert world.system.host.connections(world.netns) == {}
