"""`orch events`: what becomes of processes, how a line reads, and a real stream from a namespace of this machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pytest

from orchestrator.engine.api import L4, Tuple
from orchestrator.events import Event, ExpectationEvent, Life, LostEvent, ProcessEvent, Stream, lives
from orchestrator.kernel import netlink
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Backend, Listing, Netns, ProcessSpec
from orchestrator.ports import Launch, Lifetimes, ProcessState, Supervised
from orchestrator.state import Applied, Owner
from orchestrator.supervise.launcher import LocalProcesses
from orchestrator.supervise.lifetimes import Expected, Fate
from orchestrator.views import events as view
from orchestrator.views.human import Paint
from tests.hosts import both
from tests.namespaces import named_netns
from tests.processes import PROFILE as PROFILE_NAME
from tests.processes import local_processes
from tests.waiting import until

GOLDEN = Path(__file__).parents[1] / "golden" / "events"
WITHIN_S = 30.0
BLUE = Netns("blue", "/run/netns/blue", "4:1")
EXPECTED = Expected(
    is_new=True,
    id=7,
    helper="ftp-us",
    policy=0,
    l4proto=L4.TCP,
    tuple=Tuple(bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), 0, 40001),
    mask=Tuple(b"\xff" * 4, b"\xff" * 4, 0, 0xFFFF),
    master=Tuple(bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), 50000, 21),
    master_l4proto=L4.TCP,
    timeout_s=300,
    is_permanent=False,
    is_requested=False,
)
FROM_ANYBODY = EXPECTED._replace(
    helper="sip",
    l4proto=L4.UDP,
    policy=1,
    is_permanent=True,
    tuple=Tuple(bytes(16), b"\xfd" + bytes(14) + b"\1", 0, 5060),
    mask=Tuple(bytes(16), b"\xff" * 16, 0xFF00, 0xFFFF),
    master=Tuple(b"\xfd" + bytes(14) + b"\2", b"\xfd" + bytes(14) + b"\1", 5060, 5060),
)
FROM_A_NETWORK = EXPECTED._replace(mask=Tuple(b"\xff\xff\xff\0", b"\xff" * 4, 0, 0xFFFF))
RUNNING = Supervised("ftp", ProcessState.RUNNING, 100, 0, 1.0, "")


def process(life: Life, seen: Supervised) -> ProcessEvent:
    return ProcessEvent(1_800_000_003.5, Owner("office", BLUE), life, seen)


EVENTS: tuple[Event, ...] = (
    *(ExpectationEvent(1_800_000_000.25, BLUE, fate, EXPECTED) for fate in Fate),
    ExpectationEvent(1_800_000_001.0, BLUE, Fate.MADE, FROM_ANYBODY),
    ExpectationEvent(1_800_000_001.0, BLUE, Fate.MADE, FROM_A_NETWORK),
    LostEvent(1_800_000_002.999, BLUE, 17),
    process(Life.STARTED, RUNNING),
    process(Life.DIED, replace(RUNNING, state=ProcessState.BACKOFF, pid=0, reason="killed by SIGSEGV")),
    process(Life.HUNG, replace(RUNNING, state=ProcessState.STOPPING, reason="hung: packets wait, and it answers none")),
    process(Life.RESTARTED, replace(RUNNING, pid=101, restarts=1, reason="killed by SIGSEGV")),
    process(Life.FATAL, replace(RUNNING, state=ProcessState.FATAL, pid=0, restarts=10, reason="exited with 1")),
    process(Life.STOPPED, RUNNING),
)


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize("name", ["text.txt", "coloured.txt", "lines.jsonl"])
def test_each_event_is_a_line(name: str) -> None:
    lines = [view.line(e) if name.endswith("jsonl") else view.text(e, Paint(is_on="col" in name)) for e in EVENTS]
    shown = "".join(f"{line}\n" for line in lines)
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(shown)
    assert shown == (GOLDEN / name).read_text()


def life(before: Supervised | None, after: Supervised | None) -> list[Life]:
    found = lives((before,) if before else (), (after,) if after else ())
    return [kind for kind, _ in found]


def test_what_became_of_a_process() -> None:
    backoff = replace(RUNNING, state=ProcessState.BACKOFF, pid=0, reason="exited with 1")
    again = replace(RUNNING, pid=101, restarts=1)
    fatal = replace(backoff, state=ProcessState.FATAL)
    assert life(None, replace(RUNNING, state=ProcessState.STARTING)) == []
    assert life(None, RUNNING) == [Life.STARTED]
    assert life(RUNNING, backoff) == [Life.DIED]
    assert life(backoff, again) == [Life.RESTARTED]
    assert life(RUNNING, again) == [Life.RESTARTED]
    assert life(RUNNING, fatal) == [Life.FATAL]
    assert life(fatal, fatal) == []
    assert life(fatal, None) == []
    assert life(fatal, replace(RUNNING, pid=102)) == [Life.STARTED]
    assert life(RUNNING, replace(RUNNING, since=9.0)) == []
    assert life(RUNNING, replace(RUNNING, pid=103)) == [Life.STARTED]
    assert life(RUNNING, None) == [Life.STOPPED]


def test_a_hang_is_told_once_however_much_of_it_is_seen() -> None:
    hung = replace(RUNNING, state=ProcessState.STOPPING, reason="hung: packets wait")
    starting = replace(hung, state=ProcessState.STARTING, pid=101)
    again = replace(starting, state=ProcessState.RUNNING, restarts=1)
    course = [RUNNING, hung, starting, again]
    for seen in (seen for size in range(3) for seen in itertools.combinations(course[1:-1], size)):
        steps = itertools.pairwise([RUNNING, *seen, again])
        assert [kind for step in steps for kind in life(*step)] == [Life.HUNG, Life.RESTARTED]
    assert life(again, replace(hung, pid=101, restarts=1)) == [Life.HUNG]
    assert life(again, replace(again, state=ProcessState.STOPPING, reason="")) == []
    assert life(again, replace(again, pid=102, restarts=2, reason="exited with 1")) == [Life.RESTARTED]
    backoff = replace(hung, state=ProcessState.BACKOFF, pid=0)
    assert life(hung, backoff) == [Life.DIED]
    assert life(RUNNING, backoff) == [Life.HUNG, Life.DIED]
    assert life(None, again) == [Life.RESTARTED]


# -- on this machine ---------------------------------------------------------------------------------------------------

root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") is None, reason="needs root and ip(8)"
)
PROFILE = """
profile: ftp
netns: {netns}
helpers:
  ftp: {{engine: kernel, attach: {{path: [outgoing]}}}}
