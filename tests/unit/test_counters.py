"""The page of a helper process: what is written is what is read, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.engine import counters
from orchestrator.engine.counters import Counters, Page, State


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "ftp.stats")


def test_what_is_written_is_read(path: str) -> None:
    page = Page(path)
    page.state = State.READY
    values = {field.name: number << 40 for number, field in enumerate(fields(Counters))}
    page.counters = Counters(**values)
    before = counters.read(path)
    page.beat()
    after = counters.read(path)
    assert (before.state, before.counters) == (State.STARTING, Counters())
    assert (after.state, after.counters, after.pid) == (State.READY, Counters(**values), os.getpid())
    assert after.beats == before.beats + 1
    assert after.beat_ns > before.beat_ns


@pytest.mark.parametrize(
    "text, read",
    [("refused: port 22", "refused: port 22"), ("a\x1b[2Jb\n", "a?[2Jb?"), ("\udcff", "?"), ("x" * 1000, "x" * 200)],
    ids=["plain", "control characters", "no text", "long"],
)
def test_a_note_is_one_printable_line(path: str, text: str, read: str) -> None:
    page = Page(path)
    page.note(text)
    assert not counters.read(path).note
    page.beat()
    assert counters.read(path).note == read


def test_nobody_else_may_read_it(path: str) -> None:
    Page(path)
    assert Path(path).stat().st_mode & 0o777 == 0o600


def test_a_successor_has_a_page_of_its_own(path: str) -> None:
    old, new = Page(path), Page(path)
    old.counters.packets = 7
    old.beat()
    assert counters.read(path).counters.packets == 0
    new.counters.packets = 1
    new.beat()
    assert counters.read(path).counters.packets == 1


@pytest.mark.slow
def test_a_reader_never_sees_half_of_a_write(path: str) -> None:
    page, stop = Page(path), threading.Event()

    def write() -> None:
        while not stop.is_set():
            for field in fields(Counters):
                setattr(page.counters, field.name, getattr(page.counters, field.name) + 1)
            page.beat()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # else the writer may keep the interpreter for 5 ms each time
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            seen = counters.read(path).counters
            assert len({getattr(seen, field.name) for field in fields(Counters)}) == 1
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)


def test_a_write_that_was_never_finished_is_told(path: str) -> None:
    Page(path)
    with Path(path).open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(ValueError, match="while it wrote"):
        counters.read(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\0" * 4096])
def test_what_is_no_page_is_refused(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"page|empty"):
        counters.read(path)


def test_the_page_of_a_dead_process_is_taken_over(path: str) -> None:
    """A full disk has no room for another."""
    program = (
        "import sys; sys.path.append(sys.argv[2]); from orchestrator.engine.counters import Page; Page(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, path, str(Path(counters.__file__).parents[2])], check=True)
    inode = Path(path).stat().st_ino
    page = Page(path)
    assert Path(path).stat().st_ino == inode
    page.beat()
    assert counters.read(path).pid == os.getpid()
