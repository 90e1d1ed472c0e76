"""One thread for all that a supervisor waits for."""

from __future__ import annotations

import time
from pathlib import Path

from orchestrator.supervise import inotify
from orchestrator.supervise.inotify import Change
from orchestrator.supervise.reactor import Reactor

_WITHIN_S = 30.0


def test_each_is_told_what_it_asked_for_of_a_directory_that_others_watch_too(tmp_path: Path) -> None:
    """One instance for all: the second to watch a directory does not take it from the first."""
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    told: dict[str, set[str]] = {"written": set(), "gone": set(), "elsewhere": set()}
    reactor = Reactor()

    def tell(who: str, changes: list[Change]) -> None:
        told[who] |= {change.name for change in changes}
        if all(told.values()):
            reactor.end()

    reactor.watch_files(str(one), inotify.MODIFIED, lambda changes: tell("written", changes))
    reactor.watch_files(str(one), inotify.DELETED, lambda changes: tell("gone", changes))
    reactor.watch_files(str(two), inotify.CREATED, lambda changes: tell("elsewhere", changes))
    (one / "log").write_text("a line")
    (one / "socket").touch()
    (one / "socket").unlink()
    reactor.at(time.monotonic(), (two / "other").mkdir)
    reactor.at(time.monotonic() + _WITHIN_S, reactor.end)
    reactor.loop(())
    assert told == {"written": {"log"}, "gone": {"socket"}, "elsewhere": {"other"}}
