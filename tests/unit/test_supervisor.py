"""A supervisor at work on processes that do nothing, in a namespace of its own: deaths, stops, and its own death.

What serves queues is in tests/kernel/test_supervision.py.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import HelperProcessError, PreflightError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Netns, ProcessSpec, Restart
from orchestrator.ports import Launch, Lifetimes, ProcessSeen, ProcessState, Supervised
from orchestrator.supervise import control, traces
from orchestrator.supervise.launcher import LocalProcesses, supervisor_mark
from orchestrator.supervise.logs import LOG_BYTES
from orchestrator.supervise.order import Order
from orchestrator.supervise.supervisor import Supervisor
from tests.processes import NAME, PROFILE, local_processes, wait_for

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)"),
    pytest.mark.slow,  # real processes, which are waited for
]

ROOT = str(Path(__file__).parents[2])
QUEUE = 20000
SLEEP = ("sleep", "1000")
SO_SNDBUFFORCE = 32
HOLDER = f"""
import sys, time
sys.path.append(sys.argv[1])
from orchestrator.engine import netlink
channel = netlink.open_control_socket()
for wanted in (netlink.attribute(1, bytes((1, 0, 0, 0))), netlink.attribute(2, bytes((0, 0, 255, 255, 2)))):
    channel.send(netlink.message(0x302, wanted, flags=5, resource={QUEUE}))  # bind, and copy whole packets
    channel.recv(4096)
time.sleep(1000)
"""

PAGED = """
import os, sys, time
sys.path.append(sys.argv[1])
from orchestrator.engine.counters import Page, State
page = Page(sys.argv[2])
page.state = State.READY
page.beat()
time.sleep(1000)
"""


UNHEARD = """
import os, sys
sys.path.append(sys.argv[1])
from orchestrator.supervise import control, traces
from orchestrator.supervise.supervisor import Supervisor
supervisor = Supervisor(sys.argv[2], sys.argv[3], control.listen(sys.argv[2]))
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
supervisor.run()
"""


FAILING = """
import os, sys
sys.path.append(sys.argv[1])
from orchestrator.supervise import control, traces
from orchestrator.supervise.supervisor import Supervisor

class Failing(Supervisor):
    def _take(self, request, answer):
        if request["do"] == "adopt" and os.path.exists("fail"):
            os.unlink("fail")
            fail(0)
        super()._take(request, answer)

def fail(number):
    raise RuntimeError("a mistake")

