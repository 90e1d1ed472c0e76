"""A supervisor lets a process take over from another, natively: most processes serve nothing, and say when they would.

What hands over queues is in test_handover.py; both together are at the end here, and in tests/kernel/test_zero_gap.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine.names import NEXT, NOT_HANDED_OVER, handover_socket
from orchestrator.errors import HelperProcessError, NoHandoverError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import HELPER_PROGRAM, Netns, ProcessSpec
from orchestrator.ports import Launch, ProcessState, Supervised
from orchestrator.supervise import control, deafness, lifecycle, order
from orchestrator.supervise.launcher import LocalProcesses
from orchestrator.supervise.reactor import Reactor, Timer
from orchestrator.supervise.succession import Succession
from orchestrator.supervise.supervisor import Supervisor
from orchestrator.supervise.traces import is_stopped
from tests import processes as native
from tests.processes import PROFILE, local_processes, wait_for

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)"),
    pytest.mark.slow,  # real processes, which are waited for
]

WAIT_S = 30.0
ROOT = str(Path(__file__).parents[2])
NAME = "one"
QUEUE = 20000
DOCUMENT = "helper-one.toml"

# Says that it is ready; told of a successor's document, once it finds the file `go`, and then it takes over: the first
# ends as soon as it finds the file `taken`.
PROGRAM = f"""
import os, sys, time
sys.path.append({ROOT!r})
from orchestrator.engine.counters import Page, State
def wait(name):
    while not os.path.exists(name):
        time.sleep(0.01)
is_next = sys.argv[-1].endswith({NEXT!r})
if is_next:
    wait("go")
page = Page("{NAME}.stats")
page.state = State.READY
page.beat()
if is_next:
    open("taken", "w").close()
    time.sleep(1000)
wait("taken")
"""

# After the import of orchestrator, and before it says that it is ready: binds a queue, and copies whole packets.
HOLD = f"""
from orchestrator.engine import netlink
channel = netlink.open_control_socket()
for wanted in (netlink.attribute(1, bytes((1, 0, 0, 0))), netlink.attribute(2, bytes((0, 0, 255, 255, 2)))):
    channel.send(netlink.message(0x302, wanted, flags=5, resource={QUEUE}))
    channel.recv(4096)
