"""Marks of registrations that nobody hears somewhere."""

from __future__ import annotations

import fcntl
from pathlib import Path

from orchestrator.model import HelperKey, L3Proto, L4Proto
from orchestrator.supervise.deafness import Marks, key_name

FTP = key_name(HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP))
FTP6 = key_name(HelperKey("ftp-us", L3Proto.IP6, L4Proto.TCP))


def test_one_dead_listener_is_enough_and_all_must_be_back(tmp_path: Path) -> None:
    here, there = Marks(str(tmp_path), "edge@4-1"), Marks(str(tmp_path), "edge@4-2")
    assert not here.is_deaf(FTP)
    there.set([FTP])
    here.set([FTP, FTP6])
    here.clear([FTP])
    assert here.is_deaf(FTP)
    assert here.is_deaf(FTP6)
    there.clear_all()
    assert not here.is_deaf(FTP)
    assert there.is_deaf(FTP6)
    here.clear_all()
    assert not here.is_deaf(FTP6)


def test_the_lock_is_that_of_the_ledger_and_never_waited_for(tmp_path: Path) -> None:
    marks = Marks(str(tmp_path), "edge@4-1")
    with (tmp_path / "lock").open("w") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        with marks.locked() as is_mine:
            assert not is_mine
    with marks.locked() as is_mine, marks.locked() as is_mine_too:
        assert (is_mine, is_mine_too) == (True, False)
