"""A supervisor is killed, or finds a full disk, at each thing that it does for a request; the command goes on.

Natively, with processes that serve nothing and only say that they do. A fourth of the points; all with ORCH_FAULTS=all.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.errors import HelperProcessError
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.cthelper_codec import encode_status
from orchestrator.kernel.netns import entered, find
from orchestrator.model import HELPER_PROGRAM, HelperKey, L3Proto, L4Proto, Netns, ProcessSpec, Restart, Status
from orchestrator.ports import Launch, ProcessSeen, ProcessState
from orchestrator.supervise import launcher, supervisor
from orchestrator.supervise.deafness import Marks, key_name
from orchestrator.supervise.launcher import LocalProcesses
from tests.processes import PROFILE, wait_for

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)"),
    pytest.mark.slow,  # real processes, which are waited for
]

ROOT = str(Path(__file__).parents[2])
NAME = "one"
DOCUMENT = "helper-one.toml"
KEY = HelperKey("unit-us", L3Proto.IP, L4Proto.TCP)
MOMENTS = ("BEFORE", "AFTER", "FULL")

# Says that it is ready; a successor tells its predecessor that it took over, and fails where there is none.
HELPER = f"""
import os, sys, time
sys.path.append({ROOT!r})
from orchestrator.engine.counters import Page, State, read
from orchestrator.engine.names import NEXT
def is_taken():
    try:
        return open("taken").read() == str(os.getpid())
    except OSError:
        return False
if sys.argv[-1].endswith(NEXT):
    before = read("{NAME}.stats").pid
    os.kill(before, 0)
    page = Page("{NAME}.stats")
    page.state = State.READY
    with open("taken", "w") as file:
        file.write(str(before))
else:
    page = Page("{NAME}.stats")
    page.state = State.READY
page.beat()
while not is_taken():
    time.sleep(0.01)
"""

# What a supervisor does is counted from when the file `armed` appears, which says where it is to die, and how.
DYING = f"""
import errno, functools, os, signal, sys
sys.path.append({ROOT!r})
from orchestrator.supervise import process, processes, records, registrations, requests, successions, supervisor
from orchestrator.supervise.deafness import Marks
here = os.path.dirname(os.path.abspath(__file__))
plan, done = [], []
def counted(name, call):
    @functools.wraps(call)
    def effect(*args, **options):
        try:
            with open(here + "/armed") as file:
                plan[:] = file.read().split()
            os.remove(here + "/armed")
        except FileNotFoundError:
            pass
        if plan:
            done.append(name)
            with open(here + "/done", "a") as file:
                file.write(name + "\\n")
        place, moment = (int(plan[0]), plan[1]) if plan else (0, "")
        is_it = len(done) == place and place
        if is_it and moment == "BEFORE":
            os.kill(os.getpid(), signal.SIGKILL)
        if is_it and moment == "FULL" and name not in ("kill", "send", "reply"):
            raise OSError(errno.ENOSPC, "No space left on device")
        result = call(*args, **options)
        if is_it and moment == "AFTER":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return effect