"""


class Place:
    """A profile with one process, which runs, and documents for its successor."""

    def __init__(self, processes: LocalProcesses, netns: Netns) -> None:
        self.processes = processes
        self.netns = netns
        keeper = ProcessSpec("keeper", ("sleep", "1000"), (), (), ())
        processes.start(Launch(PROFILE, netns, keeper, {}, "digest"))  # which needs a supervisor
        self.directory = processes.runtime_dir(PROFILE, netns)
        self.write("first", "")
        self.first = int(self.ask("start")["pid"])
        self.write("second", NEXT)

    def write(
        self,
        digest: str,
        suffix: str,
        *,
        program: str = PROGRAM,
        ready_within_s: int = 20,
        queues: tuple[int, ...] = (),
    ) -> None:
        spec = ProcessSpec(NAME, (HELPER_PROGRAM, DOCUMENT), (DOCUMENT,), queues, (), ready_within_s=ready_within_s)
        made = self.processes._order(Launch(PROFILE, self.netns, spec, {}, digest))
        made = replace(made, argv=[sys.executable, "-I", "-S", "-c", program, DOCUMENT], keys=["k"])
        (self.directory / f"{order.file_name(NAME)}{suffix}").write_bytes(made.encode())
        (self.directory / f"{DOCUMENT}{suffix}").write_text(digest)

    def ask(self, what: str) -> dict[str, Any]:
        request = {"do": what, "name": NAME}
        return control.ask(str(self.directory), request, taken_within_s=20, done_within_s=40)

    def go(self) -> None:
        (self.directory / "go").touch()

    def seen(self) -> Supervised:
        return next(one for one in self.processes.supervised(PROFILE, self.netns) if one.name == NAME)

    def in_force(self) -> str:
        return (self.directory / DOCUMENT).read_text()

    def successor(self) -> int:
        """The pid of one that has not taken over yet."""
        found: list[int] = []

        def is_there() -> bool:
            told = {one.pid for one in self.processes.supervised(PROFILE, self.netns)}
            found[:] = [pid for pid in pids_of(f"{DOCUMENT}{NEXT}") if pid not in told]
            return bool(found)

        wait_for(self.processes, is_there)
        return found[0]

    def stopped_successor(self) -> int:
        """The same, once it has stopped itself; it may be the one that serves by then."""
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in pids_of(f"{DOCUMENT}{NEXT}") if is_stopped(pid)]
            return bool(found)

        wait_for(self.processes, is_there)
        return found[0]

    def is_deaf(self) -> bool:
        return deafness.Marks(str(self.processes.state_dir), self.directory.name).is_deaf("k")


def pids_of(argument: str) -> list[int]:
    wanted = argument.encode() + b"\0"
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().endswith(wanted):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        netns = find(name)
        with local_processes(tmp_path) as processes:
            yield Place(processes, netns)
            processes.cleanup(PROFILE, netns)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


class Asked(threading.Thread):
    """A request whose answer is waited for elsewhere."""

    def __init__(self, ask: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self.answer: dict[str, Any] = {}
        self._ask = ask
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._ask()
        except OSError as error:
            self.answer = {"error": str(error)}

    def done(self) -> dict[str, Any]:
        self.join(40)
        return self.answer


def test_another_process_is_the_one_and_nothing_was_disabled(place: Place) -> None:
    place.go()
    pid = place.ask("succeed")["pid"]
    after = place.seen()
    assert (after.pid, after.state, after.restarts) == (pid, ProcessState.RUNNING, 0)
    assert place.in_force() == "second"
    assert [p.digest for p in place.processes.running() if p.name == NAME] == ["second"]
    assert not Path(f"/proc/{place.first}").exists()
    assert not place.is_deaf()
    (place.directory / "taken").unlink()
    os.kill(pid, signal.SIGKILL)
    wait_for(place.processes, lambda: place.seen().restarts == 1)
    assert [p.digest for p in place.processes.running() if p.name == NAME] == ["second"]


def test_asked_again_when_it_is_done_already_it_says_so(place: Place) -> None:
    """As does who was not answered because the supervisor began anew."""
    place.go()
    answer = place.ask("succeed")
    assert place.ask("succeed") == answer == {"pid": place.seen().pid}


def test_documents_of_a_successor_under_way_are_not_written_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the orch that undoes what a killed one has asked for."""
    asked = Asked(lambda: place.ask("succeed"))
    place.successor()
    ask = control.ask

    def go_and_ask(*args: Any, **options: Any) -> dict[str, Any]:
        place.go()  # whoever asks has written what it writes before
        return ask(*args, **options)

    monkeypatch.setattr(control, "ask", go_and_ask)
    spec = ProcessSpec(NAME, (HELPER_PROGRAM, DOCUMENT), (DOCUMENT,), (), ())
    with pytest.raises(HelperProcessError, match="goes on as it was"):
        place.processes.succeed(Launch(PROFILE, place.netns, spec, {DOCUMENT: "no document"}, "third"))
    assert asked.done() == {"pid": place.seen().pid}
    assert place.in_force() == "second"


def test_a_process_that_dies_while_its_successor_loads_is_missed_at_once(place: Place) -> None:
    asked = Asked(lambda: place.ask("succeed"))
    place.successor()
    os.kill(place.first, signal.SIGKILL)
    wait_for(place.processes, place.is_deaf)
    place.go()
    assert asked.done() == {"pid": place.seen().pid}
    wait_for(place.processes, lambda: not place.is_deaf())


def test_one_that_has_handed_over_and_does_not_end_is_ended(place: Place) -> None:
    place.write("second", NEXT, program=PROGRAM.replace('open("taken", "w").close()', ""), ready_within_s=5)
    place.go()
    assert place.ask("succeed") == {"pid": place.seen().pid}
    assert (place.in_force(), place.is_deaf(), place.seen().restarts) == ("second", False, 0)
    wait_for(place.processes, lambda: not pids_of(DOCUMENT))


def test_one_that_hangs_while_packets_wait_is_given_up_before_its_time(place: Place) -> None:
    """The process before it would read on, if that were not the one that hangs, which is found out next."""
    place.write("first", "", program=PROGRAM.replace("page = ", f"{HOLD}page = "), queues=(QUEUE,))
    assert "pid" in place.ask("start")
    place.write("second", NEXT, queues=(QUEUE,), ready_within_s=60)
    asked = Asked(lambda: place.ask("succeed"))
    place.successor()
    rule = f"-I OUTPUT -p udp --dport 6969 -j NFQUEUE --queue-num {QUEUE}"
    for command in ("ip link set lo up", f"iptables-legacy {rule}"):
        subprocess.run(["ip", "netns", "exec", place.netns.label, *command.split()], check=True)
    with entered(place.netns), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", 6969))
    assert asked.done() == {"error": "packets wait, and nobody answers them"}
    wait_for(place.processes, lambda: place.seen().reason == "hung: packets wait, and it answers none")


