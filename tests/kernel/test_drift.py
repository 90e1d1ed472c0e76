"""Every kind of drift on the running kernel: named by status, mended by apply and by `orch watch`, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import json
import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab.layout import Kernel
from lab.topology import CLIENT, ROUTER, SERVER_IP, inside, run
from orchestrator.app import boot_id
from orchestrator.drift import Limits, Outcome, mend
from orchestrator.engine import netlink
from orchestrator.engine.nfqueue import encode_config
from orchestrator.errors import KernelError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import HelperKey, L3Proto, L4Proto, Registration
from orchestrator.reports import PlanRefusedError
from orchestrator.status import HelperState
from orchestrator.supervise import inotify
from orchestrator.supervise.inotify import Inotify
from orchestrator.supervise.launcher import LocalProcesses
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch
from tests.kernel.native import kill
from tests.reports import REPORTS
from tests.waiting import until

PROFILE = """
profile: drift
families: [ip]
helpers:
  ftp: {name: ftp, queueing: registration, queue: 500, process: {restart: never}}
  tftp: {queueing: rules, queue: 600}
"""
KEY = HelperKey("ftp", L3Proto.IP, L4Proto.TCP)
TABLE = "inet orch-drift"
FIGURES = REPORTS.setdefault("drift: from the change until it was mended", [])
WITHIN_S = 120


@pytest.fixture(scope="module")
def applied(routed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with clean_orch(tmp_path_factory.mktemp("state")) as harness:
        harness.boot_id = boot_id()  # the ledger is also that of commands
        yield harness


@pytest.fixture
def orch(applied: Harness) -> Harness:
    """As applied, whatever the test before left."""
    applied.apply(PROFILE, ROUTER)
    applied.steps.clear()
    return applied


def local(orch: Harness) -> LocalProcesses:
    assert isinstance(orch.system.processes, LocalProcesses)
    return orch.system.processes


def supervisor(orch: Harness) -> int:
    (pid,) = local(orch).supervisors("drift", find(ROUTER).identity)
    return pid


def process(orch: Harness, name: str) -> int:
    return next(p.pid for p in orch.system.processes.running() if p.name == name)


def registration(orch: Harness) -> Registration:
    return next(r for r in orch.system.registry.dump() if r.key == KEY)


def flush_ruleset(orch: Harness) -> None:
    inside(ROUTER, "nft", "flush", "ruleset")


def empty_table(orch: Harness) -> None:
    inside(ROUTER, "nft", "flush", "table", "inet", "orch-drift")


def edit_table(orch: Harness) -> None:
    inside(ROUTER, "nft", "insert rule inet orch-drift prerouting-mangle150 tcp dport 21 accept")


def delete_registration(orch: Harness) -> None:
    """Before 7.3 only one that no rule names."""
    flush_ruleset(orch)
    orch.system.registry.delete(KEY)


def take_registration_over(orch: Harness) -> None:
    before = registration(orch)
    delete_registration(orch)
    orch.system.registry.create(replace(before, priv_data_len=32, queue_num=9))


def change_registration(orch: Harness) -> None:
    orch.system.registry.update(replace(registration(orch), queue_num=9))


def kill_process(orch: Harness) -> None:
    """Its supervisor was told not to start it again."""
    pid = process(orch, "ftp")
    kill(pid)
    until(lambda: state(orch, "ftp") is HelperState.FATAL, "its supervisor has given it up")


def state(orch: Harness, name: str) -> HelperState:
    return next(h.state for p in orch.status().profiles for h in p.helpers if h.name == name)


def kill_supervisor(orch: Harness) -> None:
    kill(supervisor(orch))


def kill_all(orch: Harness) -> None:
    kill(supervisor(orch), process(orch, "ftp"), process(orch, "tftp"))


KINDS: dict[str, tuple[Callable[[Harness], None], str, list[str]]] = {
    "ruleset flushed": (flush_ruleset, f"{TABLE}: missing: 4 rules", [f"load rules {TABLE}"]),
    "table emptied": (empty_table, f"{TABLE}: somebody emptied them", [f"load rules {TABLE}"]),
    "table edited": (edit_table, f"{TABLE}: somebody changed them", [f"load rules {TABLE}"]),
    "registration changed": (change_registration, f"{KEY}: queue 9 -> 500", [f"update helper {KEY}"]),
    "registration deleted": (
        delete_registration,
        f"{KEY}: missing",
        [f"register helper {KEY}", f"enable helper {KEY}", f"load rules {TABLE}"],
    ),
    "registration taken over": (
        take_registration_over,
        f"{KEY}: queue 9 -> 500; priv_data_len 32 -> 21",
        [
            *(f"disable helper {KEY}", f"unregister helper {KEY}", f"register helper {KEY}"),
            *(f"enable helper {KEY}", f"load rules {TABLE}"),
        ],
    ),
    "process killed": (
        kill_process,
        "ftp: missing: queue 500",
        ["start ftp", f"enable helper {KEY}"],
    ),
    "supervisor killed": (kill_supervisor, "tftp: its supervisor is gone", ["watch ftp", "watch tftp"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_named_and_mended_and_nothing_else(orch: Harness, kind: str) -> None:
    act, says, steps = KINDS[kind]
    act(orch)
    drift = orch.status().profiles[0].drift
    assert any(line.startswith(says) for line in drift), drift
    orch.apply(PROFILE, ROUTER)
    assert orch.steps == steps
    status = orch.status()
    assert (status.profiles[0].drift, status.is_right) == ((), True)


def test_a_kernel_module_of_the_same_name_is_named(orch: Harness) -> None:
    delete_registration(orch)
    run("modprobe", "nf_conntrack_ftp")
    try:
        assert f"cannot register helper {KEY}: the in-kernel helper of that name is loaded" in drift_of(orch)
        with pytest.raises(PlanRefusedError, match="the in-kernel helper of that name is loaded"):
            orch.apply(PROFILE, ROUTER)
    finally:
        run("modprobe", "-r", "nf_conntrack_ftp")
    orch.apply(PROFILE, ROUTER)
    assert not drift_of(orch)


def drift_of(orch: Harness) -> tuple[str, ...]:
    return orch.status().profiles[0].drift


def test_a_queue_that_somebody_else_has_is_named(orch: Harness) -> None:
    kill_process(orch)
    with queue_held(500):
        assert any(line.startswith("queue 500 is held by") for line in drift_of(orch))
        with pytest.raises(PlanRefusedError, match="queue 500 is held by"):
            orch.apply(PROFILE, ROUTER)
    orch.apply(PROFILE, ROUTER)
    assert not drift_of(orch)


SHARING = """
profile: sharing
families: [ip]
helpers:
  ftp: {name: ftp, queueing: registration, queue: 500, attach: [{path: outgoing}], process: {restart: never}}