signal.pidfd_send_signal = counted("kill", signal.pidfd_send_signal)
process.Process.kill = counted("kill", process.Process.kill)
registrations.Registrations._send = counted("send", registrations.Registrations._send)
requests.Requests._reply = counted("reply", requests.Requests._reply)
processes.start = successions.start = counted("start", process.start)
records.write = counted("write", records.write)
os.rename = counted("rename", os.rename)
Marks.set = counted("mark", Marks.set)
Marks.clear = counted("unmark", Marks.clear)
sys.exit(supervisor.main(*sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A profile with one process. `directory` has what supervisors are told to do, and did."""

    processes: LocalProcesses
    netns: Netns
    directory: Path

    def launch(self, digest: str = "first") -> Launch:
        spec = ProcessSpec(
            NAME,
            (HELPER_PROGRAM, DOCUMENT),
            (DOCUMENT,),
            (),
            (KEY,),
            ready_within_s=20,
            restart=Restart.ON_FAILURE,
            restart_limit=3,
        )
        return Launch(PROFILE, self.netns, spec, {DOCUMENT: digest}, digest)

    def keeper(self) -> Launch:
        """Another process of the profile, for which a supervisor starts, and takes up what the one before left."""
        spec = ProcessSpec("keeper", ("sleep", "1000"), (), (), ())
        return Launch(PROFILE, self.netns, spec, {}, "keeper")

    def arm(self, place: int, moment: str) -> None:
        (self.directory / "done").unlink(missing_ok=True)
        (self.directory / "armed").write_text(f"{place} {moment}")

    def done(self) -> list[str]:
        (self.directory / "armed").unlink(missing_ok=True)
        file = self.directory / "done"
        return file.read_text().split() if file.exists() else []

    def running(self, name: str = NAME) -> list[ProcessSeen]:
        return [process for process in self.processes.running() if process.name == name]

    def the_one(self, name: str = NAME) -> ProcessSeen:
        """The only process of that name, once one that was taken over from is gone, and it has become its program."""
        found: list[ProcessSeen] = []

        def is_alone() -> bool:
            found[:] = self.running(name)
            return len(found) == 1 and found[0].pid > 0

        wait_for(self.processes, is_alone)
        return found[0]

    def kill_supervisor(self) -> None:
        for pid in self.processes.supervisors(PROFILE, self.netns.identity):
            os.kill(pid, signal.SIGKILL)
        wait_for(self.processes, lambda: not self.processes.supervisors(PROFILE, self.netns.identity))

    def is_deaf(self) -> bool:
        directory = self.processes.runtime_dir(PROFILE, self.netns)
        return Marks(str(self.processes.state_dir), directory.name).is_deaf(key_name(KEY))

    def clear(self) -> None:
        for process in self.processes.running():
            self.processes.stop(process)
        self.processes.cleanup(PROFILE, self.netns)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    for name, text in (("helper.py", HELPER), ("dying.py", DYING)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(launcher, "_HELPER_SCRIPT", tmp_path / "helper.py")
    monkeypatch.setattr(supervisor, "__file__", str(tmp_path / "dying.py"))
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    processes = LocalProcesses(
        state_dir=tmp_path / "state",
        clock=MonotonicClock(),
        encode_disable=lambda key: encode_status(key, Status.DISABLED),
        encode_enable=lambda key: encode_status(key, Status.ENABLED),
        entered=entered,
    )
    here = Place(processes, find(name), tmp_path)
    try:
        yield here
    finally:
        here.clear()
        subprocess.run(["ip", "netns", "delete", name], check=True)


def start(place: Place) -> None:
    place.processes.start(place.launch())


def hand_over(place: Place) -> None:
    place.processes.succeed(place.launch("second"))


def watch(place: Place) -> None:
    place.processes.watch(place.launch(), place.the_one())


def stop(place: Place) -> None:
    for process in place.running():
        place.processes.stop(process)


def die(place: Place) -> None:
    """The process dies; what is asked next is what an apply asks then."""
    os.kill(place.the_one().pid, signal.SIGKILL)

    def is_over() -> bool:
        told = [one for one in place.processes.supervised(PROFILE, place.netns) if one.name == NAME]
        is_again = any(one.state is ProcessState.RUNNING and one.restarts for one in told)
        return is_again or not place.processes.supervisors(PROFILE, place.netns.identity)

    wait_for(place.processes, is_over)
    place.processes.start(place.keeper())


def nothing(place: Place) -> None:
    """A supervisor is there for another process already."""
    place.processes.start(place.keeper())


def orphaned(place: Place) -> None:
    start(place)
    place.kill_supervisor()


def first(place: Place) -> None:
    """There is no supervisor; one that ends when it has just been started is not replaced, and that is told."""


KINDS: dict[str, tuple[Callable[[Place], None], Callable[[Place], None]]] = {
    "first start": (first, start),
    "start": (nothing, start),
    "hand over": (start, hand_over),
    "watch": (orphaned, watch),
    "stop": (start, stop),
    "death": (start, die),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_supervisor_dies_over_the_command_is_done(place: Place, kind: str) -> None:
    before, act = KINDS[kind]
    before(place)
    place.arm(0, "NEVER")
    act(place)
    effects = place.done()
    assert effects
    place.clear()
    points = [(number, moment) for number in range(1, len(effects) + 1) for moment in MOMENTS]
    for number, moment in points if os.environ.get("ORCH_FAULTS") == "all" else points[::4]:
        before(place)
        place.arm(number, moment)
        told = ""
        try:
            act(place)
        except (HelperProcessError, OSError) as error:
            told = str(error)
        place.done()
        where = f"{kind}: {moment} {number} of {effects}: {told}"
        assert not told or moment == "FULL" or before in (first, orphaned), where
        check(place, act, is_done=not told, where=where)
        place.clear()


def check(place: Place, act: Callable[[Place], None], *, is_done: bool, where: str) -> None:
    """One process, looked after, and heard; none that nobody wants, whatever supervisor comes next."""
    if not is_done:
        act(place)
    place.processes.start(place.keeper())
    if act is stop:
        place.kill_supervisor()
        place.processes.watch(place.keeper(), place.the_one("keeper"))
        assert not place.running(), where
        assert not place.is_deaf(), where
        return
    process = place.the_one()
    assert process.watched, where
    assert process.digest == ("second" if act is hand_over else "first"), where
    wait_for(place.processes, lambda: not place.is_deaf())
