"""Order of steps where rules queue packets: what waits in a queue is answered before rules, process or helper go."""

from __future__ import annotations

import pytest

from orchestrator.errors import OrchError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, L4Proto
from tests.hosts import Harness, both

BOTH = "profile: p\nfamilies: [ip]\nhelpers: {ftp: {}, tftp: {}}\n"
FTP = "profile: p\nfamilies: [ip]\nhelpers: {ftp: {}}\n"
FTP_QUEUES, TFTP_QUEUE = (", ".join(str(number) for number in queue.queues) for queue in both(BOTH)[0].rule_queues)


def test_a_teardown_stops_queueing_then_drains_then_ends_the_processes(orch: Harness) -> None:
    orch.apply(BOTH)
    orch.steps.clear()
    orch.teardown()
    numbers = ", ".join(sorted(f"{FTP_QUEUES}, {TFTP_QUEUE}".split(", "), key=int))
    assert orch.steps == [
        "flush rules inet orch-p",
        f"drain queue {numbers}",
        "remove rules inet orch-p",
        "stop ftp",
        "stop tftp",
        "unregister helper ftp-us/ip/tcp",
        "unregister helper tftp-us/ip/udp",
    ]


def test_a_helper_that_leaves_is_queued_no_more_then_drained_then_ended(orch: Harness) -> None:
    orch.apply(BOTH)
    orch.steps.clear()
    orch.apply(FTP)
    assert orch.steps == [
        "load rules inet orch-p",
        f"drain queue {TFTP_QUEUE}",
        "stop tftp",
        "unregister helper tftp-us/ip/udp",
    ]


def test_rules_of_a_helper_that_is_gone_are_flushed_and_drained_before_they_are_removed(
    orch: Harness, kernel: FakeKernel
) -> None:
    """Where a registration was taken away, its rules must be loaded anew, and their table goes with what waits."""
    orch.apply(FTP)
    orch.steps.clear()
    del kernel.registrations[HelperKey.parse("ftp-us/ip/tcp")]
    orch.apply(FTP)
    assert orch.steps == [
        "register helper ftp-us/ip/tcp",
        "flush rules inet orch-p",
        f"drain queue {FTP_QUEUES}",
        "remove rules inet orch-p",
        "load rules inet orch-p",
    ]


def test_draining_queues_of_ours_is_no_loss_of_others(orch: Harness) -> None:
    orch.apply(FTP)
    orch.teardown()
    assert orch.warnings == []


def test_two_namespaces_that_queue_one_registration_differently_are_refused(orch: Harness, kernel: FakeKernel) -> None:
    """Enabled for the one, the registration would queue the connections of the other too."""
    for netns in ("blue", "red"):
        kernel.add_netns(netns)
    by_registration = FTP.replace("ftp: {}", "ftp: {queueing: registration}")
    for first, second in ((FTP, by_registration), (by_registration, FTP)):
        orch.apply(first, "blue")
        with pytest.raises(OrchError, match=r"shared with profile p in netns blue, which wants it otherwise: .*status"):
            orch.apply(second, "red")
        orch.teardown(netns="blue")


def test_a_process_that_leaves_does_not_disable_the_helpers_of_others(orch: Harness) -> None:
    orch.apply("profile: p\nfamilies: [ip]\nhelpers: {ftp: {}, tftp: {engine: conntrackd}}\n")
    orch.steps.clear()
    orch.apply("profile: p\nfamilies: [ip]\nhelpers: {tftp: {engine: conntrackd}}\n")
    assert not [step for step in orch.steps if "able helper" in step]


def test_without_a_ledger_the_queues_of_the_processes_are_drained(orch: Harness) -> None:
    orch.apply(FTP)
    for file in orch.state_dir.iterdir():
        file.unlink()
    orch.steps.clear()
    orch.teardown("p")
    assert f"drain queue {FTP_QUEUES}" in orch.steps


def test_queues_of_others_are_told(orch: Harness, kernel: FakeKernel) -> None:
    kernel.namespaces[""].foreign_queues = ("inet ips forward",)
    told = "inet ips forward queues packets too: helped connections that it queues lose source NAT"
    assert told in orch.apply(FTP).notes
    orch.teardown()
    kernel.modules_available["nf_conntrack_ftp"] = (("ftp", L4Proto.TCP),)
    kernel.modules_available["nf_nat_ftp"] = ()
    assert told not in orch.apply("profile: p\nhelpers: {ftp: {engine: kernel}}\n").notes