def test_asked_twice_it_is_done_once(place: Place) -> None:
    asked = [Asked(lambda: place.ask("succeed")) for _ in range(2)]
    place.successor()
    place.go()
    first, second = (one.done() for one in asked)
    assert first == second == {"pid": place.seen().pid}


@pytest.mark.parametrize(
    "program, why", [("raise SystemExit(3)", "it ended"), ("import time; time.sleep(1000)", "not ready within 1 s")]
)
def test_one_that_does_not_take_over_leaves_the_other_at_work(place: Place, program: str, why: str) -> None:
    place.write("second", NEXT, program=program, ready_within_s=1)
    assert place.ask("succeed") == {"error": why}
    assert (place.seen().pid, place.seen().state, place.in_force()) == (place.first, ProcessState.RUNNING, "first")
    assert not place.is_deaf()


def test_one_that_is_given_nothing_leaves_the_other_at_work_which_is_asked_no_more(place: Place) -> None:
    door = place.directory / handover_socket(NAME)
    door.touch()  # where nobody listens
    document = native.DOCUMENT.replace(f'name = "{native.NAME}"', f'name = "{NAME}"')
    spec = ProcessSpec(NAME, (HELPER_PROGRAM, DOCUMENT), (DOCUMENT,), (QUEUE,), ())
    with pytest.raises(NoHandoverError, match="one hands over nothing"):
        place.processes.succeed(Launch(PROFILE, place.netns, spec, {DOCUMENT: document}, "third"))
    assert not door.exists()
    assert (place.seen().pid, place.seen().state, place.in_force()) == (place.first, ProcessState.RUNNING, "first")
    place.write("second", NEXT, program=f"raise SystemExit({NOT_HANDED_OVER})")
    assert place.ask("succeed") == {"error": "its predecessor hands over nothing", "is_refused": True}