"""


def inspected(orch: Harness) -> int:
    """Packets that the helper process of the client has seen."""
    (helper,) = orch.status("sharing").profiles[0].helpers
    assert helper.counters is not None
    return helper.counters.counters.packets


def log_in() -> None:
    with entered(find(CLIENT)), ftplib.FTP(SERVER_IP, timeout=WITHIN_S) as client:
        client.login()


def test_rules_elsewhere_that_hold_on_to_a_registration_that_was_made_again(orch: Harness) -> None:
    """Since 7.3 a registration can be deleted under the rules that name it; before, the kernel refuses."""
    is_let_go = _can_delete_what_rules_name(orch)
    assert is_let_go == (os.environ["LAB_KERNEL"] == Kernel.BACKPORTS)
    if not is_let_go:
        return
    orch.apply(PROFILE, ROUTER)
    orch.apply(SHARING, CLIENT)
    try:
        log_in()
        until(lambda: inspected(orch) > 0, "the session is inspected")
        orch.system.registry.delete(KEY)
        orch.apply(PROFILE, ROUTER)
        drift = orch.status("sharing").profiles[0].drift
        assert drift == ("inet orch-sharing: they would go on attaching a helper that is gone",)
        before = inspected(orch)
        log_in()
        assert inspected(orch) == before
        report = mend(orch.app(), orch.status("sharing").profiles[0].owner, Limits())
        assert (report.outcome, len(report.changes)) == (Outcome.MENDED, 1)
        log_in()
        until(lambda: inspected(orch) > before, "the session is inspected again")
        assert orch.status().is_right
    finally:
        orch.teardown("sharing", CLIENT)


def _can_delete_what_rules_name(orch: Harness) -> bool:
    try:
        orch.system.registry.delete(KEY)
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@contextlib.contextmanager
def queue_held(number: int) -> Iterator[None]:
    with entered(find(ROUTER)):
        holder = netlink.open_queue_socket(1 << 16)
    with contextlib.closing(holder):
        holder.bind((0, 0))
        holder.send(encode_config(number, is_fail_open=False, max_len=128))
        assert holder.recv(4096)[16:20] == bytes(4), "the queue could not be bound"
        yield


class Lines:
    """What a command prints, line by line."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        self._stdout = child.stdout
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stdout:
            self._lines.put(line)

    def wait_for(self, outcome: str, subject: str = "") -> None:
        """Until a line tells of this outcome, for something that had drifted if it is named."""
        while True:
            line = json.loads(self._lines.get(timeout=WITHIN_S))
            subjects = [change["subject"] for change in line.get("changes", ())]
            if line.get("outcome") == outcome and (not subject or subject in subjects):
                return


