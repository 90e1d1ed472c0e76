"""`orch watch` and a reconciling supervisor on this machine: rules of a real namespace, changed by somebody else."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.drift import MendReport, Outcome
from orchestrator.engine import netlink
from orchestrator.errors import Interrupted
from orchestrator.fake import FakeKernel
from orchestrator.journal import Ledger, note_child
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.iptables import IptablesRules
from orchestrator.kernel.netns import entered, find, scratch
from orchestrator.model import Backend, Document, Netns, Rules, is_profile_name
from orchestrator.state import Owner
from orchestrator.supervise import watching
from orchestrator.supervise.errands import Errands
from orchestrator.supervise.glance import glance
from orchestrator.supervise.lifecycle import Life
from orchestrator.supervise.reactor import Reactor
from orchestrator.supervise.watching import Commit, CommitReader, Commits, Reconciler
from orchestrator.watcher import Watcher, look_once
from tests.hosts import Harness
from tests.processes import local_processes

WITHIN_S = 60
CONFIG = 0x302  # NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG
BIND = bytes((1, 0, 0, 0))
ACKNOWLEDGED = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
NEWTABLE, NEWRULE, NEWGEN = 0xA00, 0xA06, 0xA0F
SEARCH_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("nft", path=SEARCH_PATH) is None, reason="needs root and nft"
)
PROFILE = """
profile: ftp
netns: {netns}
reconcile: true
helpers:
  ftp: {{engine: kernel, attach: {{path: [outgoing]}}}}