supervisor = Failing(sys.argv[2], sys.argv[3], control.inherited())
supervisor.on_signal = fail
supervisor.run()
"""


@pytest.fixture
def netns() -> Iterator[Netns]:
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield find(name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def processes(tmp_path: Path, netns: Netns) -> Iterator[LocalProcesses]:
    with local_processes(tmp_path) as processes:
        yield processes
        for process in processes.running():
            processes.stop(process)
        processes.cleanup(PROFILE, netns)


def launch(
    netns: Netns,
    argv: tuple[str, ...] = SLEEP,
    *,
    restart: Restart = Restart.ON_FAILURE,
    queues: tuple[int, ...] = (),
    ready_within_s: int = 20,
) -> Launch:
    spec = ProcessSpec(NAME, argv, (), queues, (), ready_within_s=ready_within_s, restart=restart, restart_limit=3)
    return Launch(PROFILE, netns, spec, {}, "digest")


def seen(processes: LocalProcesses, netns: Netns) -> Supervised:
    return next(iter(processes.supervised(PROFILE, netns)))


def the_one(processes: LocalProcesses) -> ProcessSeen:
    """The only process. At the moment in which confine.py becomes the program it has no environment to be known by."""
    found: list[ProcessSeen] = []

    def is_alone() -> bool:
        found[:] = processes.running()
        return len(found) == 1

    wait_for(processes, is_alone)
    return found[0]


def wait_until(processes: LocalProcesses, netns: Netns, holds: Callable[[Supervised], bool]) -> Supervised:
    wait_for(processes, lambda: any(map(holds, processes.supervised(PROFILE, netns))))
    return seen(processes, netns)


def supervisor(processes: LocalProcesses, netns: Netns) -> int:
    (pid,) = processes.supervisors(PROFILE, netns.identity)
    return pid


def restarted(times: int) -> Callable[[Supervised], bool]:
    return lambda one: one.state is ProcessState.RUNNING and one.restarts == times


def test_a_dead_one_is_replaced_and_why_is_told(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    assert seen(processes, netns).state is ProcessState.RUNNING
    os.kill(pid, signal.SIGKILL)
    after = wait_until(processes, netns, restarted(1))
    assert after.pid != pid
    assert after.reason == "killed by SIGKILL"
    process = the_one(processes)
    assert (process.pid, process.watched) == (after.pid, True)
    assert f"pid {pid} killed by SIGKILL" in processes.last_words(PROFILE, netns, NAME)
    os.kill(after.pid, signal.SIGTERM)
    assert wait_until(processes, netns, restarted(2)).reason == "killed by SIGTERM"


def test_one_that_is_not_to_be_restarted_is_not(processes: LocalProcesses, netns: Netns) -> None:
    os.kill(processes.start(launch(netns, restart=Restart.NEVER)), signal.SIGKILL)
    wait_until(processes, netns, lambda one: one.state is ProcessState.FATAL)
    assert not processes.running()
    processes.start(launch(netns))
    assert wait_until(processes, netns, restarted(0)).pid == the_one(processes).pid


def test_one_that_keeps_dying_is_given_up_with_the_reason(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns, ("sh", "-c", "echo no more; exit 3")))
    fatal = wait_until(processes, netns, lambda one: one.state is ProcessState.FATAL)
    assert fatal.reason == "restarted 3 times in 600 s, the last time: exited with 3: no more"
    assert fatal.restarts == 3
    assert not processes.running()
    processes.start(launch(netns))
    assert wait_until(processes, netns, restarted(0)).reason == ""


def test_a_stopped_one_is_replaced_within_five_seconds(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    after = wait_until(processes, netns, lambda one: one.reason != "")
    assert "stopped by a signal" in after.reason
    assert time.monotonic() - started >= 2, "one that goes on soon is left alone"
    wait_until(processes, netns, restarted(1))


def test_its_processes_go_on_without_it_and_the_next_one_adopts_them(processes: LocalProcesses, netns: Netns) -> None:
    pid = processes.start(launch(netns))
    os.kill(supervisor(processes, netns), signal.SIGKILL)
    wait_for(processes, lambda: not processes.supervised(PROFILE, netns))
    process = the_one(processes)
    assert (process.pid, process.watched) == (pid, False)
    processes.watch(launch(netns), process)
    process = the_one(processes)
    assert (process.pid, process.watched) == (pid, True)
    os.kill(pid, signal.SIGSTOP)
    assert "stopped by a signal" in wait_until(processes, netns, restarted(1)).reason
    os.kill(the_one(processes).pid, signal.SIGKILL)
    assert wait_until(processes, netns, restarted(2)).reason == "killed by SIGKILL"


def test_one_that_died_with_its_supervisor_is_taken_up_by_the_next(processes: LocalProcesses, netns: Netns) -> None:
    process_pid, supervisor_pid = processes.start(launch(netns)), supervisor(processes, netns)
    os.kill(supervisor_pid, signal.SIGSTOP)
    os.kill(process_pid, signal.SIGKILL)
    os.kill(supervisor_pid, signal.SIGKILL)
    processes._start_supervisor(PROFILE, netns)
    assert wait_until(processes, netns, restarted(1)).reason == "ended while nobody looked after it"


def test_one_that_ends_before_its_supervisor_hears_of_children_is_not_forgotten(
    processes: LocalProcesses, netns: Netns
) -> None:
    """A supervisor restarts what its predecessor left dead before it listens to signals."""
    directory = processes._prepare(launch(netns, ("false",), queues=(7,)))
    dead = {"state": "running", "pid": 0, "born": 0, "restarts": 0, "since": 0.0, "reason": ""}
    (directory / "supervisor.json").write_text(json.dumps({"pid": 0, "processes": {NAME: dead}}))
    environment = {"ORCH_SUPERVISOR": supervisor_mark(processes.state_dir, PROFILE)}
    argv = [sys.executable, "-I", "-S", "-c", UNHEARD, ROOT, str(directory), str(processes.state_dir)]
    with entered(netns), subprocess.Popen(argv, env=environment) as successor:
        try:
            wait_until(processes, netns, lambda one: one.state is ProcessState.FATAL)
        finally:
            successor.kill()


def test_after_a_mistake_of_its_own_it_begins_anew_and_once_only(processes: LocalProcesses, netns: Netns) -> None:
    """Whoever asked for what it failed over is answered all the same."""
    directory = processes._prepare(launch(netns))
    environment = {"ORCH_SUPERVISOR": supervisor_mark(processes.state_dir, PROFILE)}
    argv = [sys.executable, "-I", "-S", "-c", FAILING, ROOT, str(directory), str(processes.state_dir)]
    with control.listen(str(directory)) as listener, entered(netns):
        failing = subprocess.Popen(argv, env=environment, stdin=listener.fileno(), stderr=subprocess.PIPE, text=True)
    try:
        pid = processes.start(launch(netns))
        (directory / "fail").touch()
        processes.watch(launch(netns), the_one(processes))
        assert not (directory / "fail").exists()
        assert seen(processes, netns).pid == pid
        os.kill(pid, signal.SIGKILL)
        second = wait_until(processes, netns, restarted(1)).pid
        assert supervisor(processes, netns) == failing.pid
        failing.send_signal(signal.SIGHUP)
        said = failing.communicate(timeout=30)[1]
        assert failing.returncode == 1
        assert said.count("begins anew\n") == 1
        assert said.count("RuntimeError: a mistake\n") == 3, "logged twice, and at last it ends by it"
    finally:
        failing.kill()
        failing.communicate()
    process = the_one(processes)
    assert (process.pid, process.watched) == (second, False)


def limited(pid: int, files: int | None) -> None:
    """Let a process open no file with this number or a higher one; None ends that."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard if files is None else files, hard))


