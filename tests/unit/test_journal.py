"""The ledger: what survives, what is forgotten, and who may write."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import cli, journal
from orchestrator.errors import LedgerVersionError, OrchError, RefusedError
from orchestrator.fake import HOST, FakeKernel
from orchestrator.journal import Ledger
from orchestrator.launches import launches
from orchestrator.model import Backend, HelperKey, L3Proto, L4Proto, Listing, Netns, Policy, Registration, Status
from orchestrator.ports import ProcessSeen
from orchestrator.serial import from_json, to_json
from orchestrator.session import ExitCode
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
    Mending,
    Owner,
    Pending,
    RemoveRules,
    Repair,
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


def contents(directory: Path) -> list[str]:
    with closing(sqlite3.connect(directory / "ledger.sqlite")) as database:
        return list(database.iterdump())


def alter(directory: Path, script: str) -> None:
    with closing(sqlite3.connect(directory / "ledger.sqlite", isolation_level=None)) as database:
        database.executescript(script)


NEWER = """
UPDATE meta SET value = '99' WHERE key = 'schema';
UPDATE meta SET value = '9.1' WHERE key = 'version';
ALTER TABLE applied RENAME COLUMN value TO something;
DROP TABLE stale;
"""


@pytest.mark.parametrize("create", [True, False])
def test_what_a_newer_orch_wrote_is_neither_read_nor_lost(tmp_path: Path, *, create: bool) -> None:
    open_ledger(tmp_path).settle_applied(None, applied())
    alter(tmp_path, NEWER)
    before = contents(tmp_path)
    with pytest.raises(LedgerVersionError, match=r"of a newer orch: 9\.1") as caught:
        open_ledger(tmp_path, create=create)
    assert "schema 99" in caught.value.where
    assert contents(tmp_path) == before


@pytest.mark.parametrize("version", [None, "1.0"])
def test_a_newer_one_of_another_boot_speaks_of_nothing(tmp_path: Path, version: str | None) -> None:
    open_ledger(tmp_path).settle_applied(None, applied())
    alter(tmp_path, NEWER + ("" if version else "DELETE FROM meta WHERE key = 'version';"))
    assert not open_ledger(tmp_path, "boot-2", create=False).applied()
    ledger = open_ledger(tmp_path, "boot-2")
    ledger.settle_applied(None, applied())
    assert open_ledger(tmp_path, "boot-2", create=False).applied() == (applied(),)


def test_an_older_one_begins_anew(tmp_path: Path) -> None:
    open_ledger(tmp_path).settle_applied(None, applied())
    alter(tmp_path, "UPDATE meta SET value = '1' WHERE key = 'schema'; DROP TABLE history; DROP TABLE use;")
    assert not open_ledger(tmp_path, create=False).applied()
    ledger = open_ledger(tmp_path)
    assert not ledger.applied()
    ledger.settle_applied(None, applied())
    assert ledger.history(Owner("ftp", HOST))


def test_one_that_was_only_begun_is_empty(tmp_path: Path) -> None:
    """Killed between making the file and writing into it."""
    (tmp_path / "ledger.sqlite").touch()
    assert not open_ledger(tmp_path, create=False).applied()
    assert not open_ledger(tmp_path).applied()


def read_all(ledger: Ledger) -> tuple[object, ...]:
    owner = Owner("ftp", HOST)
    return (
        *(ledger.applied(), ledger.owners(), ledger.find(owner), ledger.neighbours(Owner("other", HOST))),
        *(ledger.recorded(), ledger.users(), ledger.stale(owner), ledger.cookie(HOST), ledger.mending(owner)),
        *(ledger.unsettled(), ledger.pending(), ledger.waiting(), ledger.history(owner), ledger.remembered()),
    )


def filled(directory: Path) -> None:
    """Something in every table."""
    with closing(open_ledger(directory)) as ledger:
        ledger.recognise(HOST, 7)
        ledger.settle_applied(None, applied())
        ledger.settle_applied(None, applied(netns=BLUE))
        ledger.remember_mending(Owner("ftp", HOST), Mending(repairs=(Repair("rules", 1.0),)))
        waiting = Pending(Owner("ftp", BLUE), "ftp.yaml", applied(), 60.0, 100.0)
        ledger.begin("apply", Owner("ftp", BLUE), steps(), pending=waiting)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("filled")
    filled(directory)
    return (directory / "ledger.sqlite").read_bytes()


@given(data=st.data(), create=st.booleans())
@settings(deadline=None)
def test_a_damaged_one_is_told_and_raises_nothing_else(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, *, create: bool
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    file = directory / "ledger.sqlite"
    start = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
    damage = data.draw(st.binary(min_size=1, max_size=64))
    file.write_bytes(content[:start] + damage + content[start + len(damage) :])
    told: list[OrchError] = []
    try:
        with closing(open_ledger(directory, create=create)) as ledger:
            read_all(ledger)
    except OrchError as error:
        told.append(error)
    assert all(error.what.startswith("the ledger ") and error.where.startswith(str(file)) for error in told)


@pytest.mark.parametrize("create", [True, False])
def test_what_is_no_ledger_stays_as_it_is(tmp_path: Path, *, create: bool) -> None:
    """It may have known of half-done work, and of a confirmation that waits: a person takes it away, not we."""
    file = tmp_path / "ledger.sqlite"
    file.write_bytes(b"nonsense" * 1000)
    with pytest.raises(OrchError, match="the ledger cannot be read: file is not a database") as caught:
        open_ledger(tmp_path, create=create)
    assert caught.value.hint.startswith(f"mv {file} {file}.broken: ")
    assert file.read_bytes() == b"nonsense" * 1000


def test_a_value_that_is_none_is_told(tmp_path: Path) -> None:
    open_ledger(tmp_path).settle_applied(None, applied())
    alter(tmp_path, """UPDATE applied SET value = '{"is": "Applied"}'; UPDATE use SET key = key || '/x';""")
    ledger = open_ledger(tmp_path, create=False)
    for read in (ledger.applied, lambda: ledger.find(Owner("ftp", HOST)), ledger.users):
        with pytest.raises(OrchError, match="the ledger cannot be read"):
            read()


def test_one_that_another_program_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ledger(tmp_path).settle_applied(None, applied())
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0))
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for create in (True, False):
            with pytest.raises(OrchError, match="database is locked") as caught:
                open_ledger(tmp_path, create=create).applied()
            assert caught.value.hint == "another program holds it: try again"


@pytest.mark.parametrize("content", [b"nonsense" * 1000, None])
@pytest.mark.parametrize("words", ["status", "history", "teardown ftp", "confirm", "rollback", "diff {}", "apply {}"])
def test_every_command_tells_it_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, content: bytes | None
) -> None:
    profile = tmp_path / "ftp.yaml"
    profile.write_text("profile: ftp\nhelpers: {ftp: {engine: kernel}}\n")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    open_ledger(tmp_path, boot_id).close()
    alter(tmp_path, NEWER)
    if content:
        (tmp_path / "ledger.sqlite").write_bytes(content)
    before = (tmp_path / "ledger.sqlite").read_bytes()
    assert cli.run([*words.format(profile).split(), "--state-dir", str(tmp_path)]) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert said.startswith("error: the ledger ")
    assert said.count("error:") == 1
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


def test_looking_creates_nothing(tmp_path: Path) -> None:
    assert not open_ledger(tmp_path / "state", create=False).applied()
    assert not (tmp_path / "state").exists()


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OrchError, match="cannot use the state directory: File exists") as caught:
        open_ledger(tmp_path / "file")
    assert (caught.value.where, caught.value.hint) == (str(tmp_path / "file"), "set --state-dir")


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