"""


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    body = b"".join(netlink.attribute(number, data) for number, data in attributes)
    return netlink.message(kind, body, flags=0)


def nft(*words: str) -> None:
    subprocess.run(["nft", *words], check=True, capture_output=True)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_commit_names_its_tables_and_who_made_it() -> None:
    data = message(NEWTABLE, (1, b"orch-ftp\0")) + message(NEWRULE, (1, b"other\0"), (2, b"chain\0"))
    end = message(NEWGEN, (1, bytes(4)), (2, (77).to_bytes(4, "big")), (3, b"nft\0"))
    reader = CommitReader()
    assert not list(reader.read(data))
    (commit,) = reader.read(end)
    assert commit == Commit(frozenset({"orch-ftp", "other"}), 77, "nft")
    assert commit.touches("ftp")
    assert not commit.touches("tftp")
    assert list(reader.read(end)) == [Commit(frozenset(), 77, "nft")]


def test_the_name_of_a_program_is_no_more_than_text() -> None:
    """It is what that program says of itself, and goes to a log and a terminal."""
    (commit,) = CommitReader().read(message(NEWGEN, (3, b"a\n<0>\x1b[2J\xff\0")))
    assert commit.program == "a?<0>?[2J\ufffd"


def test_the_table_of_iptables_and_what_was_lost_concern_everybody() -> None:
    assert Commit(frozenset({"raw"})).touches("ftp")
    assert Commit(frozenset(), is_lost=True).touches("ftp")


@given(st.binary(max_size=200))
def test_any_bytes_are_read(data: bytes) -> None:
    for commit in CommitReader().read(data):
        assert isinstance(commit, Commit)


def test_a_supervisor_looks_again() -> None:
    """What waits is looked at with every glance, what fails ever more seldom, but never less than what is right."""
    assert [watching.patience_after(code, 1, is_known=True) for code in (0, 2)] == [20, 1]
    assert watching.patience_after(0, 20, is_known=False) == 1
    waits = [1]
    for _ in range(6):
        waits.append(watching.patience_after(1, waits[-1], is_known=True))
    assert waits == [1, 2, 4, 8, 16, 20, 20]
    assert watching.patience_after(128 + signal.SIGKILL, 4, is_known=False) == 8


def test_the_holder_of_the_lock_is_known(tmp_path: Path) -> None:
    assert not watching.is_by_holder(Commit(frozenset(), 7), str(tmp_path))
    (tmp_path / "lock").write_text("orch apply ftp.yaml (pid 7)")
    assert watching.is_by_holder(Commit(frozenset(), 7), str(tmp_path))
    assert not watching.is_by_holder(Commit(frozenset(), 8), str(tmp_path))
    note_child(tmp_path, 8)
    assert watching.is_by_holder(Commit(frozenset(), 7), str(tmp_path))
    assert watching.is_by_holder(Commit(frozenset(), 8), str(tmp_path))
    assert not watching.is_by_holder(Commit(frozenset(), 9), str(tmp_path))


@root
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("iptables-nft-restore", path=SEARCH_PATH) is None, reason="needs iptables")
def test_what_iptables_does_for_us_is_our_doing(netns: str, tmp_path: Path) -> None:
    """iptables is a program of its own; what somebody else has it do is theirs."""
    iptables = IptablesRules(Backend.IPTABLES_NFT, functools.partial(note_child, tmp_path))
    text = "*raw\n:orch-x-pre - [0:0]\n-A PREROUTING -j orch-x-pre\nCOMMIT\n"
    rules = Rules(Backend.IPTABLES_NFT, "x", "", (Document("x.iptables", text),))
    ledger = Ledger.open(tmp_path, boot_id="boot", create=True)
    there = find(netns)
    with entered(there):
        commits = Commits()
    with contextlib.closing(commits), ledger.locked("test", wait_s=0, clock=MonotonicClock()):
        inside(netns, "iptables-nft", "-t", "raw", "-A", "OUTPUT")
        (theirs,) = commits.read()
        iptables.load(there, rules)
        iptables.remove(there, rules.profile)
        ours = commits.read()
        assert len(ours) == 2
        assert all(watching.is_by_holder(commit, str(tmp_path)) for commit in ours)
        assert not watching.is_by_holder(theirs, str(tmp_path))


@root
@pytest.mark.slow
def test_a_glance_sees_who_has_a_queue_and_what_was_made_anew(tmp_path: Path) -> None:
    with scratch(), contextlib.closing(netlink.open_queue_socket(1 << 16)) as channel:
        channel.bind((0, 0))
        before = glance(str(tmp_path))
        assert before is not None
        assert glance(str(tmp_path)) == before
        channel.send(netlink.message(CONFIG, netlink.attribute(1, BIND), flags=ACKNOWLEDGED, resource=7))
        assert channel.recv(4096)[16:20] == bytes(4)
        bound = glance(str(tmp_path))
        assert bound != before
        (tmp_path / "remade").touch()
        assert glance(str(tmp_path)) != bound


@root
@pytest.mark.slow
def test_commits_of_the_kernel() -> None:
    with scratch():
        commits = Commits()
        with contextlib.closing(commits):
            assert commits.read() == []
            nft("add table inet orch-ftp; add chain inet orch-ftp c; add rule inet orch-ftp c counter")
            nft("flush", "ruleset")
            first, second = commits.read()
    assert first.tables == second.tables == {"orch-ftp"}
    assert first.program == second.program == "nft"
    assert first.pid != second.pid


class Supervisor(Reactor):
    """What a reconciler is told by."""

    processes: Mapping[str, Life] = {}

    def __init__(self) -> None:
        super().__init__()
        self.on_change: Callable[[], None] = lambda: None
        self.on_reaped: Callable[[int, int], None] = lambda _pid, _code: None
        self.said: list[str] = []

    def say(self, text: str, level: int = 6) -> None:
        del level
        self.said.append(text)


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a supervisor works that is to have drift mended."""
    monkeypatch.chdir(tmp_path)
    Path(watching.FILE).touch()
    return str(tmp_path)


@root
@pytest.mark.slow
def test_who_goes_on_changing_rules_does_not_put_off_a_look(runtime_dir: str) -> None:
    supervisor = Supervisor()
    with scratch():
        reconciler = Reconciler(supervisor, Errands(supervisor, {}), profile="ftp", state_dir=runtime_dir)
        due = reconciler._timer
        assert due is not None
        nft("add table inet orch-ftp")
        reconciler._rules_changed()
        assert supervisor.said[-1].endswith("changed rules")
        assert (reconciler._timer, due.is_cancelled) == (due, False)
        reconciler._glance_in(0.0)
        nft("delete table inet orch-ftp")
        reconciler._rules_changed()
        assert reconciler._timer is not None
        assert reconciler._timer.callback == reconciler._look, "a glance would not see it"
        Path(watching.FILE).unlink()
        reconciler._toggle()
        assert supervisor.said[-1] == "drift is not mended any more"