def test_one_that_can_open_nothing_more_answers_later(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    (pid,) = processes.supervisors(PROFILE, netns.identity)
    used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    limited(pid, min(set(range(len(used) + 1)) - used))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(str(processes.runtime_dir(PROFILE, netns) / control.SOCKET))
        channel.send(control.encode({"do": "settle", "name": NAME}))
        before = slept(pid)
        wait_for(processes, lambda: slept(pid) > before + 1)  # it looks again now and then, and does nothing else
        limited(pid, None)
        channel.settimeout(30)
        assert (control.decode(channel.recv(4096)), control.decode(channel.recv(4096))) == (control.TAKEN, {})
    assert processes.supervisors(PROFILE, netns.identity) == [pid]
    assert "Traceback" not in (processes.runtime_dir(PROFILE, netns) / "supervisor.log").read_text()


def slept(pid: int) -> int:
    """How often a process gave up the CPU to wait."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_what_cannot_be_adopted_for_want_of_descriptors_is_adopted_later(
    processes: LocalProcesses, netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = processes.start(launch(netns))
    (predecessor,) = processes.supervisors(PROFILE, netns.identity)
    os.kill(predecessor, signal.SIGKILL)
    wait_for(processes, lambda: not processes.supervisors(PROFILE, netns.identity))
    directory, open_ = str(processes.runtime_dir(PROFILE, netns)), os.pidfd_open
    refusals = [OSError(errno.EMFILE, "Too many open files")] * 2

    def pidfd_open(asked: int) -> int:
        if refusals:
            raise refusals.pop()
        return open_(asked)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    monkeypatch.chdir(directory)
    with entered(netns), control.listen(directory) as listener:
        supervisor = Supervisor(directory, str(tmp_path), listener)
        assert not supervisor.processes
        supervisor._end_if_idle()  # as after each request
        assert NAME in json.loads(Path("supervisor.json").read_text())["processes"], "who comes next has to know"
        while not (supervisor.processes or supervisor._is_over):
            supervisor._turn()
    assert (refusals, supervisor.processes[NAME].pid) == ([], pid)


def test_one_that_is_started_when_nothing_more_can_be_opened_is_looked_after(
    processes: LocalProcesses, netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal for pid 0 would be one for the supervisor."""
    directory = str(processes._prepare(launch(netns)))
    answers: list[Mapping[str, object]] = []

    def born(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(traces, "born", born)
    monkeypatch.chdir(directory)
    with entered(netns), control.listen(directory) as listener:
        supervisor = Supervisor(directory, str(tmp_path), listener)
        supervisor._processes.begin(Order.read(NAME), answers.append)
        pid = supervisor.processes[NAME].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED)


@pytest.mark.parametrize("is_before", [True, False])
def test_one_that_ends_in_the_moment_in_which_it_is_taken_up_is_started_again(
    processes: LocalProcesses, netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_before: bool
) -> None:
    """Before it, a supervisor may have been killed that started what ended at once: it was not seen alive."""
    pid = processes.start(launch(netns))
    (predecessor,) = processes.supervisors(PROFILE, netns.identity)
    os.kill(predecessor, signal.SIGKILL)
    wait_for(processes, lambda: not processes.supervisors(PROFILE, netns.identity))
    directory, open_ = processes.runtime_dir(PROFILE, netns), os.pidfd_open
    file = directory / "supervisor.json"

    def end() -> None:
        os.kill(pid, signal.SIGKILL)
        wait_for(processes, lambda: not traces.born(pid))

    def pidfd_open(asked: int) -> int:
        if asked == pid:
            if traces.born(pid):
                end()
            raise ProcessLookupError(errno.ESRCH, "No such process")
        return open_(asked)

    if is_before:
        end()
        report = json.loads(file.read_text())
        report["processes"][NAME]["born"] = 0
        file.write_text(json.dumps(report))
    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    monkeypatch.chdir(directory)
    with entered(netns), control.listen(str(directory)) as listener:
        supervisor = Supervisor(str(directory), str(tmp_path), listener)
        again = supervisor.processes[NAME].pid
        assert again not in (0, pid)
        os.kill(again, signal.SIGKILL)
        os.waitid(os.P_PID, again, os.WEXITED)


def test_who_can_open_nothing_more_takes_no_supervisor_for_silent(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    (process,) = processes.running()
    supervisors = processes.supervisors(PROFILE, netns.identity)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    free = os.dup(0)
    os.close(free)
    for files in (free, free + 1):
        limited(0, files)
        try:
            with pytest.raises(OSError, match="Too many open files"):
                processes.stop(process)
        finally:
            limited(0, before)
    assert processes.supervisors(PROFILE, netns.identity) == supervisors
    assert [one.pid for one in processes.running()] == [process.pid]


def test_of_two_services_at_once_the_second_is_refused(processes: LocalProcesses, netns: Netns) -> None:
    """From the moment in which it has the socket a process counts as the supervisor that it will be."""
    pid = processes.start(launch(netns))
    directory, listener = processes.take_over(PROFILE, netns)
    with listener:
        assert not processes.supervisors(PROFILE, netns.identity)
        assert seen(processes, netns).pid == pid
        with pytest.raises(PreflightError, match=f"a service already: pid {os.getpid()}"):
            processes.take_over(PROFILE, netns)
    report = json.loads((directory / "supervisor.json").read_text())
    (directory / "supervisor.json").write_text(json.dumps({**report, "claimed_by": 1}))
    processes.take_over(PROFILE, netns)[1].close()  # it has ended, and its pid is another's
    (directory / "supervisor.json").write_text(json.dumps({**report, "claimed_by": 1}))
    processes.watch(launch(netns), the_one(processes))
    assert seen(processes, netns).pid == pid


def test_what_nobody_waits_for_any_more_is_not_done(processes: LocalProcesses, netns: Netns) -> None:
    """Who asked has taken back what it did, and holds no lock any more."""
    directory = processes._prepare(launch(netns))
    processes._start_supervisor(PROFILE, netns)
    with control_channel(directory):  # while somebody is connected it does not end
        pid = supervisor(processes, netns)
        os.kill(pid, signal.SIGSTOP)
        with control_channel(directory) as channel:
            channel.send(control.encode({"do": "start", "name": NAME}))
        os.kill(pid, signal.SIGCONT)
        request = {"do": "stop", "name": "none"}
        assert control.ask(str(directory), request, taken_within_s=30, done_within_s=30) == {}
        assert not processes.running()


def test_one_that_was_started_in_the_last_moment_of_its_supervisor_is_adopted(
    processes: LocalProcesses, netns: Netns
) -> None:
    """Nobody wrote down that it had been started; a second one could not have its queues."""
    pid = processes.start(launch(netns))
    os.kill(supervisor(processes, netns), signal.SIGKILL)
    wait_for(processes, lambda: not processes.supervised(PROFILE, netns))
    file = processes.runtime_dir(PROFILE, netns) / "supervisor.json"
    report = json.loads(file.read_text())
    report["processes"][NAME].update(state="backoff", pid=0, born=0)
    file.write_text(json.dumps(report))
    processes._start_supervisor(PROFILE, netns)
    assert wait_until(processes, netns, restarted(1)).pid == pid
    assert the_one(processes).pid == pid


def test_of_two_the_one_that_is_to_be_adopted_stays(processes: LocalProcesses, netns: Netns) -> None:
    """No time of the other one comes any more, and a request for one that is gone harms nothing."""
    pid = processes.start(launch(netns))
    order = Order(**json.loads((processes.runtime_dir(PROFILE, netns) / f"{NAME}.order").read_bytes()))
    with entered(netns), subprocess.Popen(["sleep", "1000"], env=order.env) as other:
        try:
            (twin,) = (process for process in processes.running() if process.pid == other.pid)
            processes.watch(launch(netns), twin)
            process = the_one(processes)
            assert (process.pid, process.watched) == (other.pid, True)
            assert not Path(f"/proc/{pid}").exists()
            with pytest.raises(HelperProcessError, match="cannot look after"):
                processes.watch(launch(netns), replace(twin, pid=pid))
        finally:
            other.kill()


def test_one_that_does_not_answer_is_replaced(processes: LocalProcesses, netns: Netns) -> None:
    pid, old = processes.start(launch(netns)), supervisor(processes, netns)
    os.kill(old, signal.SIGSTOP)
    wait_for(processes, lambda: not the_one(processes).watched)
    process = the_one(processes)
    processes.watch(launch(netns), process)
    assert supervisor(processes, netns) != old
    process = the_one(processes)
    assert (process.pid, process.watched) == (pid, True)


def test_a_stop_is_one_even_if_its_supervisor_is_stopped(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    os.kill(supervisor(processes, netns), signal.SIGSTOP)
    processes.stop(the_one(processes))
    assert not processes.running()


def test_what_has_the_pid_of_one_that_has_ended_is_let_be(processes: LocalProcesses, netns: Netns) -> None:
    """Between looking and stopping somebody may be asked, for as long as they like."""
    processes.start(launch(netns))
    process = the_one(processes)
    with subprocess.Popen(SLEEP) as other:
        try:
            processes.stop(replace(process, pid=other.pid))
            assert other.poll() is None
        finally:
            other.kill()
    assert not processes.running()


def test_it_ends_with_its_last_process(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    pidfd = os.pidfd_open(supervisor(processes, netns))
    processes.stop(the_one(processes))
    assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED) is not None
    os.close(pidfd)
    assert not processes.supervised(PROFILE, netns)


def test_what_waits_for_its_restart_is_stopped_too(processes: LocalProcesses, netns: Netns) -> None:
    """And it is told, as there is no process to be found."""
    processes.start(launch(netns))
    os.kill(the_one(processes).pid, signal.SIGKILL)
    os.kill(wait_until(processes, netns, restarted(1)).pid, signal.SIGKILL)
    wait_for(processes, lambda: any(not process.pid for process in processes.running()))
    waiting = next(process for process in processes.running() if not process.pid)
    assert (waiting.digest, waiting.watched, waiting.place) == ("digest", True, "waits for its restart")
    processes.stop(waiting)
    assert not processes.running()


def test_a_long_log_is_cut(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    log = processes.runtime_dir(PROFILE, netns) / f"{NAME}.log"
    with log.open("a") as file:
        file.write("x" * LOG_BYTES + "\nlast\n")
    wait_for(processes, lambda: log.stat().st_size == 0)
    assert Path(f"{log}.old").read_text().endswith("\nlast\n")


def test_it_costs_next_to_nothing_while_nothing_happens(processes: LocalProcesses, netns: Netns) -> None:
    """A native helper has a page: nobody looks at it before it is touched."""
    directory = processes.runtime_dir(PROFILE, netns)
    directory.mkdir(parents=True)
    order = Order(
        name=NAME,
        argv=[sys.executable, "-I", "-S", "-c", PAGED, ROOT, f"{NAME}.stats"],
        env={},
        queues=[],
        has_page=True,
        keys=[],
        disable=[],
        keep_disabled=[],
        enable={},
        is_restarted=True,
        restart_limit=3,
        restart_window_s=600,
        ready_within_s=30,
    )
    (directory / f"{NAME}.order").write_bytes(order.encode())
    processes._start_supervisor(PROFILE, netns)
    request = {"do": "start", "name": NAME}
    assert control.ask(str(directory), request, taken_within_s=30, done_within_s=30)["pid"]
    pid = supervisor(processes, netns)
    status = Path(f"/proc/{pid}/status")

    def value(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    def sleeps() -> bool:
        before = value("voluntary_ctxt_switches")
        waited = time.monotonic() + 3
        wait_for(processes, lambda: time.monotonic() > waited)
        return value("voluntary_ctxt_switches") == before

    wait_for(processes, sleeps)  # after the first looks; whoever names a namespace on this host wakes it, too
    before = value("voluntary_ctxt_switches")
    assert value("VmRSS") < 25_000
    with (directory / f"{NAME}.stats").open("r+b", buffering=0) as page:
        os.pwrite(page.fileno(), b"\0", 4095)
    wait_for(processes, lambda: value("voluntary_ctxt_switches") > before)


def test_one_that_never_becomes_ready_is_ended(processes: LocalProcesses, netns: Netns) -> None:
    with pytest.raises(HelperProcessError, match="not ready within 1 s"):
        processes.start(launch(netns, queues=(7,), ready_within_s=1))
    assert not processes.running()
    assert "not ready within 1 s" in processes.last_words(PROFILE, netns, NAME)


def test_one_that_answers_no_packet_is_replaced_within_five_seconds(processes: LocalProcesses, netns: Netns) -> None:
    rule = f"-I OUTPUT -p udp --dport 6969 -j NFQUEUE --queue-num {QUEUE}"
    for command in ("ip link set lo up", f"iptables-legacy {rule}"):
        subprocess.run(["ip", "netns", "exec", netns.label, *command.split()], check=True)
    processes.start(launch(netns, ("python3", "-I", "-S", "-c", HOLDER, ROOT), queues=(QUEUE,)))
    idle = time.monotonic() + 5
    wait_for(processes, lambda: time.monotonic() > idle)
    assert seen(processes, netns).reason == "", "nothing waits"
    with entered(netns):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sender.sendto(b"x", ("127.0.0.1", 6969))
    after = wait_until(processes, netns, restarted(1))
    assert after.reason == "hung: packets wait, and it answers none"


def test_one_that_hangs_while_more_packets_come_than_fit_is_replaced(processes: LocalProcesses, netns: Netns) -> None:
    """The kernel counts those that its socket has no room for as seen, too."""
    rule = f"-I OUTPUT -p udp --dport 6969 -j NFQUEUE --queue-num {QUEUE}"
    for command in ("ip link set lo up", f"iptables-legacy {rule}"):
        subprocess.run(["ip", "netns", "exec", netns.label, *command.split()], check=True)
    processes.start(launch(netns, ("python3", "-I", "-S", "-c", HOLDER, ROOT), queues=(QUEUE,)))
    with entered(netns):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 23)  # what waits is in its buffer, too

    def is_found_under_load() -> bool:
        for _ in range(100):
            with suppress(OSError):  # that it was dropped is told
                sender.sendto(bytes(1000), ("127.0.0.1", 6969))
        return seen(processes, netns).reason != ""

    with sender:
        wait_for(processes, is_found_under_load)
    assert seen(processes, netns).reason == "hung: packets wait, and it answers none"


def test_what_it_counts_is_read_while_it_is_there(processes: LocalProcesses, netns: Netns) -> None:
    processes.start(launch(netns))
    file = processes.runtime_dir(PROFILE, netns) / "supervisor.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "lifetimes": {"ftp-us": {"made": 3, "used": 2}}}))
    assert processes.lifetimes(PROFILE, netns) == {"ftp-us": Lifetimes(made=3, used=2)}
    os.kill(supervisor(processes, netns), signal.SIGKILL)
    wait_for(processes, lambda: not processes.lifetimes(PROFILE, netns))


def control_channel(directory: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with control.addressed(str(directory)) as address:
        channel.connect(address)
    return channel


def test_who_asks_again_while_the_one_before_is_waited_for_gets_the_only_one(
    processes: LocalProcesses, netns: Netns
) -> None:
    """As an orch does that follows one which was killed while it waited."""
    pid = processes.start(launch(netns))
    request = control.encode({"do": "start", "name": NAME})
    directory = processes.runtime_dir(PROFILE, netns)
    with control_channel(directory) as first, control_channel(directory) as second:
        os.kill(pid, signal.SIGSTOP)  # until it is killed, it does not end
        answers = []
        for channel in (first, second):
            channel.settimeout(30)
            channel.send(request)
            assert control.decode(channel.recv(1000)) == control.TAKEN
        for channel in (first, second):
            answers.append(control.decode(channel.recv(1000)))
    assert answers[1] == {"pid": the_one(processes).pid}
    assert the_one(processes).watched


@pytest.mark.parametrize("request_", [b"{}", b"[]", b"nonsense", b'{"do": "start", "name": "none"}', b""])
def test_a_request_that_is_none_harms_nothing(processes: LocalProcesses, netns: Netns, request_: bytes) -> None:
    processes.start(launch(netns))
    with control_channel(processes.runtime_dir(PROFILE, netns)) as channel:
        channel.send(request_)
        channel.settimeout(30)
        channel.recv(1000)
    assert the_one(processes).watched