"""


@dataclass(slots=True)
class Watching:
    """`orch events` as a child, whose lines are kept."""

    child: subprocess.Popen[str]
    lines: queue.Queue[str]

    def events(self, last: str) -> list[str]:
        """What became of expectations, until and with the event of that kind."""
        seen: list[str] = []
        while not seen or seen[-1] != last:
            seen.append(json.loads(self.lines.get(timeout=WITHIN_S))["event"])
        return seen

    def end(self, number: signal.Signals) -> int:
        self.child.send_signal(number)
        return self.child.wait(WITHIN_S)


def orch(state: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *argv, "--state-dir", str(state)]


@pytest.fixture
def netns() -> Iterator[str]:
    with named_netns() as name:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name


@pytest.fixture
def state(netns: str, tmp_path: Path) -> Path:
    """Where the kernel's own helper is applied to what the namespace opens itself."""
    profile = tmp_path / "ftp.yaml"
    profile.write_text(PROFILE.format(netns=netns))
    done = subprocess.run(orch(tmp_path / "state", "apply", str(profile)), capture_output=True, text=True, check=False)
    if "does not exist" in done.stderr or "cannot be loaded" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return tmp_path / "state"


@contextlib.contextmanager
def watching(state: Path, *argv: str) -> Iterator[Watching]:
    command = orch(state, "events", "--json", *argv)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_put_all, args=(child.stdout, lines), daemon=True)
        try:
            assert child.stderr.readline().startswith("listening in orch-")
            reader.start()
            yield Watching(child, lines)
        finally:
            child.kill()
            reader.join()


def _put_all(stdout: IO[str], lines: queue.Queue[str]) -> None:
    for line in stdout:
        lines.put(line)


class Talk:
    """An FTP server that says what it is told to, and a client, in one namespace."""

    def __init__(self, netns: str) -> None:
        self._netns = find(netns)
        with entered(self._netns):
            self._listener = socket.create_server(("127.0.0.1", 21))
            self.client = socket.create_connection(("127.0.0.1", 21))
        self._server, _ = self._listener.accept()
        self._say(b"220 hello\r\n")

    def announce(self, port: int) -> None:
        self.client.sendall(b"PASV\r\n")
        self._server.recv(100)
        self._say(b"227 Entering Passive Mode (127,0,0,1,%d,%d).\r\n" % divmod(port, 256))

    def transfer(self, port: int) -> None:
        with entered(self._netns), socket.create_server(("127.0.0.1", port)):
            socket.create_connection(("127.0.0.1", port)).close()

    def close(self) -> None:
        for one in (self.client, self._server, self._listener):
            one.close()

    def _say(self, line: bytes) -> None:
        self._server.sendall(line)
        self.client.recv(200)


