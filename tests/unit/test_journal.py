"""The ledger: what survives, what is forgotten, and who may write."""

from __future__ import annotations

import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import journal
from orchestrator.errors import OrchError, RefusedError
from orchestrator.fake import HOST, FakeKernel
from orchestrator.journal import Ledger
from orchestrator.launches import launches
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Listing, Netns, Policy, Registration, Status
from orchestrator.ports import ProcessSeen
from orchestrator.serial import from_json, to_json
from orchestrator.state import (
    Applied,
    CreateRegistration,
    DeleteRegistration,
    DrainQueues,
    FlushRules,
    HelperSummary,
    KeepRegistrations,
    LoadModule,
    LoadRules,
    Owner,
    RemoveRules,
    StartProcess,
    Step,
    StopProcess,
    Unsettled,
    UpdateRegistration,
    WatchProcess,
    describe,
    inverse,
)
from tests.hosts import FTP, both

BLUE = Netns("blue", "/run/netns/blue", "0:7")
KEY = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
FTP_US = Registration(KEY, 36160, Status.DISABLED, (Policy("ftp", 1, 300),), 24)


def applied(profile: str = "ftp", netns: Netns = HOST) -> Applied:
    desired, target = both(FTP)
    return Applied(
        owner=Owner(profile, netns),
        source="ftp.yaml",
        applied_at=1.5,
        target=target,
        baseline=Listing(Backend.NFTABLES, target.rules.digest, "text", frozenset({KEY})),
        tool="nft 1",
        helpers=tuple(HelperSummary(h.name, h.engine, h.keys) for h in desired.helpers),
    )


def steps() -> list[Step]:
    """One of every kind."""
    target = applied().target
    launch = launches("ftp", BLUE, target.processes, target.documents)[0]
    seen = ProcessSeen("ftp", BLUE.identity, "conntrackd", 7, "digest", 1.0, watched=True)
    return [
        LoadModule("nf_conntrack_ftp"),
        CreateRegistration(FTP_US),
        UpdateRegistration(FTP_US, replace(FTP_US, status=Status.ENABLED)),
        DeleteRegistration(FTP_US),
        KeepRegistrations((FTP_US,)),
        StartProcess(launch),
        StopProcess(seen, None),
        StopProcess(seen, launch),
        WatchProcess(launch, seen),
        DrainQueues((1, 2)),
        LoadRules(None, target.rules),
        LoadRules(target.rules, target.rules),
        FlushRules(target.rules),
        RemoveRules(target.rules),
    ]


def open_ledger(directory: Path, boot: str = "boot-1", *, create: bool = True) -> Ledger:
    return Ledger.open(directory, boot_id=boot, create=create)


@pytest.mark.parametrize("step", steps(), ids=describe)
def test_every_step_survives_a_crash(tmp_path: Path, step: Step) -> None:
    ledger = open_ledger(tmp_path)
    planned = (step, *steps())
    tx = ledger.begin("apply", Owner("ftp", BLUE), planned)
    for sequence in (0, 1):
        ledger.intend(tx, sequence)
    ledger.undone(tx, 1)
    ledger.close()
    (unsettled,) = open_ledger(tmp_path).unsettled()
    assert unsettled == Unsettled(tx, "apply", Owner("ftp", BLUE), planned, ((0, step),))


@pytest.mark.parametrize("step", steps(), ids=describe)
def test_the_way_back_of_the_way_back_is_the_way(step: Step) -> None:
    back = inverse(step, BLUE)
    if back is None or isinstance(step, StartProcess | StopProcess | FlushRules | RemoveRules | LoadRules):
        return  # these forget on the way what only the way back needs
    assert inverse(back, BLUE) == step


def test_what_was_applied_is_found_again(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.settle_applied(None, applied())
    ledger.settle_applied(None, applied(netns=BLUE))
    again = open_ledger(tmp_path, create=False)
    assert again.find(Owner("ftp", HOST)) == applied()
    assert again.applied() == (applied(), applied(netns=BLUE))
    assert again.users()[KEY] == (Owner("ftp", HOST), Owner("ftp", BLUE))
    assert again.neighbours(Owner("other", BLUE)) == (applied(netns=BLUE),)


def test_registrations_are_forgotten_with_their_last_user(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.settle_applied(None, applied())
    ledger.settle_applied(None, applied(netns=BLUE))
    ledger.settle_removed(None, Owner("ftp", HOST))
    assert KEY in ledger.recorded()
    ledger.settle_removed(None, Owner("ftp", BLUE))
    assert not ledger.recorded()


def test_a_registration_that_had_to_stay_stays_ours(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.settle_applied(None, applied())
    ledger.settle_removed(None, Owner("ftp", HOST), live=(KEY,))
    assert list(ledger.recorded()) == [KEY]


def test_a_write_in_which_orch_was_killed_never_was(tmp_path: Path) -> None:
    """Who looks rolls it back as well; else status would know nothing until the next command that writes."""
    open_ledger(tmp_path).settle_applied(None, applied())
    pid = os.fork()
    if not pid:
        database = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
        database.execute("PRAGMA cache_size = 1")  # what does not fit is in the file before the commit
        database.execute("BEGIN IMMEDIATE")
        database.execute("DELETE FROM applied")
        database.executemany("INSERT INTO meta VALUES (?, ?)", [(f"key {n}", "x" * 1000) for n in range(100)])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "ledger.sqlite-journal").exists()
    assert open_ledger(tmp_path, create=False).applied() == (applied(),)


def test_another_boot_is_another_world(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.settle_applied(None, applied())
    ledger.close()
    assert not open_ledger(tmp_path, "boot-2", create=False).applied()
    assert not open_ledger(tmp_path, "boot-2").applied()


def test_of_two_that_begin_a_boot_the_second_keeps_what_the_first_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The services of several profiles start at once: each finds a ledger that is not of this boot."""
    look, looked = journal._origin, []

    def slow(db: sqlite3.Connection) -> tuple[str, int]:
        found = look(db)
        looked.append(found)
        if len(looked) == 1:
            open_ledger(tmp_path).settle_applied(None, applied())
        return found

    monkeypatch.setattr(journal, "_origin", slow)
    assert open_ledger(tmp_path).applied() == (applied(),)


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert not open_ledger(tmp_path / "state", create=False).applied()
    assert not (tmp_path / "state").exists()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OrchError, match="cannot use the state directory"):
        open_ledger(tmp_path / "file")


def test_the_lock_says_who_holds_it(tmp_path: Path) -> None:
    clock = FakeKernel().system().clock
    said: list[str] = []
    with open_ledger(tmp_path).locked("apply a.yaml", wait_s=0, clock=clock):
        with (
            pytest.raises(RefusedError, match=r"busy: orch apply a.yaml \(pid \d+\) holds the lock"),
            open_ledger(tmp_path).locked("apply b.yaml", wait_s=2.5, clock=clock, say=said.append),
        ):
            pass
        assert clock.monotonic() == pytest.approx(2.5, abs=0.1)
    assert said == [f"waiting for orch apply a.yaml (pid {os.getpid()}), at most 2.5 s"]
    with open_ledger(tmp_path).locked("apply b.yaml", wait_s=0, clock=clock):
        pass


@pytest.mark.parametrize("text", ['{"is": "Owner"}', '{"profile": 3, "netns": {}}', "null", "[]", "{"])
def test_what_is_no_owner_is_refused(text: str) -> None:
    with pytest.raises((TypeError, ValueError, LookupError)):
        from_json(Owner, text)


def test_values_come_back_equal() -> None:
    for step in steps():
        assert from_json(Step, to_json(step)) == step
