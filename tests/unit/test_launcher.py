"""Native helper processes that cannot start, as orch starts them: each says why in one line, and is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import HelperProcessError
from orchestrator.kernel.netns import find
from orchestrator.model import Netns
from orchestrator.supervise.launcher import LocalProcesses
from tests.processes import DOCUMENT, NAME, OWN_HELPER, PROFILE, launch, local_processes, own_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")


@pytest.fixture
def netns() -> Iterator[Netns]:
    name = f"orch-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield find(name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def processes(tmp_path: Path, netns: Netns) -> Iterator[LocalProcesses]:
    with local_processes(tmp_path) as processes:
        yield processes


def last_words(processes: LocalProcesses, netns: Netns, text: str, source: str = "") -> str:
    """What a process says that ends at once, which leaves a record and no process."""
    with pytest.raises(HelperProcessError, match=f"{NAME} does not start: exited with 1$") as caught:
        processes.start(launch(netns, text, source=source))
    assert not processes.running()
    assert "exited with 1" in processes.last_words(PROFILE, netns, NAME)
    words = caught.value.hint.removeprefix("its last words: ")
    assert words.startswith(f"helper-{NAME}.toml: ")
    assert " / " not in words, "one line"
    return words


@pytest.mark.parametrize(
    "before, after, said",
    [
        ('user = ""', 'user = "no-such-user"', "there is no user 'no-such-user'"),
        ('user = ""', 'user = "root"', "user 'root' is root"),
        ("label = 70\n", "", "label: needed with queueing rules"),
        ('use = "tftp"', 'use = "steam"', "'steam'"),
    ],
    ids=["no user", "root", "document", "no helper"],
)
def test_what_it_was_told_is_wrong(processes: LocalProcesses, netns: Netns, before: str, after: str, said: str) -> None:
    assert said in last_words(processes, netns, DOCUMENT.replace(before, after, 1))


def test_code_that_is_not_what_was_described_is_not_run(processes: LocalProcesses, netns: Netns) -> None:
    assert "is not what was applied" in last_words(processes, netns, own_document(), OWN_HELPER + "\n")


@pytest.mark.parametrize(
    "source, said",
    [
        ("raise ValueError('no\\nsuch thing')\n", "ValueError: no such thing"),
        (OWN_HELPER + "    def __init__(self):\n        raise KeyError('it')\n", "KeyError: 'it'"),
        ("import os, sys\nsys.exit(f'as root: {os.geteuid() == 0}')\n", "SystemExit: as root: False"),
    ],
    ids=["module", "class", "without privileges"],
)
def test_code_that_raises_is_told(processes: LocalProcesses, netns: Netns, source: str, said: str) -> None:
    assert said in last_words(processes, netns, own_document(source), source)


def test_what_it_wrote_is_fit_for_a_terminal(processes: LocalProcesses, netns: Netns) -> None:
    source = "raise ValueError('\\x1b[2J')\n"
    assert "?[2J" in last_words(processes, netns, own_document(source), source)


def test_the_log_of_the_start_before_is_kept(processes: LocalProcesses, netns: Netns) -> None:
    last_words(processes, netns, DOCUMENT.replace('user = ""', 'user = "root"'))
    last_words(processes, netns, DOCUMENT.replace('user = ""', 'user = "no-such-user"'))
    directory = processes.runtime_dir(PROFILE, netns)
    assert "no-such-user" in (directory / f"{NAME}.log").read_text()
    assert "is root" in (directory / f"{NAME}.log.old").read_text()


@pytest.mark.parametrize(
    "profile, name", [("ftp; delete table inet filter", NAME), ("../../tmp/x", NAME), (PROFILE, "../x")]
)
def test_what_anybody_writes_into_an_environment_is_no_name(
    processes: LocalProcesses, tmp_path: Path, profile: str, name: str
) -> None:
    """A name becomes part of nft commands and of paths."""

    def marked(*words: str) -> subprocess.Popen[bytes]:
        mark = "\x1f".join((str(tmp_path), *words, "digest"))
        return subprocess.Popen(["sleep", "1000"], env={**os.environ, "ORCH_PROCESS": mark}, user=65534)

    with marked(profile, name) as other, marked(PROFILE, NAME) as ours:
        try:
            assert [process.pid for process in processes.running()] == [ours.pid]
        finally:
            other.kill()
            ours.kill()


def test_one_that_never_was_counts_nothing(processes: LocalProcesses, netns: Netns) -> None:
    assert processes.counters(PROFILE, netns, NAME) is None