def test_one_that_nobody_can_look_after_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take over, and whoever supervises both would not know."""

    def refuse(_pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with subprocess.Popen(["sleep", "1000"]) as process:
        with local_processes(tmp_path) as processes:
            spec = ProcessSpec(NAME, ("sleep", "1000"), (), (), ())
            orders = processes._order(Launch(PROFILE, Netns("", "", "0:1"), spec, {}, "digest"))
        with pytest.raises(OSError, match="Too many open files"):
            Succession(
                Reactor(), orders, process.pid, says_ready=lambda: False, late=lambda: None, over=lambda _why: None
            )
        assert process.wait(WAIT_S) == -signal.SIGKILL


def test_a_supervisor_that_is_killed_in_the_middle_is_followed_by_one_that_goes_on(place: Place) -> None:
    asked = Asked(lambda: place.ask("succeed"))
    successor = place.successor()
    (supervisor,) = place.processes.supervisors(PROFILE, place.netns.identity)
    os.kill(supervisor, signal.SIGKILL)
    assert "error" in asked.done()
    spec = ProcessSpec("other", ("sleep", "1000"), (), (), ())
    place.processes.start(Launch(PROFILE, place.netns, spec, {}, "digest"))
    assert place.seen().pid == place.first
    place.go()
    wait_for(place.processes, lambda: place.seen().pid == successor)
    assert (place.in_force(), place.is_deaf()) == ("second", False)


def test_one_that_took_over_while_nobody_looked_is_adopted(place: Place) -> None:
    asked = Asked(lambda: place.ask("succeed"))
    successor = place.successor()
    (supervisor,) = place.processes.supervisors(PROFILE, place.netns.identity)
    os.kill(supervisor, signal.SIGKILL)
    asked.done()
    place.go()
    wait_for(place.processes, lambda: place.first not in pids_of(DOCUMENT))
    spec = ProcessSpec("other", ("sleep", "1000"), (), (), ())
    place.processes.start(Launch(PROFILE, place.netns, spec, {}, "digest"))
    wait_for(place.processes, lambda: place.seen().pid == successor)
    assert (place.in_force(), place.is_deaf(), place.seen().restarts) == ("second", False, 0)


def test_where_both_die_the_first_is_started_again(place: Place) -> None:
    asked = Asked(lambda: place.ask("succeed"))
    successor = place.successor()
    os.kill(place.first, signal.SIGKILL)
    os.kill(successor, signal.SIGKILL)
    assert "error" in asked.done()
    wait_for(place.processes, lambda: place.seen().restarts == 1)
    assert place.in_force() == "first"


def test_a_supervisor_of_another_version_is_replaced(place: Place) -> None:
    """As after an upgrade: what it does not understand, the next one may."""
    (before,) = place.processes.supervisors(PROFILE, place.netns.identity)
    answer = place.processes._ask(PROFILE, place.netns, {"do": "what is not known yet"})
    assert answer == {"error": "not a request", "is_outdated": True}
    (after,) = place.processes.supervisors(PROFILE, place.netns.identity)
    assert after != before
    assert (place.seen().pid, place.is_deaf()) == (place.first, False)
    file = place.directory / f"{order.file_name(NAME)}{NEXT}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "further": 1}))
    assert place.ask("succeed")["is_outdated"]


def test_the_one_that_took_over_is_looked_at_once_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of looks would take a process for hung that did not answer from one to the other."""
    monkeypatch.chdir(tmp_path)
    spec = ProcessSpec(NAME, ("sleep", "1000"), (), (), ())  # has no page that tells when to look
    with local_processes(tmp_path) as processes:
        orders = processes._order(Launch(PROFILE, Netns("", "", "0:1"), spec, {}, "digest"))
    with control.listen(str(tmp_path)) as listener:
        supervisor = Supervisor(str(tmp_path), str(tmp_path), listener)
        process = supervisor._processes.add(orders, lifecycle.adopt(orders.policy, os.getppid()))
        supervisor._processes.looks.from_now_on(process)
        over = supervisor._successions.follow(process, orders, os.getpid())
        over._deadline.cancel()
        before = pending(supervisor)
        supervisor._successions.take_over(process, over)
        assert len(before) == len(pending(supervisor)) == 2  # with that of its first request


def pending(supervisor: Supervisor) -> list[Timer]:
    return [timer for timer in supervisor._timers if not timer.is_cancelled]


def test_a_stop_ends_both(place: Place) -> None:
    asked = Asked(lambda: place.ask("succeed"))
    place.successor()
    assert place.ask("stop") == {}
    assert "error" in asked.done()
    wait_for(place.processes, lambda: not pids_of(DOCUMENT) and not pids_of(f"{DOCUMENT}{NEXT}"))


# -- a queue changes hands, and somebody is killed meanwhile -----------------------------------------------------------

# Serves a queue, and hands it over; a successor stops itself at a point that is named by a file.
SERVE = f"""
import os, signal, sys
sys.path.append({ROOT!r})
from orchestrator.engine import ctnetlink, handover, names, netlink, nfqueue
from orchestrator.engine.api import Bounds
from orchestrator.engine.counters import Page, State
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.loop import Answers, Loop, stop_on
from orchestrator.helpers.tftp import Tftp
nfqueue._NFQA_CFG_F_CONNTRACK = 0  # which a kernel may lack
is_next = sys.argv[-1].endswith(names.NEXT)
def stop_at(point):
    if is_next and os.path.exists(point):
        os.kill(os.getpid(), signal.SIGSTOP)
class Peer(handover.Peer):
    def begin(self):
        stop_at("told")
        super().begin()
        stop_at("go")
predecessor = Peer(names.handover_socket("{NAME}")) if is_next else None
page = Page("" if is_next else "{NAME}.stats")
listener = None if is_next else handover.listen("{NAME}")
queue = netlink.open_queue_socket(1 << 20)
answers = Answers(queue, ctnetlink.Client(netlink.open_control_socket()), page.counters)
inspector = Inspector(Tftp(), Duty(frozenset({{b"tftp"}}), Bounds(), by_rules=False), answers)
loop = Loop(queue, answers, inspector, page, accept_verdict=inspector.plain_verdict)
stop_on(loop, {{signal.SIGTERM}})
door = handover.Door(loop, inspector, page, queue)
if is_next:
    with_queue = {{"queue_socket": queue, "page": page, "loop": loop, "inspector": inspector}}
    listener = handover.take_over(predecessor, [{QUEUE}], **with_queue)
loop.bind({QUEUE}, is_fail_open=False)
page.state = State.READY
page.beat()
stop_at("bound")
if is_next:
    predecessor.done()
stop_at("taken")
door.open(listener)
loop.run()
os._exit(0)
"""
PORT = 6969