def delete_connections(netns: str) -> None:
    """IPCTNL_MSG_CT_DELETE without a tuple: all of the namespace."""
    with entered(find(netns)):
        netlink.perform(bytes.fromhex("14000000 0201 0500") + bytes(12))


@root
def test_a_stream_of_what_the_kernel_expects(netns: str, state: Path) -> None:
    """On a host that talks to itself the helper sees each packet twice: an expectation makes room for its like."""
    with watching(state) as all_of_it, watching(state, "ftp", "--count", "3") as three:
        talk = Talk(netns)
        talk.announce(40001)
        talk.transfer(40001)
        assert set(all_of_it.events("used")) == {"new", "cancelled", "used"}
        talk.announce(40002)
        delete_connections(netns)
        assert three.child.wait(WITHIN_S) == 0
        talk.close()
        assert all_of_it.events("cancelled")[0] == "new"
        assert all_of_it.end(signal.SIGINT) == 128 + signal.SIGINT


@root
def test_it_ends_when_nobody_reads_any_more(state: Path) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(orch(state, "events"), stdout=writing, stderr=subprocess.PIPE, text=True) as child:
        os.close(writing)
        assert child.stderr is not None
        assert child.stderr.readline().startswith("listening in orch-")
        os.close(reading)
        assert child.wait(WITHIN_S) == 0
        assert child.stderr.read() == ""


def test_without_anything_applied_there_is_nothing_to_hear(tmp_path: Path) -> None:
    done = subprocess.run(orch(tmp_path / "state", "events"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing is applied" in done.stderr


@pytest.fixture
def processes(netns: str, tmp_path: Path) -> Iterator[LocalProcesses]:
    with local_processes(tmp_path / "state") as processes:
        yield processes
        processes.cleanup(PROFILE_NAME, find(netns))


@root
@pytest.mark.slow
def test_the_life_of_a_process(netns: str, processes: LocalProcesses) -> None:
    there = find(netns)
    _, target = both("profile: unit\nhelpers:\n  tftp: {engine: native}\n")
    nothing = Listing(Backend.NFTABLES, "", "", frozenset())
    applied = Applied(Owner(PROFILE_NAME, there), "unit.yaml", 0.0, target, nothing, "", ())
    processes.state_dir.mkdir()
    reading, writing = os.pipe()
    stream = Stream(lambda: (applied,), processes, processes.state_dir, is_whole=True, output=writing)
    with contextlib.closing(stream):
        stream.open()
        events = stream.events()
        processes.start(sleeping(there))
        first = told(events, Life.STARTED)
        os.kill(first.pid, signal.SIGKILL)
        second = told(events, Life.RESTARTED)
        assert second.pid != first.pid
        assert (second.restarts, "SIGKILL" in second.reason) == (1, True)
        os.kill(second.pid, signal.SIGSTOP)
        hung = told(events, Life.HUNG)
        assert "stopped by a signal" in hung.reason
        second = told(events, Life.RESTARTED)
        assert second.restarts == 2
        processes.stop(next(seen for seen in processes.running() if seen.pid == second.pid))
        assert told(events, Life.STOPPED).pid == second.pid
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            next(events)
    os.close(writing)


def sleeping(netns: Netns) -> Launch:
    """A process that does nothing, and is started again if it dies."""
    return Launch(PROFILE_NAME, netns, ProcessSpec("idle", ("sleep", "1000"), (), (), ()), {}, "digest")


def told(events: Iterator[Event], life: Life) -> Supervised:
    """The next event of that kind; a process that died may or may not be seen dead before it runs again."""
    for event in events:
        assert isinstance(event, ProcessEvent)
        if event.life is life:
            return event.process
        assert event.life is Life.DIED
    raise AssertionError("the stream ended")


@root
def test_a_supervisor_counts_the_expectations_of_its_namespace(
    netns: str, state: Path, processes: LocalProcesses
) -> None:
    there = find(netns)
    processes.start(sleeping(there))
    assert processes.lifetimes(PROFILE_NAME, there) == {}
    talk = Talk(netns)
    talk.announce(40001)
    talk.transfer(40001)
    until(lambda: counted(processes, there).used == 1, "one was used")
    talk.announce(40002)
    delete_connections(netns)
    until(lambda: counted(processes, there).cancelled >= 1, "one has no connection any more")
    talk.close()
    until(lambda: ends(counted(processes, there)) == counted(processes, there).made >= 2, "all have ended")


def counted(processes: LocalProcesses, netns: Netns) -> Lifetimes:
    return processes.lifetimes(PROFILE_NAME, netns).get("ftp", Lifetimes())


def ends(seen: Lifetimes) -> int:
    return seen.used + seen.expired + seen.cancelled