class Sleepers(Errands):
    """Commands that do not end by themselves."""

    def start(self, argv: list[str], ended: Callable[[int], None]) -> int:
        del argv
        self.pid = super().start(["/bin/sleep", "60"], ended)
        return self.pid

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


Looking = tuple[Supervisor, Sleepers, Reconciler]


@pytest.fixture
def looking(runtime_dir: str) -> Iterator[Looking]:
    """A look that is under way."""
    supervisor = Supervisor()
    children = Sleepers(supervisor, {})
    with scratch():
        reconciler = Reconciler(supervisor, children, profile="ftp", state_dir=runtime_dir)
        reconciler._look()
        yield supervisor, children, reconciler
        Path(watching.FILE).unlink(missing_ok=True)
        reconciler._toggle()


@root
@pytest.mark.slow
def test_a_table_that_others_change_all_the_time_costs_a_fifth_of_it(looking: Looking) -> None:
    supervisor, children, reconciler = looking
    reconciler._began -= 10
    nft("add table ip raw")
    reconciler._rules_changed()
    os.kill(children.pid, signal.SIGKILL)
    supervisor.on_reaped(children.pid, children.ended())
    timer, now = reconciler._timer, time.monotonic()
    assert timer is not None
    assert 30 < timer.deadline - now < 60
    said = len(supervisor.said)
    for _ in range(2):
        nft("add chain ip raw c; delete chain ip raw c")
        reconciler._rules_changed()
    assert (reconciler._timer, supervisor.said[said:]) == (timer, []), "said once for each look"
    nft("add table inet orch-ftp")
    reconciler._rules_changed()
    assert reconciler._timer is not None
    assert reconciler._timer.deadline - now < 10, "our own table does not wait"


@root
@pytest.mark.slow
def test_a_look_that_waits_does_not_outlive_the_wish_for_it(looking: Looking) -> None:
    supervisor, children, reconciler = looking
    Path(watching.FILE).unlink()
    reconciler._toggle()
    code = children.ended()
    assert code == -signal.SIGTERM
    supervisor.on_reaped(children.pid, code)
    assert supervisor.said[-1] == "drift is not mended any more", "that it was ended is no trouble"


@root
@pytest.mark.slow
def test_there_is_one_look_at_a_time(looking: Looking) -> None:
    """Turned off and on again while one is under way: the next one comes after it."""
    supervisor, children, reconciler = looking
    Path(watching.FILE).unlink()
    reconciler._toggle()
    Path(watching.FILE).touch()
    reconciler._toggle()
    assert reconciler._timer is None
    supervisor.on_reaped(children.pid, children.ended())
    assert reconciler._timer is not None
    assert reconciler._timer.callback == reconciler._look


def test_a_signal_in_the_middle_of_a_look_is_no_news(tmp_path: Path) -> None:
    """It ends the loop, which hears of it as well."""
    told: list[MendReport] = []

    def mend(_owner: Owner) -> MendReport:
        raise Interrupted(signal.SIGTERM)

    with local_processes(tmp_path) as processes:
        app = Harness(FakeKernel().system(), tmp_path).app()
        watcher = Watcher(
            app, processes, profile="", interval_s=30, mend=mend, tell=lambda report, _who: told.append(report)
        )
        at = ("ftp", "0:1")
        watcher._owners[at] = Owner("ftp", Netns("host", "", "0:1"))
        watcher._look(at)
    assert told == []


def test_no_file_that_a_supervisor_looks_for_is_taken_for_a_profile() -> None:
    assert not is_profile_name(watching.FILE)


# -- looking once ------------------------------------------------------------------------------------------------------


AT = Owner("ftp", Netns("host", "", "0:1"))


def test_who_holds_the_lock_is_waited_for_only_so_long() -> None:
    """Each look waits for the lock by itself, as long as any command does."""
    clock = [0.0]
    told: list[MendReport] = []

    def pass_by(seconds: float) -> None:
        clock[0] += seconds

    def mend(owner: Owner) -> MendReport:
        pass_by(6.0)
        return MendReport(owner, Outcome.WAITING, again_in_s=0.5)

    reports = look_once(
        [AT], mend, told.append, within_s=10.0, sleep=pass_by, interrupted=lambda: 0, now=lambda: clock[0]
    )
    assert (told, clock[0]) == (reports, 12.5)


