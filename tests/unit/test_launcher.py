"""Native helper processes that cannot start, as orch starts them: each says why in one line, and is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.engine.privileges import own_user
from orchestrator.errors import HelperProcessError
from orchestrator.kernel.netns import find
from orchestrator.model import Netns
from orchestrator.supervise.launcher import LocalProcesses
from tests.namespaces import named_netns
from tests.processes import DOCUMENT, NAME, OWN_HELPER, PROFILE, begun, launch, local_processes, own_document

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")


@pytest.fixture
def netns() -> Iterator[Netns]:
    with named_netns() as name:
        yield find(name)


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


def marks(state_dir: Path, profile: str = PROFILE, name: str = NAME) -> dict[str, str]:
    mark = "\x1f".join((str(state_dir), profile, name, "digest"))
    return {"ORCH_PROCESS": mark} if name else {"ORCH_PROCESS": mark, "ORCH_SUPERVISOR": mark.replace("digest", "")}


def marked(state_dir: Path, profile: str = PROFILE, name: str = NAME, *, uid: int = 0) -> subprocess.Popen[bytes]:
    """Somebody's process that says it is one of ours."""
    environment = {"PATH": os.environ["PATH"], **marks(state_dir, profile, name)}
    return begun(subprocess.Popen(["sleep", "1000"], env=environment, user=uid, group=uid, extra_groups=[]))


def seen(processes: LocalProcesses) -> set[int]:
    return {process.pid for process in processes.running()} | processes.all_supervisors().keys()


@pytest.mark.parametrize("name", [NAME, ""])
def test_what_somebody_else_starts_is_not_ours(processes: LocalProcesses, tmp_path: Path, name: str) -> None:
    """Else it would be adopted, and ended, and reported, and believed to listen."""
    with marked(tmp_path, name=name) as ours, marked(tmp_path, name=name, uid=65534) as foreign:
        try:
            assert seen(processes) == {ours.pid}
            (believed,) = processes.running()
            processes.stop(replace(believed, pid=foreign.pid))
            assert foreign.poll() is None, "it is left alone"
        finally:
            foreign.kill()
            ours.kill()


def test_one_that_becomes_another_program_right_now_is_seen(processes: LocalProcesses, tmp_path: Path) -> None:
    """As each does at its start: for a moment it has neither arguments nor an environment."""
    script = tmp_path / "again"
    script.write_text('#!/bin/sh\nexec "$0"\n')
    script.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], **marks(tmp_path, PROFILE, NAME)}
    with subprocess.Popen([script], env=environment) as restless:
        try:
            assert [seen(processes) for _ in range(100)] == 100 * [{restless.pid}]
        finally:
            restless.kill()


@pytest.mark.parametrize("name", [NAME, ""])
def test_a_setuid_program_that_becomes_root_is_not_ours(processes: LocalProcesses, tmp_path: Path, name: str) -> None:
    """As sudo does before it asks for a password: its environment is that of whoever started it."""
    program = tmp_path / "become-root"
    shutil.copy(Path(sys.executable).resolve(), program)
    program.chmod(0o4755)  # nobody but who is handed it gets there: the directory is root's
    become = "import os, time; os.setresuid(0, 0, 0); print(flush=True); time.sleep(1000)"
    environment = {**marks(tmp_path, name=name), "PYTHONHOME": sys.base_prefix}
    with program.open("rb") as file:
        foreign = subprocess.Popen(
            [f"/proc/self/fd/{file.fileno()}", "-S", "-c", become],
            pass_fds=[file.fileno()],
            env=environment,
            stdout=subprocess.PIPE,
            user=65534,
            group=65534,
            extra_groups=[],
        )
    with foreign:
        try:
            assert foreign.stdout is not None
            assert foreign.stdout.readline() == b"\n"
            assert not seen(processes)
        finally:
            foreign.kill()


def test_a_helper_process_is_known_by_the_user_that_it_alone_is(
    processes: LocalProcesses, netns: Netns, tmp_path: Path
) -> None:
    """It may write what it likes into its environment: that of another helper is another user's."""
    here = find("")
    own, other = (own_user(str(processes.runtime_dir(PROFILE, here)), name).uid for name in (NAME, "other"))
    of_blue = own_user(str(processes.runtime_dir(PROFILE, netns)), NAME).uid
    with marked(tmp_path, uid=own) as ours, marked(tmp_path, uid=other) as a, marked(tmp_path, uid=of_blue) as b:
        try:
            assert seen(processes) == {ours.pid}
        finally:
            for one in (ours, a, b):
                one.kill()


@pytest.mark.parametrize("suffix", ["", ".next"])
def test_a_helper_process_of_a_named_user_is_known_by_its_document(
    processes: LocalProcesses, tmp_path: Path, suffix: str
) -> None:
    directory = processes.runtime_dir(PROFILE, find(""))
    directory.mkdir(parents=True)
    with marked(tmp_path, uid=65534) as ours, marked(tmp_path, uid=1) as foreign:
        try:
            assert not seen(processes)
            (directory / f"helper-{NAME}.toml{suffix}").write_text(DOCUMENT.replace('user = ""', 'user = "nobody"'))
            assert seen(processes) == {ours.pid}
        finally:
            foreign.kill()
            ours.kill()


@pytest.mark.parametrize(
    "profile, name",
    [("ftp; delete table inet filter", NAME), ("../../tmp/x", NAME), (PROFILE, "../x"), (PROFILE, "x\x1b[2J")],
)
def test_what_anybody_writes_into_an_environment_is_no_name(
    processes: LocalProcesses, tmp_path: Path, profile: str, name: str
) -> None:
    """A name becomes part of nft commands, of paths, and of what is shown on a terminal."""

    with marked(tmp_path, profile, name) as other, marked(tmp_path, PROFILE, NAME) as ours:
        try:
            assert [process.pid for process in processes.running()] == [ours.pid]
        finally:
            other.kill()
            ours.kill()


def test_one_that_never_was_counts_nothing(processes: LocalProcesses, netns: Netns) -> None:
    assert processes.counters(PROFILE, netns, NAME) is None
