"""How expectations end, as `orch events` and `orch status` tell it: real FTP sessions through a router."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from lab.control import Control, control
from lab.ends import FTP_PORT
from lab.topology import ROUTER, ftp, inside
from orchestrator.events import ExpectationEvent, Stream
from orchestrator.kernel.netns import find
from orchestrator.ports import Lifetimes
from orchestrator.status import HelperState
from tests.hosts import Harness
from tests.waiting import until

PROFILE = """
profile: ftp
helpers:
  ftp:
    engine: native
    attach: [{{path: incoming, ports: [21, {port}]}}]
    policies: {{ftp: {{expect_max: 1, expect_timeout: {timeout}}}}}
"""


def lifetimes(orch: Harness) -> Lifetimes:
    """What the supervisor has counted."""
    return orch.system.processes.lifetimes("ftp", find(ROUTER)).get("ftp-us", Lifetimes())


@contextmanager
def listening(orch: Harness) -> Iterator[list[str]]:
    """What `orch events` would say became of expectations, in a list that grows."""
    seen: list[str] = []
    reading, writing = os.pipe()
    app = orch.app()
    stream = Stream(app.applied, orch.system.processes, orch.state_dir, is_whole=True, output=writing)
    stream.open()
    assert stream.places == (ROUTER,)

    def listen() -> None:
        with suppress(BrokenPipeError):
            for event in stream.events():
                if isinstance(event, ExpectationEvent):
                    seen.append(event.fate)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield seen
    finally:
        os.close(reading)  # nobody reads any more: it ends
        listener.join()
        stream.close()
        os.close(writing)


def announce(talk: Control, port: int, orch: Harness, made: int) -> None:
    """A data connection that nobody opens."""
    talk.announce("PASV", port)
    until(lambda: lifetimes(orch).made == made, f"{made} were made")


def test_each_end_has_its_reason(orch: Harness) -> None:
    orch.apply(PROFILE.format(port=FTP_PORT, timeout="5m"), ROUTER)
    with listening(orch) as seen:
        assert ftp("--disable-epsv").returncode == 0
        until(lambda: lifetimes(orch) == Lifetimes(made=1, used=1), "one was used")

        with control() as talk:
            announce(talk, 40001, orch, made=2)
            announce(talk, 40002, orch, made=3)  # there may be one: it takes the place of the other
            inside(ROUTER, "conntrack", "-D", "-p", "tcp", "--dport", str(FTP_PORT))
        until(lambda: lifetimes(orch) == Lifetimes(made=3, used=1, cancelled=2), "one had no room, one no master")

        orch.apply(PROFILE.format(port=FTP_PORT, timeout="1s"), ROUTER)
        with control() as talk:
            announce(talk, 40003, orch, made=4)
            over = time.monotonic() + 2
            until(lambda: time.monotonic() > over, "its time is over")
            announce(talk, 40004, orch, made=5)  # new kernels have no timers: they tell when they come across it
            until(lambda: lifetimes(orch).expired >= 1, "one expired")
            (profile,) = orch.status().profiles
        until(lambda: len(seen) >= 9, "the stream has told all")
    (helper,) = profile.helpers
    assert helper.state is HelperState.RUNNING
    assert helper.connections
    assert helper.lifetimes is not None
    assert replace(helper.lifetimes, expired=1) == Lifetimes(made=5, used=1, expired=1, cancelled=2)
    assert seen[:9] == ["made", "used", "made", "cancelled", "made", "cancelled", "made", "expired", "made"]