def test_a_look_that_mends_does_not_use_up_the_time_to_wait() -> None:
    clock = [0.0]
    told: list[MendReport] = []
    outcomes = [Outcome.MENDED, Outcome.WAITING, Outcome.RIGHT]

    def mend(owner: Owner) -> MendReport:
        clock[0] += 60.0 if outcomes[0] is Outcome.MENDED else 0.0
        return MendReport(owner, outcomes.pop(0), again_in_s=0.5 if outcomes else 0.0)

    reports = look_once(
        [AT], mend, told.append, within_s=10.0, sleep=lambda _: None, interrupted=lambda: 0, now=lambda: clock[0]
    )
    assert [report.outcome for report in told] == [Outcome.MENDED, Outcome.RIGHT]
    assert reports == told[1:]


def test_a_signal_ends_the_wait() -> None:
    def mend(owner: Owner) -> MendReport:
        return MendReport(owner, Outcome.WAITING, again_in_s=0.5)

    with pytest.raises(Interrupted):
        look_once([AT], mend, lambda _: None, within_s=10.0, sleep=lambda _: None, interrupted=lambda: signal.SIGTERM)


# -- orch on a real namespace ------------------------------------------------------------------------------------------


def orch(state: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *argv, "--state-dir", str(state)]


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def profile(netns: str, tmp_path: Path) -> Path:
    file = tmp_path / "ftp.yaml"
    file.write_text(PROFILE.format(netns=netns))
    return file


@dataclass(slots=True)
class Child:
    """A command that runs on, whose lines are kept."""

    process: subprocess.Popen[str]
    lines: queue.Queue[str]

    def line_with(self, word: str) -> str:
        """The next line with a word in it."""
        while word not in (line := self.lines.get(timeout=WITHIN_S)):
            pass
        return line

    def lines_with(self, *words: str) -> None:
        """Lines with each of the words, in any order."""
        left = set(words)
        while left:
            line = self.lines.get(timeout=WITHIN_S)
            left = {word for word in left if word not in line}

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(WITHIN_S)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[Child]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_put_all, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            yield Child(process, lines)
        finally:
            process.kill()
            process.wait()
            reader.join()


def _put_all(stdout: IO[str], lines: queue.Queue[str]) -> None:
    for line in stdout:
        lines.put(line)


def inside(netns: str, *words: str) -> str:
    done = subprocess.run(["ip", "netns", "exec", netns, *words], check=True, capture_output=True, text=True)
    return done.stdout