class Traffic:
    """Packets from one end to the other of a namespace; they pass the queue, and without a listener none comes."""

    def __init__(self, netns: Netns) -> None:
        rule = f"-A OUTPUT -p udp --dport {PORT} -j NFQUEUE --queue-num {QUEUE}"
        for command in ("ip link set lo up", f"iptables-legacy {rule}"):
            subprocess.run(["ip", "netns", "exec", netns.label, *command.split()], check=True)
        with entered(netns):
            self._receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._receiver.bind(("127.0.0.1", PORT))
        self._sender.connect(("127.0.0.1", PORT))

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()

    def passes(self, within_s: float) -> bool:
        self._receiver.settimeout(within_s)
        wanted = uuid.uuid4().bytes
        self._sender.send(wanted)
        try:
            while self._receiver.recv(1 << 16) != wanted:
                pass  # one that was given up too early
        except TimeoutError:
            return False
        return True


@pytest.mark.parametrize(
    "point, victim, in_force",
    [
        ("told", "predecessor", {"first"}),
        ("go", "predecessor", {"second"}),
        ("go", "successor", {"first"}),
        ("go", "supervisor", {"second"}),
        ("bound", "predecessor", {"second"}),
        ("bound", "successor", {"first"}),
        ("bound", "supervisor", {"second"}),
        ("taken", "successor", {"first", "second"}),
        ("taken", "supervisor", {"second"}),
    ],
)
def test_whoever_is_killed_one_process_serves_the_queue_and_the_supervisor_knows_it(
    place: Place, point: str, victim: str, in_force: set[str]
) -> None:
    place.write("first", "", program=SERVE, queues=(QUEUE,))
    first = place.ask("start")["pid"]
    place.write("second", NEXT, program=SERVE, queues=(QUEUE,))
    traffic = Traffic(place.netns)
    assert traffic.passes(WAIT_S)
    (place.directory / point).touch()
    asked = Asked(lambda: place.ask("succeed"))
    successor = place.stopped_successor()
    (supervisor,) = place.processes.supervisors(PROFILE, place.netns.identity)
    os.kill({"predecessor": first, "successor": successor, "supervisor": supervisor}[victim], signal.SIGKILL)
    if victim != "successor":
        os.kill(successor, signal.SIGCONT)
    answer = asked.done()
    if victim == "supervisor":
        spec = ProcessSpec("other", ("sleep", "1000"), (), (), ())
        place.processes.start(Launch(PROFILE, place.netns, spec, {}, "digest"))
    wait_for(place.processes, lambda: traffic.passes(0.5))
    wait_for(place.processes, lambda: [place.seen().pid] == pids_of(DOCUMENT) + pids_of(f"{DOCUMENT}{NEXT}"))
    wait_for(place.processes, lambda: place.seen().state is ProcessState.RUNNING and not place.is_deaf())
    assert all(traffic.passes(WAIT_S) for _ in range(5))
    traffic.close()
    assert place.in_force() in in_force
    assert [p.digest for p in place.processes.running() if p.name == NAME] == [place.in_force()]
    if victim != "supervisor":  # which may have answered before, or not
        assert ("pid" in answer) is (place.in_force() == "second")


def test_one_that_hangs_with_the_queue_in_its_hands_is_ended_and_no_packet_lost(place: Place) -> None:
    place.write("first", "", program=SERVE, queues=(QUEUE,))
    first = place.ask("start")["pid"]
    place.write("second", NEXT, program=SERVE, queues=(QUEUE,))
    traffic = Traffic(place.netns)
    assert traffic.passes(WAIT_S)
    (place.directory / "go").touch()
    asked = Asked(lambda: place.ask("succeed"))
    place.stopped_successor()
    assert traffic.passes(WAIT_S)
    traffic.close()
    assert asked.done() == {"error": "packets wait, and nobody answers them"}
    assert pids_of(DOCUMENT) + pids_of(f"{DOCUMENT}{NEXT}") == [first]
    assert (place.seen().pid, place.seen().state, place.in_force()) == (first, ProcessState.RUNNING, "first")
    assert not place.is_deaf()
