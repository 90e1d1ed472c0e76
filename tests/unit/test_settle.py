"""What a killed command leaves, and what the next one says and does about it; tests/faults.py has all the places."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import Interrupted, KernelError, RollbackError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, L3Proto, L4Proto, Status
from tests.faults import Act, Fault, Killed, apply, forget, run, state, teardown
from tests.hosts import FTP, Harness

OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
OTHER = FTP.replace("conntrackd", "conntrackd, name: own")
NEIGHBOUR = "profile: neighbour\nhelpers: {tftp: {}}\n"


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    for name in ("blue", "red"):
        kernel.add_netns(name)
    return kernel


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


def killed_at(orch: Harness, kernel: FakeKernel, act: Act, operation: str) -> None:
    """The command is killed right before its first call of that kind."""

    def strike(called: str, _: str) -> None:
        if called == operation:
            raise Killed

    kernel.on_modify = strike
    with pytest.raises(Killed):
        act(orch, kernel)
    kernel.on_modify = None
    orch.steps.clear()


def test_half_an_apply_is_undone_and_said(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    killed_at(orch, kernel, apply(FTP), "start")
    sentence = "apply of profile ftp in netns blue was not finished (step 4 of 7, start conntrackd)"
    assert [(one.sentence, one.remedy) for one in orch.status().unsettled] == [(sentence, "undoes it")]
    orch.diff(FTP, "blue")
    assert orch.warnings == [f"{sentence}: the next apply or teardown undoes it"]
    orch.teardown("nobody", "red")
    assert orch.warnings[1:] == [f"{sentence}: undoing it"]
    assert orch.steps == ["(stop conntrackd)", "(unregister helper ftp-us/ip/tcp)", "(unregister helper ftp/ip/tcp)"]
    assert kernel.dump_text() == before
    assert not orch.status().unsettled


def test_half_a_teardown_is_finished_and_said(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    orch.apply(FTP, "blue")
    killed_at(orch, kernel, teardown("ftp"), "remove rules")
    sentence = "teardown of profile ftp in netns blue was not finished (step 4 of 8, remove rules inet orch-ftp)"
    assert [(one.sentence, one.remedy) for one in orch.status().unsettled] == [(sentence, "finishes it")]
    orch.teardown("nobody", "red")
    assert orch.warnings == [f"{sentence}: finishing it"]
    assert kernel.dump_text() == before
    assert orch.status().is_right


def test_half_a_teardown_is_finished_without_a_ledger_of_before(orch: Harness, kernel: FakeKernel) -> None:
    """The journal alone knows then that the flushed table and the registrations are ours."""
    before = kernel.dump_text()
    orch.apply(FTP, "blue")
    forget(orch, kernel)
    killed_at(orch, kernel, teardown("ftp"), "remove rules")
    orch.teardown("nobody", "red")
    assert kernel.dump_text() == before


@pytest.mark.parametrize("is_known", [True, False])
def test_no_signal_stops_the_finishing_of_a_teardown(orch: Harness, kernel: FakeKernel, *, is_known: bool) -> None:
    """It could only be brought back to half-done, and by then the journal has the new teardown alone."""
    before = kernel.dump_text()
    orch.apply(FTP, "blue")
    if not is_known:
        forget(orch, kernel)
    killed_at(orch, kernel, teardown("ftp"), "remove rules")
    orch.signal_number = signal.SIGINT
    with pytest.raises(Interrupted):
        orch.apply(FTP, "red")
    assert kernel.dump_text() == before
    assert orch.status().is_right


def test_what_cannot_be_settled_stays_in_the_journal(orch: Harness, kernel: FakeKernel) -> None:
    """Others have to wait; the profile itself can be applied anew, or torn down."""
    orch.apply(FTP, "blue")
    first = state(kernel)
    killed_at(orch, kernel, apply(OTHER), "register helper")
    orch.apply(OTHER, "blue")  # undone first, as nothing is in its way
    killed_at(orch, kernel, apply(FTP), "load rules")
    kernel.dying_programs.add("conntrackd")
    for _ in range(2):
        with pytest.raises(RollbackError, match="and undoing it failed") as caught:
            orch.apply(FTP, "red")
        assert "start conntrackd" in caught.value.leftovers[0]
    assert kernel.deaf() == []
    assert orch.status().unsettled
    kernel.dying_programs.clear()
    orch.apply(FTP, "blue")
    assert state(kernel) == first
    assert orch.status().is_right


def refusal(operation: str, profile: str) -> Callable[[str, str], None]:
    def refuse(called: str, key: str) -> None:
        if (called, key) == (operation, profile):
            raise KernelError(called, key, errno.EBUSY)

    return refuse


@pytest.mark.parametrize("is_known", [True, False])
def test_a_teardown_that_cannot_be_finished_is_in_nobodys_way(
    orch: Harness, kernel: FakeKernel, *, is_known: bool
) -> None:
    """It is planned anew each time, so what others do meanwhile is not undone by it."""
    before = kernel.dump_text()
    orch.apply(FTP, "blue")
    if not is_known:
        forget(orch, kernel)
    killed_at(orch, kernel, teardown("ftp"), "remove rules")
    kernel.on_modify = refusal("remove rules", "ftp")
    for is_told in (True, not is_known):  # what the ledger knows is not half-done any more, but drift
        orch.apply(NEIGHBOUR, "red")
        told = [sentence for sentence in orch.warnings if sentence.startswith("left: remove rules inet orch-ftp")]
        assert (bool(told), bool(orch.status().unsettled)) == (is_told, not is_known)
        orch.teardown("neighbour", "red")
        orch.warnings.clear()
    assert not orch.status().is_right
    assert kernel.deaf() == []
    kernel.on_modify = None
    orch.teardown("ftp", "blue")
    assert kernel.dump_text() == before
    assert orch.status().is_right


def test_one_that_cannot_be_settled_does_not_keep_others_from_it(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(FTP, "blue")
    forget(orch, kernel)
    killed_at(orch, kernel, teardown("ftp"), "remove rules")
    kernel.on_modify = refusal("remove rules", "ftp")
    orch.apply(NEIGHBOUR, "red")
    killed_at(orch, kernel, apply(NEIGHBOUR.replace("{}", "{queue: 9}"), "red"), "load rules")
    kernel.on_modify = refusal("load rules", "neighbour")
    with pytest.raises(RollbackError, match="profile neighbour in netns red"):
        orch.apply(FTP, "blue")
    assert [str(one.owner) for one in orch.status().unsettled] == ["profile neighbour in netns red"]


def test_a_profile_that_cannot_be_settled_can_be_torn_down(orch: Harness, kernel: FakeKernel) -> None:
    before = kernel.dump_text()
    orch.apply(FTP, "blue")
    killed_at(orch, kernel, apply(OTHER), "load rules")
    kernel.dying_programs.add("conntrackd")
    orch.teardown("ftp", "blue")
    assert kernel.dump_text() == before
    assert orch.status().is_right


def test_what_was_in_a_namespace_that_is_gone_needs_no_undoing(orch: Harness, kernel: FakeKernel) -> None:
    killed_at(orch, kernel, apply(FTP), "start")
    kernel.gone.append(kernel.namespaces.pop("blue"))
    orch.teardown("nobody", "red")
    assert not kernel.registrations
    assert orch.status().is_right


def test_a_failure_on_the_way_back_leaves_nothing_enabled_that_nobody_hears(orch: Harness, kernel: FakeKernel) -> None:
    """The queue of a registration cannot be changed back: then its listener keeps it."""
    asking = FTP.replace("engine: conntrackd", "queueing: registration")
    orch.apply(asking, "blue")
    before = state(kernel)
    for event in range(20):
        run(orch, kernel, apply(asking.replace("}", ", queue: 77}")), {event: Fault(errno.EPERM, is_lasting=True)})
        assert kernel.deaf() == [], event
        orch.teardown("nobody", "red")
        if not orch.diff(asking, "blue").plan.is_empty:
            return  # it was done
        assert state(kernel) == before


def test_others_go_on_with_what_a_profile_needs_no_more(orch: Harness, kernel: FakeKernel) -> None:
    """Its process starts again, so what it shares is disabled, and has to be enabled again for the others."""
    orch.apply(FTP, "blue")
    orch.apply(FTP, "red")
    orch.apply(OTHER, "blue")
    assert kernel.registrations[OWN].status is Status.ENABLED
    assert orch.status().is_right
