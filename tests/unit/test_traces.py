"""What is read from /proc, and how the end of a process is told."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.supervise import logs, traces, trust
from orchestrator.supervise.traces import Patience, QueueRow, Work
from tests.processes import begun


@pytest.mark.parametrize(
    "code, is_out_of_memory, words",
    [
        (0, False, "exited with 0"),
        (3, True, "exited with 3"),
        (-signal.SIGKILL, False, "killed by SIGKILL"),
        (-signal.SIGKILL, True, "killed by SIGKILL: out of memory"),
        (-signal.SIGSEGV, True, "killed by SIGSEGV"),
        (-signal.SIGRTMIN - 1, False, f"killed by signal {signal.SIGRTMIN + 1}"),
        (None, False, "ended"),
    ],
)
def test_how_it_ended(code: int | None, words: str, *, is_out_of_memory: bool) -> None:
    assert traces.how_it_ended(code, is_out_of_memory=is_out_of_memory) == words


def looks(*rows: tuple[int, int]) -> list[Work]:
    """What is made of (waiting, seen), look by look."""
    patience = Patience()
    return [patience.look([QueueRow(waiting, seen, is_ready=True)]) for waiting, seen in rows]


def test_one_hangs_that_answers_nothing_between_three_looks() -> None:
    assert looks((1, 1), (1, 1), (1, 1)) == [Work.BUSY, Work.BUSY, Work.HUNG]
    assert looks((1, 1), (2, 2), (9, 9)) == [Work.BUSY, Work.BUSY, Work.HUNG]


def test_one_that_answers_or_has_nothing_to_answer_does_not() -> None:
    assert looks((5, 5), (5, 6), (5, 6), (5, 7), (5, 7)) == [Work.BUSY] * 5
    assert looks((0, 9), (0, 9), (0, 9)) == [Work.BUSY, Work.IDLE, Work.IDLE]
    assert looks((0, 9), (0, 9), (1, 10), (0, 10)) == [Work.BUSY, Work.IDLE, Work.BUSY, Work.BUSY]


def test_a_process_is_known_by_when_it_was_born() -> None:
    assert traces.born(os.getpid()) == traces.born(os.getpid()) > 0
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert traces.born(child.pid) == 0, "a zombie is no process"


def test_a_process_is_stopped_or_not() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert not traces.is_stopped(child.pid)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert traces.is_stopped(child.pid)
        child.kill()


def test_a_process_is_found_by_its_environment_if_it_is_ours() -> None:
    environment = {"ORCH_PROCESS": str(uuid4())}
    with begun(subprocess.Popen(["sleep", "1000"], env={**os.environ, **environment})) as child:
        try:
            assert traces.with_environment(environment, lambda pid: pid != child.pid) == 0
            assert traces.with_environment(environment, lambda pid: pid == child.pid) == child.pid
        finally:
            child.kill()


def test_of_an_environment_no_more_is_read_than_ours_has() -> None:
    """Anybody can make one of gigabytes."""
    environment = {"FIRST": "1", **{f"V{number}": "x" * 100_000 for number in range(4)}}
    with begun(subprocess.Popen(["sleep", "1000"], env=environment)) as child:
        try:
            seen = traces.variables(child.pid)
            assert seen[0] == b"FIRST=1"
            assert sum(map(len, seen)) < 100_000
        finally:
            child.kill()


def test_what_cannot_be_read_is_not_gone() -> None:
    """Else another process would be started beside it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    for read in (traces.born, traces.is_stopped, trust.is_root):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                read(os.getpid())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_last_line_is_fit_for_a_terminal(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"first\nlast \x1b[2J\xff\n\n")
    assert traces.last_line(str(log)) == "last ?[2J\ufffd"
    assert traces.last_line(str(tmp_path / "none")) == ""


def test_a_tail_has_every_line_once_and_begins_anew_when_the_log_was_emptied(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    tail = logs.Tail(str(log), from_end=False)
    assert tail.lines() == []
    log.write_text("one\ntw")
    assert tail.lines() == ["one"]
    with log.open("a") as file:
        file.write("o\nthree\n")
    assert tail.lines() == ["two", "three"]
    log.write_text("4\n")
    assert tail.lines() == ["4"]
    assert logs.Tail(str(log), from_end=True).lines() == []


def test_a_log_is_cut_only_when_it_is_long(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"x" * logs.LOG_BYTES)
    assert not logs.bound(str(log))
    with log.open("ab") as writer:
        writer.write(b"y")
        writer.flush()
        assert logs.bound(str(log))
        writer.write(b"z")
    assert log.read_bytes() == b"z"
    assert len(Path(f"{log}.old").read_bytes()) == logs.LOG_BYTES + 1
