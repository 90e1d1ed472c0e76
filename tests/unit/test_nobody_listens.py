"""No registration is enabled where nobody listens, whoever dies meanwhile: on the way there, and back."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import HelperProcessError, Interrupted, OrchError, RollbackError
from orchestrator.fake import FakeKernel
from tests.adapters import CHANGES, wrapped
from tests.hosts import Harness


def asking(more: str = "") -> str:
    return f"profile: p\nhelpers: {{ftp: {{queueing: registration{more}}}}}\n"


CONNTRACKD = "profile: p\nhelpers: {ftp: {engine: conntrackd}}\n"
UPDATES = {"policies": asking(", policies: {ftp: {expect_max: 9}}"), "queue": asking(", queue: 77")}


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    for name in ("blue", "red"):
        kernel.add_netns(name)
    return kernel


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")


def dies_at(kernel: FakeKernel, call: int, netns: str) -> None:
    """The processes of a namespace end just before that call, if there are as many."""
    calls: list[str] = []

    def on_modify(operation: str, _key: str) -> None:
        calls.append(operation)
        if len(calls) == call:
            for pid, (_, launch) in list(kernel.running_processes.items()):
                if launch.netns.label == netns:
                    kernel.kill(pid)

    kernel.on_modify = on_modify


@pytest.mark.parametrize("call", range(1, 10))
@pytest.mark.parametrize("update", UPDATES)
def test_a_process_dies_during_an_update(orch: Harness, kernel: FakeKernel, update: str, call: int) -> None:
    orch.apply(asking(), "blue")
    dies_at(kernel, call, "blue")
    with suppress(OrchError):
        orch.apply(UPDATES[update], "blue")
    kernel.on_modify = None
    assert kernel.deaf() == []
    orch.teardown("nobody")
    assert kernel.deaf() == []


@pytest.mark.parametrize("call", range(1, 16))
@pytest.mark.parametrize("text", [asking(), CONNTRACKD])
def test_another_dies_while_one_comes_and_goes(orch: Harness, kernel: FakeKernel, text: str, call: int) -> None:
    orch.apply(text, "red")
    dies_at(kernel, call, "red")
    with suppress(OrchError):
        orch.apply(text, "blue")
    assert kernel.deaf() == []
    with suppress(OrchError):
        orch.teardown("p", "blue")
    assert kernel.deaf() == []


def test_one_that_dies_between_look_and_enabling_is_disabled_again(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(asking(), "blue")
    (pid,) = kernel.running_processes
    kernel.kill(pid)

    def on_modify(operation: str, key: str) -> None:
        if operation == "update helper" and kernel.running_processes and key == "ftp-us/ip/tcp":
            kernel.kill(next(iter(kernel.running_processes)))

    kernel.on_modify = on_modify
    with pytest.raises(OrchError) as caught:
        orch.apply(asking(), "blue")
    assert not isinstance(caught.value, RollbackError)
    assert kernel.deaf() == []


@pytest.mark.parametrize("text", [asking(), CONNTRACKD])
def test_a_teardown_is_undone_after_a_step_whose_answer_was_lost(orch: Harness, kernel: FakeKernel, text: str) -> None:
    orch.apply(text, "blue")
    before = kernel.dump_text()

    def around(name: str, call: Callable[[], Any]) -> Any:
        result = call()
        if name == "processes.stop":
            orch.signal_number = signal.SIGTERM
            raise HelperProcessError("its supervisor does not answer")
        return result

    system, orch.system = orch.system, wrapped(orch.system, around, CHANGES)
    with pytest.raises(Interrupted):
        orch.teardown("p", "blue")
    orch.system, orch.signal_number = system, 0
    assert kernel.dump_text() == before


def test_one_that_comes_disables_nothing_that_another_listens_to(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(asking(), "blue")
    before = dict(kernel.registrations)

    def on_modify(_operation: str, _key: str) -> None:
        assert kernel.registrations == before

    kernel.on_modify = on_modify
    orch.apply(asking(), "red")
    assert kernel.registrations == before
