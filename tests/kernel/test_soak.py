"""Hours of an operator's life in minutes: applies, updates, deaths, drift and traffic at random, and nothing is left.

Not in the suite: `make soak` sets ORCH_SOAK_S, how many seconds it takes, and ORCH_SOAK_SEED repeats a run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lab.control import control
from lab.ends import FTP_PORT, TFTP_PORT
from lab.topology import CLIENT, ROUTER, ROUTER_FILTER, SERVER, inside, load_filter
from orchestrator.kernel.netns import find
from orchestrator.model import Status
from orchestrator.reports import Report
from orchestrator.supervise.launcher import LocalProcesses
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch, cli_here, snapshot
from tests.reports import REPORTS
from tests.trials import kill_watchdogs, pass_time, waiting
from tests.waiting import until

SECONDS = float(os.environ.get("ORCH_SOAK_S", "0"))
SEED = int(os.environ.get("ORCH_SOAK_SEED", "0")) or random.SystemRandom().getrandbits(32)
FIGURES = REPORTS.setdefault("soak", [])

GROWTH_KB = 4096
"""What a process may grow by: an allocator that never gives back what a large moment took."""

_WARM_ACTIONS = 12  # before what a process holds is looked at for the first time


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds: resident memory in kB, and descriptors."""

    memory_kb: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        memory = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        return cls(int(memory), len(list(Path(f"/proc/{pid}/fd").iterdir())))