@contextlib.contextmanager
def watching(state: Path, *argv: str) -> Iterator[Lines]:
    """`orch watch` from when it has looked at everything once; it ends in peace."""
    command = [".venv/bin/python", "-m", "orchestrator", "watch", "drift", "--json", "-v", "--state-dir", str(state)]
    with subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, text=True) as child:
        try:
            lines = Lines(child)
            lines.wait_for("right")
            yield lines
            child.terminate()
            assert child.wait(WITHIN_S) == 0
        finally:
            child.kill()


def test_watch_mends_what_it_is_told_of_and_what_it_has_to_look_for(orch: Harness) -> None:
    with watching(orch.state_dir, "--interval", "20") as lines:
        for act, subject in ((flush_ruleset, TABLE), (kill_supervisor, "tftp"), (kill_all, "ftp")):
            before = time.monotonic()
            act(orch)
            lines.wait_for("mended", subject)
            FIGURES.append(f"{act.__name__}: {time.monotonic() - before:.2f} s")
        change_registration(orch)
        lines.wait_for("mended", str(KEY))
    until(lambda: orch.status().is_right, "all is right again")


def wait_for_line(log: Path, words: str) -> None:
    """Without looking again and again: a guest has one CPU, which others need."""
    files = Inotify()
    with contextlib.closing(files):
        files.add(str(log.parent), inotify.MODIFIED)
        while words not in log.read_text():
            assert select.select([files], [], [], WITHIN_S)[0], log.read_text()
            files.read()


def test_a_supervisor_that_reconciles(orch: Harness) -> None:
    pids = {name: process(orch, name) for name in ("ftp", "tftp")}
    orch.apply(f"{PROFILE}reconcile: true\n", ROUTER)
    assert orch.steps == ["have drift mended"]
    assert {name: process(orch, name) for name in pids} == pids
    before = time.monotonic()
    flush_ruleset(orch)
    log = local(orch).runtime_dir("drift", find(ROUTER)) / "supervisor.log"
    wait_for_line(log, f"mended: {TABLE} missing")
    FIGURES.append(f"ruleset flushed, by the supervisor: {time.monotonic() - before:.2f} s")
    until(lambda: orch.status().is_right, "all is right again")
    orch.steps.clear()
    orch.apply(PROFILE, ROUTER)
    assert orch.steps == ["leave drift alone"]
