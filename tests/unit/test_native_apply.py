"""Profiles of native helpers on the fake kernel: disabled registrations, queues and labels of rules, other engines."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import KernelError
from orchestrator.fake import FakeKernel
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Status
from orchestrator.reports import PlanRefusedError
from tests.hosts import Harness

OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
RULES = "profile: ftp\nfamilies: ip\nhelpers: {ftp: {engine: native}}\n"
REGISTRATION = "profile: ftp\nfamilies: ip\nhelpers: {ftp: {engine: native, queueing: registration}}\n"


def refusal(orch: Harness, text: str, netns: str | None = None) -> list[str]:
    with pytest.raises(PlanRefusedError) as caught:
        orch.apply(text, netns)
    return [r.what for r in caught.value.refusals]


def test_rules_queue_and_the_registration_stays_disabled(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(RULES)
    assert orch.steps == ["register helper ftp-us/ip/tcp", "start ftp", "load rules inet orch-ftp"]
    assert kernel.registrations[OWN].status is Status.DISABLED
    assert orch.apply(RULES).plan.is_empty


def test_a_registration_found_enabled_is_disabled_and_nothing_else_is_touched(
    orch: Harness, kernel: FakeKernel
) -> None:
    orch.apply(RULES)
    kernel.registrations[OWN] = replace(kernel.registrations[OWN], status=Status.ENABLED)
    assert orch.status().profiles[0].drift == ("ftp-us/ip/tcp: status enabled -> disabled",)
    orch.steps.clear()
    orch.apply(RULES)
    assert orch.steps == ["disable helper ftp-us/ip/tcp"]


def test_a_death_in_mode_rules_disables_nothing_and_apply_starts_the_process_again(
    orch: Harness, kernel: FakeKernel
) -> None:
    orch.apply(RULES)
    calls = len(kernel.calls)
    kernel.kill(next(iter(kernel.running_processes)))
    assert len(kernel.calls) == calls
    orch.steps.clear()
    orch.apply(RULES)
    assert orch.steps == ["start ftp"]


def test_a_death_in_mode_registration_disables(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(REGISTRATION)
    assert kernel.registrations[OWN].status is Status.ENABLED
    kernel.kill(next(iter(kernel.running_processes)))
    assert kernel.registrations[OWN].status is Status.DISABLED


@pytest.mark.parametrize("engines", [("conntrackd", "native"), ("native", "conntrackd")])
def test_the_engine_of_an_applied_profile_can_change(
    orch: Harness, kernel: FakeKernel, engines: tuple[str, str]
) -> None:
    for engine in engines:
        text = RULES.replace("native", engine)
        orch.apply(text)
        assert orch.apply(text).plan.is_empty
        assert kernel.deaf() == []
        (process,) = kernel.running_processes.values()
        assert process[0].name == ("ftp" if engine == "native" else engine)


def test_two_namespaces_share_a_registration_that_rules_queue_for(orch: Harness, kernel: FakeKernel) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
        orch.apply(RULES, name)
    assert len(kernel.registrations) == 1
    assert len(kernel.running_processes) == 2


@pytest.mark.parametrize(("first", "second"), [(RULES, REGISTRATION), (REGISTRATION, RULES)])
def test_two_namespaces_do_not_share_a_registration_in_two_modes(
    orch: Harness, kernel: FakeKernel, first: str, second: str
) -> None:
    for name in ("blue", "red"):
        kernel.add_netns(name)
    orch.apply(first, "blue")
    (what,) = refusal(orch, second, "red")
    assert "ftp-us/ip/tcp is shared with profile ftp in netns blue, which wants it otherwise" in what
    assert "status" in what


def test_a_change_that_attaches_nothing_else_counts_no_rules(orch: Harness) -> None:
    orch.apply(RULES)
    change = orch.diff(RULES.replace("native}", "native, inspect: triggers}")).plan.changes[-1]
    assert (change.subject, change.detail, change.reason) == ("inet orch-ftp", "", "the profile changed")


def test_a_process_is_found_without_ledger_and_rules(orch: Harness, kernel: FakeKernel) -> None:
    orch.apply(RULES)
    orch.system.rules[Backend.NFTABLES].remove(orch.system.host.find_netns(""), "ftp")
    shutil.rmtree(orch.state_dir)
    assert [owner.profile for owner in orch.status().unknown] == ["ftp"]
    orch.teardown()
    assert kernel.running_processes == {}
    assert orch.status().unknown == ()


def other(options: str) -> str:
    return f"profile: other\nfamilies: ip\nhelpers: {{tftp: {{engine: native, {options}}}}}\n"


def test_labels_and_rule_queues_are_of_one_profile_in_a_namespace(orch: Harness, kernel: FakeKernel) -> None:
    kernel.add_netns("blue")
    orch.apply(RULES.replace("engine: native", "engine: native, label: 5, queue: 100"))
    assert refusal(orch, other("label: 5")) == ["label 5 of helper tftp is that of helper ftp of profile ftp here"]
    assert "queue 101 of helper tftp is that of helper ftp of profile ftp here" in refusal(orch, other("queue: 101"))
    orch.apply(other("label: 5, queue: 101"), "blue")
    orch.apply(other("label: 6, queue: 102"))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ftp: {queue: 77}, sane: {engine: conntrackd}", "ftp: {engine: conntrackd, queue: 77}"),
        ("ftp: {queue: 77}", "ftp: {queue: 79}, tftp: {queue: 77}"),
        ("ftp: {queue: 77}, tftp: {queue: 79}", "ftp: {queue: 79}, tftp: {queue: 78}"),
        ("ftp: {queue: 77}", "tftp: {queue: 78}"),
    ],
)
def test_a_queue_can_go_to_another_process_of_the_profile(
    orch: Harness, kernel: FakeKernel, first: str, second: str
) -> None:
    for helpers in (first, second, first):
        text = f"profile: p\nfamilies: ip\nhelpers: {{{helpers}}}\n"
        orch.apply(text)
        assert orch.apply(text).plan.is_empty
    orch.teardown()
    assert kernel.dump_text() == ""


def test_what_holds_a_queue_of_a_new_helper_is_named_by_its_profile(orch: Harness) -> None:
    orch.apply(REGISTRATION.replace("registration}", "registration, queue: 100}"))
    assert refusal(orch, other("queue: 100")) == ["queue 100 is held by profile ftp in netns host"]


def test_the_ledger_remembers_triggers(orch: Harness) -> None:
    text = RULES.replace("native}", "native, inspect: triggers}")
    orch.apply(text)
    assert orch.apply(text).plan.is_empty
    assert orch.status().profiles[0].drift == ()


@pytest.mark.parametrize(
    ("helper", "hint"),
    [
        ("ftp", "install the kernel's modules, or use engine: native"),
        ("sane", "install the kernel's modules, or use engine: conntrackd"),
        ("irc", "install the kernel's modules"),
    ],
)
def test_where_the_kernel_lacks_a_helper_another_engine_is_named_if_there_is_one(
    orch: Harness, helper: str, hint: str
) -> None:
    with pytest.raises(PlanRefusedError) as caught:
        orch.apply(f"profile: p\nfamilies: ip\nhelpers: {{{helper}: {{engine: kernel}}}}\n")
    assert {refused.hint for refused in caught.value.refusals} == {hint}


def test_where_the_name_of_a_kernel_helper_is_taken_another_engine_is_named(orch: Harness, kernel: FakeKernel) -> None:
    kernel.modules_available = {"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()}
    orch.apply("profile: one\nfamilies: ip\nhelpers: {ftp: {engine: conntrackd}}\n")
    with pytest.raises(PlanRefusedError) as caught:
        orch.apply("profile: two\nfamilies: ip\nhelpers: {ftp: {engine: kernel, attach: {ports: 2121}}}\n")
    (refused,) = caught.value.refusals
    assert refused.hint == "tear the profile down that registered it (orch status), or use engine: native"


# -- helpers of one's own ----------------------------------------------------------------------------------------------

OWN_HELPER = """
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves

class Own(Helper):
    serves = (Serves(L4.UDP, (5000,)),)
    policies = (Policy("own", 1, 30),)

    def inspect(self, payload, direction, flow, private):
        return NOTHING
"""


@pytest.fixture
def own_file() -> Iterator[Path]:
    """Where root trusts it, if the tests run as root."""
    with tempfile.TemporaryDirectory(dir="/run" if os.geteuid() == 0 else None) as directory:
        file = Path(directory) / "own.py"
        file.write_text(OWN_HELPER)
        yield file


def sources(kernel: FakeKernel) -> list[str]:
    """What runs, as far as it is somebody's own."""
    return [launch.files["helper-own.py"] for _, launch in kernel.running_processes.values()]


@pytest.mark.parametrize("step", range(2))
def test_an_apply_that_changes_the_file_of_a_helper_is_undone(
    orch: Harness, kernel: FakeKernel, own_file: Path, step: int
) -> None:
    """What ran before runs again, although the file is no longer what it was."""
    text = f"profile: own\nfamilies: ip\nhelpers: {{own: {{use: {own_file}, attach: {{ports: 5000}}}}}}\n"
    orch.apply(text)
    before = kernel.dump_text()
    own_file.write_text(OWN_HELPER + "# changed\n")
    kernel.fail_at(step, errno.ENOMEM)
    with pytest.raises(KernelError):
        orch.apply(text.replace("5000", "5001"))
    assert sources(kernel) == [OWN_HELPER]
    assert kernel.dump_text() == before
    orch.apply(text.replace("5000", "5001"))
    assert sources(kernel) == [OWN_HELPER + "# changed\n"]


def test_a_change_of_the_file_alone_is_a_change(orch: Harness, kernel: FakeKernel, own_file: Path) -> None:
    text = f"profile: own\nfamilies: ip\nhelpers: {{own: {{use: {own_file}}}}}\n"
    orch.apply(text)
    orch.steps.clear()
    own_file.write_text(OWN_HELPER + "# changed\n")
    orch.apply(text + "# read again\n")
    assert orch.steps == ["hand over to a new own"]
    assert sources(kernel) == [OWN_HELPER + "# changed\n"]
