"""Laws of apply and teardown, on the fake kernel, for profiles and faults that hypothesis chooses."""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import OrchError, RollbackError
from orchestrator.fake import FakeKernel
from orchestrator.model import L4Proto
from orchestrator.reports import PlanRefusedError
from tests.examples import many
from tests.faults import state
from tests.hosts import Harness

HELPERS = {
    "ftp": [
        "{engine: conntrackd}", "{engine: conntrackd, queue: 77}", "{engine: conntrackd, name: own}",
        "{engine: conntrackd, policies: {ftp: {expect_max: 9}}}", "{engine: kernel}",
        "{}", "{queue: 77}", "{queueing: registration}", "{name: own, policies: {ftp: {expect_max: 9}}}",
    ],
    "tftp": [
        "{engine: conntrackd}", "{engine: conntrackd, attach: [{ports: [69, 1069], iif: lan0}]}",
        "{}", "{guard: {source: any}}", "{queueing: registration, queue: 78}",
    ],
    "sane": ["{engine: conntrackd}", "{engine: kernel}"],
    "ssdp": ["{}", "{policies: {ssdp: {expect_max: 2, expect_timeout: 1m}}}"],
}  # fmt: skip
MODULES = {
    "nf_conntrack_ftp": (("ftp", L4Proto.TCP),),
    "nf_nat_ftp": (),
    "nf_conntrack_sane": (("sane", L4Proto.TCP),),
}

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # as /run is: a ledger on a disk is many times slower


@st.composite
def profiles(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(sorted(HELPERS)), min_size=1, unique=True))
    helpers = "".join(f"  {name}: {draw(st.sampled_from(HELPERS[name]))}\n" for name in names)
    backend = draw(st.sampled_from(["nftables", "iptables-nft"]))
    return f"profile: p\nbackend: {backend}\nhelpers:\n{helpers}"


def host(directory: str, *, is_new: bool) -> tuple[Harness, FakeKernel]:
    kernel = FakeKernel(modules_available=MODULES, delete_ignores_references=is_new)
    return Harness(kernel.system(), Path(directory) / "state"), kernel


def try_apply(orch: Harness, text: str) -> bool:
    """False where it was refused or failed: a kernel module and a user-space helper cannot both have a name."""
    try:
        orch.apply(text)
    except OrchError:
        return False
    return True


@given(st.lists(profiles(), min_size=1, max_size=4), st.booleans())
@settings(max_examples=many(60), deadline=None)
def test_apply_reaches_the_profile_and_teardown_leaves_nothing(texts: list[str], is_new: bool) -> None:  # noqa: FBT001
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        orch, kernel = host(directory, is_new=is_new)
        empty = state(kernel)
        for text in texts:
            before = state(kernel)
            if not try_apply(orch, text):
                assert state(kernel) == before
                continue
            calls = len(kernel.calls)
            assert orch.diff(text).plan.is_empty
            assert orch.apply(text).plan.is_empty
            assert orch.status().profiles[0].drift == ()
            assert len(kernel.calls) == calls
        orch.teardown()
        assert state(kernel) == empty


@given(profiles(), profiles(), st.booleans())
@settings(max_examples=many(25), deadline=None)
def test_a_fault_at_any_step_leaves_the_old_state(first: str, second: str, is_new: bool) -> None:  # noqa: FBT001
    """Every modifying call of the second apply fails in turn; then the host is as before, and the next apply works."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        orch, kernel = host(directory, is_new=is_new)
        if not try_apply(orch, first):
            return
        before = state(kernel)
        for call in range(100):
            calls = len(kernel.calls)
            kernel.fail_at(call, errno.EIO)
            if try_apply(orch, second) or len(kernel.calls) == calls:
                break
            kernel._fail.clear()
            assert state(kernel) == before, f"call {call}"
            assert orch.diff(first).plan.is_empty
        kernel._fail.clear()
        orch.teardown()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["apply", "teardown", "kill"]),
            st.sampled_from(["blue", "red"]),
            profiles(),
            st.integers(0, 25),
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
@settings(max_examples=many(40), deadline=None)
def test_enabled_implies_a_listener(steps: list[tuple[str, str, str, int]], is_new: bool) -> None:  # noqa: FBT001
    """Whatever is applied, torn down or killed in two namespaces, and whichever call fails: nothing blocks."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        orch, kernel = host(directory, is_new=is_new)
        for name in ("blue", "red"):
            kernel.add_netns(name)
        for number, (action, netns, text, fault) in enumerate(steps):
            profile = text.replace("profile: p", f"profile: p{number % 2}")
            kernel._fail = {len(kernel.calls) + fault: errno.EIO}
            try:
                if action == "apply":
                    orch.apply(profile, netns)
                elif action == "teardown":
                    orch.teardown(netns=netns)
                elif kernel.running_processes:
                    kernel.kill(next(iter(kernel.running_processes)))
            except OrchError:
                pass
            assert (kernel.deaf(), kernel.idle(), kernel.leaked) == ([], [], set()), (number, action)
        kernel._fail.clear()
        orch.teardown(every_netns=True)
        assert all(line.startswith("module ") for line in kernel.dump_text().splitlines())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["apply", "kill", "forget"]),
            st.sampled_from(["blue", "red"]),
            profiles(),
            st.none() | st.integers(0, 25),
        ),
        min_size=2,
        max_size=5,
    ),
    st.booleans(),
)
@settings(max_examples=many(30), deadline=None)
def test_without_its_ledger_orch_finds_what_is_there(
    steps: list[tuple[str, str, str, int | None]],
    is_new: bool,  # noqa: FBT001
) -> None:
    """Rules and processes are ours by their own marks; only registrations that no rule names are left to others."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        orch, kernel = host(directory, is_new=is_new)
        for name in ("blue", "red"):
            kernel.add_netns(name)
        for number, (action, netns, text, fault) in enumerate(steps):
            profile = text.replace("profile: p", f"profile: p{number % 2}")
            if action == "forget":
                shutil.rmtree(orch.state_dir, ignore_errors=True)
            elif action == "kill" and kernel.running_processes:
                kernel.kill(next(iter(kernel.running_processes)))
            else:
                kernel._fail = {} if fault is None else {len(kernel.calls) + fault: errno.EIO}
                # Without the ledger nobody knows how to start again what was stopped; others have to wait then.
                with suppress(*((PlanRefusedError, RollbackError) if fault is None else (OrchError,))):
                    orch.apply(profile, netns)
                    assert orch.apply(profile, netns).plan.is_empty
            assert (kernel.deaf(), kernel.idle(), kernel.leaked) == ([], [], set()), (number, action)
        kernel._fail.clear()
        assert not any(report.leftovers for report in orch.teardown(every_netns=True).reports)
        assert all(line.startswith(("module ", "registration ")) for line in kernel.dump_text().splitlines())