def run_orch(state: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(orch(state, *argv), capture_output=True, text=True, check=False)
    if "does not exist" in done.stderr or "cannot be loaded" in done.stderr:
        pytest.skip(done.stderr)
    return done


@root
@pytest.mark.slow
def test_watch_mends_what_nf_tables_tells_of_says_who_did_it_and_never_fights(netns: str, profile: Path) -> None:
    state = profile.parent / "state"
    assert run_orch(state, "apply", str(profile)).returncode == 0
    table = inside(netns, "nft", "list", "table", "inet", "orch-ftp")
    with started(orch(state, "watch", "ftp", "--json", "--interval", "600", "--repairs", "2", "-v")) as watch:
        assert json.loads(watch.line_with('"right"'))["profile"] == "ftp"
        for change in ("flush ruleset", "flush table inet orch-ftp"):
            inside(netns, "nft", change)
            told = json.loads(watch.line_with('"mended"'))
            assert told["changed_by"].startswith("nft (pid ")
            assert [one["subject"] for one in told["changes"]] == ["inet orch-ftp"]
            assert inside(netns, "nft", "list", "table", "inet", "orch-ftp") == table
        inside(netns, "nft", "add table inet other; add chain inet other c")  # is nobody's concern
        inside(netns, "nft", "delete table inet orch-ftp")
        loud = watch.line_with("error: ")
        assert loud.startswith(
            f"error: profile ftp in netns {netns}: not mended any more: inet orch-ftp was mended 2 times"
        )
        assert "inet orch-ftp was mended 2 times" in json.loads(watch.line_with('"given up"'))["reason"]
        status = run_orch(state, "status")
        assert status.returncode == 2
        assert "not mended: inet orch-ftp was mended 2 times" in status.stdout
        with started(orch(state, "watch", "--json", "--interval", "600")) as another:
            assert "inet orch-ftp was mended 2 times" in json.loads(another.line_with('"given up"'))["reason"]
            assert another.end(signal.SIGTERM) == 0
        assert "given up: inet orch-ftp missing" in run_orch(state, "watch", "--once").stdout
        known = run_orch(state, "watch", "--once", "--news")
        assert (known.returncode, known.stdout) == (2, "")
        assert run_orch(state, "apply", str(profile)).returncode == 0
        assert inside(netns, "nft", "list", "table", "inet", "orch-ftp") == table
        inside(netns, "nft", "delete table inet orch-ftp")
        watch.line_with('"mended"')
        assert watch.end(signal.SIGTERM) == 0
    assert run_orch(state, "teardown", "ftp", "--netns", netns).returncode == 0


@root
@pytest.mark.slow
def test_once_mends_and_a_dry_run_does_not(netns: str, profile: Path) -> None:
    state = profile.parent / "state"
    assert run_orch(state, "apply", str(profile)).returncode == 0
    assert run_orch(state, "watch", "--once").returncode == 0
    nobodys = run_orch(state, "watch", "nobodys", "--once")
    assert (nobodys.returncode, nobodys.stderr) == (2, "warning: profile nobodys is not applied\n")
    inside(netns, "nft", "flush", "ruleset")
    dry = run_orch(state, "watch", "--once", "--dry-run")
    assert (dry.returncode, "inet orch-ftp missing" in dry.stdout) == (2, True)
    assert not inside(netns, "nft", "list", "ruleset")
    once = run_orch(state, "watch", "--once")
    assert (once.returncode, "mended: inet orch-ftp missing" in once.stdout) == (0, True)
    assert inside(netns, "nft", "list", "table", "inet", "orch-ftp")
    assert run_orch(state, "teardown", "--all").returncode == 0


@root
@pytest.mark.slow
def test_watch_goes_on_when_its_namespace_is_another_one(netns: str, profile: Path) -> None:
    state = profile.parent / "state"
    assert run_orch(state, "apply", str(profile)).returncode == 0
    with started(orch(state, "watch", "--netns", netns, "--interval", "0.2", "-v")) as watch:
        watch.line_with("right")
        subprocess.run(["ip", "netns", "delete", netns], check=True)
        assert run_orch(state, "status").returncode == 2
        subprocess.run(["ip", "netns", "add", netns], check=True)
        assert run_orch(state, "apply", str(profile)).returncode == 0
        inside(netns, "nft", "flush", "ruleset")
        watch.line_with("mended")
        assert watch.end(signal.SIGHUP) == 0
    assert run_orch(state, "teardown", "--all").returncode == 0


@root
@pytest.mark.slow
def test_a_signal_ends_once_in_order(netns: str, profile: Path) -> None:
    """What it has begun is undone, as with every command that changes something."""
    state = profile.parent / "state"
    assert run_orch(state, "apply", str(profile)).returncode == 0
    inside(netns, "nft", "flush", "ruleset")
    with (state / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with started(orch(state, "watch", "--once", "--wait", str(WITHIN_S))) as once:
            once.line_with("waiting for ")
            assert once.end(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "not mended" not in run_orch(state, "status").stdout
    assert run_orch(state, "teardown", "--all").returncode == 0


@root
@pytest.mark.slow
def test_a_supervisor_reconciles(netns: str, profile: Path) -> None:
    state = profile.parent / "state"
    with started(orch(state, "run", str(profile))) as service:
        service.lines_with("drift is mended from now on", "Verified.")  # a flush before that would undo the apply
        inside(netns, "nft", "flush", "ruleset")
        assert "nft (pid " in service.line_with("changed rules")
        service.line_with("mended: inet orch-ftp missing")
        assert inside(netns, "nft", "list", "table", "inet", "orch-ftp")
        profile.write_text(PROFILE.format(netns=netns).replace("reconcile: true", "reconcile: false"))
        service.process.send_signal(signal.SIGHUP)
        service.line_with("leave drift alone")
        service.line_with("Verified.")  # before that it would be taken for a failure of the apply, and undone
        inside(netns, "nft", "flush", "ruleset")
        status = run_orch(state, "status")
        assert "drift: inet orch-ftp: missing" in status.stdout
        assert service.end(signal.SIGTERM) == 0
    assert not inside(netns, "nft", "list", "ruleset")