@dataclass(slots=True)
class Soak:
    """One host with a profile on its router, and profiles of the same helper in two more namespaces now and then."""

    orch: Harness
    random: random.Random
    text: str = ""
    is_applied: bool = False
    done: Counter[str] = field(default_factory=Counter)
    first: dict[int, Held] = field(default_factory=dict)
    last: dict[int, Held] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def processes(self) -> LocalProcesses:
        processes = self.orch.system.processes
        assert isinstance(processes, LocalProcesses)
        return processes

    def act(self) -> None:
        actions = {
            self.update: 6, self.again: 1, self.remove: 1, self.share: 2, self.part: 2,
            self.kill_helper: 3, self.stop_helper: 1, self.kill_supervisor: 2,
            self.kill_apply: 3, self.kill_teardown: 1, self.try_out: 3,
            self.flush: 2, self.delete_table: 1, self.disable: 1,
        }  # fmt: skip
        (action,) = self.random.choices(list(actions), list(actions.values()))
        self.note(action.__name__)
        action()
        self.done[action.__name__] += 1
        self.check()

    def note(self, text: str) -> None:
        self.log.append(f"{time.monotonic():.1f} {text}")

    # -- what an operator does ----------------------------------------------------------------------------------------

    def update(self) -> None:
        """Another variant of the profile, or the first."""
        self.text = self._variant()
        self._apply()

    def again(self) -> None:
        self._apply()

    def remove(self) -> None:
        self.orch.teardown(netns=ROUTER)
        self.is_applied = False

    def share(self) -> None:
        """The same helper in another namespace: the registration is shared."""
        if self.is_applied:
            self.orch.apply(self.text.replace("profile: soak", "profile: guest"), self.random.choice([CLIENT, SERVER]))

    def part(self) -> None:
        self.orch.teardown("guest", self.random.choice([CLIENT, SERVER]))

    def _variant(self) -> str:
        pick = self.random.choice
        guests = any(owner.owner.profile == "guest" for owner in self.orch.app().applied())
        if guests and self.text:  # who shares a registration cannot change it alone
            return self.text
        queueing, backend = pick([("rules", "nftables"), ("registration", "nftables"), ("registration", "iptables")])
        queue = pick(["auto", "700", "800"])
        process = "{restart_limit: 1000, restart_window: 1s}"
        ftp = (
            f"  ftp: {{queueing: {queueing}, queue: {queue}, attach: [{{path: incoming, ports: {FTP_PORT}}}], "
            f"policies: {{ftp: {{expect_max: {pick([1, 4, 8])}}}}}, process: {process}}}\n"
        )
        tftp = f"  tftp: {{queueing: {queueing}, attach: [{{path: incoming, ports: {TFTP_PORT}}}]}}\n"
        reconcile = pick(["true", "false"])
        return f"profile: soak\nbackend: {backend}\nreconcile: {reconcile}\nhelpers:\n{ftp}{pick([tftp, ''])}"

    def _apply(self) -> None:
        self.text = self.text or self._variant()
        self.orch.apply(self.text, ROUTER)
        self.is_applied = True

    def try_out(self) -> None:
        """An apply that has to be confirmed: it is, or it is undone by whoever is there."""
        text, state = self._variant(), self.orch.state_dir
        profile = state.parent / "tried.yaml"
        profile.write_text(text)
        argv = ("apply", str(profile), "--netns", ROUTER, "--yes", "--confirm-within", "3600")
        assert cli_here(*argv, state=state).returncode == 0
        fate = self.random.choice(["confirm", "rollback", "overdue", "unwatched"])
        if not waiting(state):  # only drift was mended, and that is on no trial
            fate = "confirm"
        elif fate in ("confirm", "rollback"):
            assert cli_here(fate, "soak", "--netns", ROUTER, state=state).returncode == 0
        else:
            if fate == "unwatched":
                kill_watchdogs(state)
            pass_time(state)
            if fate == "overdue":
                until(lambda: not waiting(state), "it is undone")
        self.done[f"try_out: {fate}"] += 1
        if fate == "confirm":
            self.text, self.is_applied = text, True

    # -- what happens to processes ------------------------------------------------------------------------------------

    def kill_helper(self) -> None:
        self._signal_helper(signal.SIGKILL)

    def stop_helper(self) -> None:
        self._signal_helper(signal.SIGSTOP)

    def _signal_helper(self, number: int) -> None:
        for seen in self.orch.system.processes.running():
            if seen.name == "ftp" and seen.netns == find(ROUTER).identity and seen.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seen.pid, number)

    def kill_supervisor(self) -> None:
        for pid in self.processes.supervisors("soak", find(ROUTER).identity):
            os.kill(pid, signal.SIGKILL)

    # -- what happens to orch -----------------------------------------------------------------------------------------

    def kill_apply(self) -> None:
        """SIGKILL in the middle of an update, wherever that is."""
        text = self._variant()
        if self._killed("apply", "-", "--netns", ROUTER, "--yes", text=text):
            self.note("killed in time")
            self.done["kill_apply in time"] += 1
        else:
            self.text, self.is_applied = text, True

    def kill_teardown(self) -> None:
        if self._killed("teardown", "soak", "--netns", ROUTER, "--yes"):
            self.done["kill_teardown in time"] += 1

    def _killed(self, *argv: str, text: str = "") -> bool:
        """True if it was killed before its end."""
        process = subprocess.Popen(
            [".venv/bin/python", "-m", "orchestrator", *argv],
            env={**os.environ, "ORCH_STATE_DIR": str(self.orch.state_dir)},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        try:
            process.wait(self.random.uniform(0.5, 8.0))
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait() == -signal.SIGKILL

    # -- what others do -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self.is_applied:
            inside(ROUTER, "nft", "flush", "table", "inet", "orch-soak", check=False)

    def delete_table(self) -> None:
        if self.is_applied:
            inside(ROUTER, "nft", "delete", "table", "inet", "orch-soak", check=False)

    def disable(self) -> None:
        for registration in self.orch.system.registry.dump():
            if registration.status is Status.ENABLED:
                self.orch.system.registry.update(replace(registration, status=Status.DISABLED))

    # -- what must be so whatever happened ----------------------------------------------------------------------------

    def check(self) -> None:
        """A new session is not held up; then orch settles and mends, and helped connections work again."""
        with control() as talk:
            talk.chat()
        if not self.is_applied:
            return
        self._apply()
        assert self.orch.diff(self.text, ROUTER).plan.is_empty
        until(lambda: self._drift() == (), lambda: f"no drift: {self._drift()}")
        with control() as talk:
            talk.transfer("PORT", self.random.randrange(40000, 41000))
        self._look()

    def _drift(self) -> tuple[str, ...]:
        return next(p.drift for p in self.orch.status("soak", ROUTER).profiles)

    def _look(self) -> None:
        gc.collect()
        pids = [os.getpid(), *self.processes.supervisors("soak", find(ROUTER).identity)]
        for pid in pids:
            held = Held.of(pid)
            if pid != os.getpid() or sum(self.done.values()) >= _WARM_ACTIONS:
                self.first.setdefault(pid, held)
            self.last[pid] = held

    def evidence(self) -> Iterator[str]:
        """What there is on the router, and what supervisors and helper processes said last."""
        yield self.text
        yield from map(str, self.orch.system.registry.dump())
        for seen in self.orch.status("soak", ROUTER).profiles:
            yield from map(str, (*seen.drift, *seen.helpers))
        for command in (("nft", "list", "ruleset"), ("iptables-save", "-t", "raw"), ("conntrack", "-L")):
            yield inside(ROUTER, *command, check=False).stdout
        for file in sorted(self.orch.state_dir.glob("*/*.log")):
            yield f"{file.parent.name}/{file.name}:\n" + "\n".join(file.read_text(errors="replace").splitlines()[-40:])

    def grown(self) -> list[str]:
        """Processes that hold more than at first."""
        return [
            f"pid {pid}: {self.first[pid]} -> {held}"
            for pid, held in self.last.items()
            if pid in self.first
            and (
                held.memory_kb > self.first[pid].memory_kb + GROWTH_KB
                or held.descriptors > self.first[pid].descriptors + 2
            )
        ]


@pytest.fixture
def soak(routed: None, tmp_path: Path) -> Iterator[Soak]:
    with clean_orch(tmp_path / "state") as orch:
        load_filter(ROUTER, ROUTER_FILTER)
        yield Soak(orch, random.Random(SEED))


def rows(state_dir: Path) -> dict[str, int]:
    """Rows by table of the ledger, but for the history, and by what its namespaces are known again."""
    with contextlib.closing(sqlite3.connect(state_dir / "ledger.sqlite")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {name: int(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]) for name in tables}
    return {name: count for name, count in counts.items() if count and name not in ("meta", "history", "namespace")}


def test_nothing_is_left_after_hours(soak: Soak) -> None:
    before = snapshot()
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            soak.act()
    except BaseException as error:
        print(f"seed {SEED}", *soak.log[-30:], *getattr(error, "leftovers", ()), *soak.evidence(), sep="\n")
        raise
    reports: list[Report] = list(soak.orch.teardown(every_netns=True).reports)
    assert [report.leftovers for report in reports if report.leftovers] == []
    until(lambda: snapshot() == before, "what was started has ended")
    assert rows(soak.orch.state_dir) == {}
    assert {p.name for p in soak.orch.state_dir.iterdir() if p.is_dir() and any(p.iterdir())} == set()
    assert soak.grown() == []
    FIGURES.append(f"seed {SEED}: {sum(soak.done.values())} in {SECONDS:g} s: {dict(sorted(soak.done.items()))}")
    FIGURES.append(f"held by this process: {soak.first.get(os.getpid())} -> {soak.last.get(os.getpid())}")
