"""Commit-confirm with a real terminal, a real watchdog and real rules, in a namespace of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator import watchdog
from orchestrator.session import ExitCode
from tests.stages import Stage
from tests.trials import is_watched, kill_watchdogs, ledger_of, pass_time, wait_for, waiting, watchdogs

_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip", path=_PATH) is None, reason="needs root and ip(8)"),
    pytest.mark.slow,  # orch as a process of its own, again and again
]
WITHIN_S = 600  # nobody waits for it: a test lets the time pass
QUESTION = b'Keep the changes? Only "yes" is accepted ('
PROFILE = """
profile: trial
netns: {netns}
helpers:
  ftp: {{engine: kernel, attach: {{ports: [{port}]}}}}
"""
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace where port 21 is attached, and a profile that attaches 2121 instead."""

    netns: str
    state: Path
    first: str
    second: str

    def orch(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Without a terminal."""
        return subprocess.run(
            [sys.executable, "-m", "orchestrator", *argv, "--state-dir", str(self.state)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def try_out(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.orch("apply", self.second, "--confirm-within", str(WITHIN_S), *options)

    def rules(self) -> str:
        command = ["ip", "netns", "exec", self.netns, "nft", "list", "ruleset"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def log(self) -> str:
        """What watchdogs said."""
        return (self.state / watchdog.LOG).read_text()

    def is_first(self) -> bool:
        with contextlib.closing(ledger_of(self.state)) as ledger:
            return [applied.source for applied in ledger.applied()] == [self.first]

    def is_unsettled(self) -> bool:
        with contextlib.closing(ledger_of(self.state)) as ledger:
            return bool(ledger.unsettled())

    def watchdog(self) -> int:
        said: list[str] = []  # empty for a moment, while one takes over from another

        def is_told() -> bool:
            said.append((self.state / "watchdog").read_text() if is_watched(self.state) else "")
            return said[-1].endswith("\n")

        wait_for(is_told)
        return int(said[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("confirm")
    netns = f"orch-{uuid.uuid4().hex[:8]}"
    files = [directory / "first.yaml", directory / "second.yaml"]
    for file, port in zip(files, (21, 2121), strict=True):
        file.write_text(PROFILE.format(netns=netns, port=port))
    subprocess.run(["ip", "netns", "add", netns], check=True)
    yield Host(netns, directory / "state", *map(str, files))
    shutil.rmtree(directory / "state", ignore_errors=True)
    subprocess.run(["ip", "netns", "delete", netns], check=True)


@pytest.fixture
def host(place: Host) -> Iterator[Host]:
    """The first profile is applied; what a test leaves to a watchdog is undone at its end."""
    if not place.is_first():
        done = place.orch("apply", place.first)
        if "does not exist" in done.stderr or "cannot be loaded" in done.stderr:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
    yield place
    if waiting(place.state):
        place.orch("rollback")
    wait_for(lambda: not is_watched(place.state))


@dataclass(slots=True)
class Login:
    """A terminal whose session orch leads, as a shell would that became orch."""

    child: subprocess.Popen[bytes]
    master: int
    said: bytes = b""
    is_there: bool = field(default=True)

    def wait_for(self, text: bytes) -> None:
        while text not in self.said:
            assert self._read(), self.said.decode()

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def hang_up(self) -> None:
        os.close(self.master)
        self.is_there = False

    def end(self) -> int:
        while self.is_there and self._read():
            pass
        return self.child.wait(60)

    def _read(self) -> bool:
        """False once nobody has the terminal any more."""
        assert select.select([self.master], [], [], 60)[0], self.said.decode()
        try:
            more = os.read(self.master, 4096)
        except OSError:
            return False
        self.said += more
        return bool(more)


@contextlib.contextmanager
def login(host: Host, *argv: str, stage: tuple[Stage, signal.Signals] | None = None) -> Iterator[Login]:
    master, slave = os.openpty()
    module = ["orchestrator"] if stage is None else ["tests.stages", stage[0], str(int(stage[1]))]
    child = subprocess.Popen(
        [sys.executable, "-m", *module, *argv, "--state-dir", str(host.state)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    there = Login(child, master)
    try:
        yield there
    finally:
        child.kill()
        child.wait()
        if there.is_there:
            os.close(master)


@contextlib.contextmanager
def asked(host: Host, *options: str) -> Iterator[Login]:
    """Somebody at a terminal, who is asked whether to keep the second profile."""
    with login(host, "apply", host.second, "--confirm-within", str(WITHIN_S), *options) as there:
        there.wait_for(QUESTION)
        yield there


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, code",
    [
        (b"yes\n", ExitCode.OK),
        (b"y\n", ExitCode.DECLINED),
        (b"\n", ExitCode.DECLINED),
        (b"\x04", ExitCode.DECLINED),
    ],
)
def test_only_yes_is_yes(host: Host, keys: bytes, code: int) -> None:
    before = host.rules()
    with asked(host) as there:
        assert host.rules() != before
        there.type(keys)
        assert there.end() == code
    assert (host.rules() != before) is (code == 0)
    assert (b"Confirmed" if code == 0 else b"rolled back") in there.said
    wait_for(lambda: not is_watched(host.state))


@pytest.mark.parametrize("command, code", [("confirm", ExitCode.OK), ("rollback", ExitCode.DECLINED)])
def test_another_login_may_answer(host: Host, command: str, code: int) -> None:
    before = host.rules()
    with asked(host) as there:
        assert host.orch(command).returncode == 0
        assert there.end() == code
    assert (host.rules() != before) is (code == 0)


def test_no_answer_is_no(host: Host) -> None:
    before = host.rules()
    with login(host, "apply", host.second, "--confirm-within", "2", "--json") as there:
        assert there.end() == ExitCode.DECLINED
    assert host.rules() == before
    result = json.loads(there.said.decode().splitlines()[-1])
    assert (result["exit_code"], result["verdict"]) == (4, "rolled back")


def test_without_a_terminal_the_command_to_run_is_told(host: Host) -> None:
    before = host.rules()
    done = host.try_out()
    assert (done.returncode, done.stdout.splitlines()[-1].partition(", unless")[2]) == (
        0,
        f" confirmed: orch confirm trial --state-dir {host.state}",
    )
    assert "trial: undone in" in host.orch("status").stdout
    refused = host.orch("apply", host.first)
    assert (refused.returncode, "waits for its confirmation" in refused.stderr) == (1, True)
    assert f"orch confirm trial --state-dir {host.state}, or " in refused.stderr
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before
    assert host.orch("confirm").returncode == 1


def test_a_service_does_not_wait(host: Host, tmp_path: Path) -> None:
    """The profile says that an apply has to be confirmed; 0 says that this one has not."""
    profile = tmp_path / "asking.yaml"
    profile.write_text(Path(host.second).read_text() + "confirm_within_s: 60\n")
    assert host.orch("apply", str(profile), "--confirm-within", "0").returncode == 0
    assert waiting(host.state) == ()
    assert host.orch("apply", host.first).returncode == 0
    result = json.loads(host.orch("apply", str(profile), "--json").stdout.splitlines()[-1])
    assert (result["pending"]["within_s"], result["pending"]["confirm"]) == (
        60,
        f"orch confirm trial --state-dir {host.state}",
    )


def test_where_nothing_was_applied_nothing_is_left(host: Host) -> None:
    assert host.orch("teardown", "--netns", host.netns).returncode == 0
    before = host.rules()
    assert host.try_out().returncode == 0
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before


def test_more_than_an_hour_is_too_long(host: Host) -> None:
    assert host.orch("apply", host.second, "--confirm-within", "3601").returncode == ExitCode.USAGE


# -- whoever dies ------------------------------------------------------------------------------------------------------


def test_a_terminal_that_goes_away_leaves_it_to_the_watchdog(host: Host) -> None:
    before = host.rules()
    with asked(host) as there:
        after = host.rules()
        there.hang_up()
        assert there.end() == 128 + signal.SIGHUP
    assert (host.rules(), len(waiting(host.state)), is_watched(host.state)) == (after, 1, True)
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_a_signal_at_the_question_leaves_it_to_the_watchdog(host: Host, number: signal.Signals) -> None:
    before = host.rules()
    with asked(host) as there:
        there.child.send_signal(number)
        code = there.end()
    assert code == (-number if number is signal.SIGKILL else 128 + number)
    assert (len(waiting(host.state)), is_watched(host.state)) == (1, True)
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", Stage)
def test_a_signal_at_any_stage(host: Host, stage: Stage, number: signal.Signals) -> None:
    """Stopped and undone at once, or left to the watchdog, or (while it is undone) of no effect."""
    before = host.rules()
    with login(host, "apply", host.second, "--confirm-within", str(WITHIN_S), stage=(stage, number)) as there:
        if stage is Stage.UNDOING:
            there.wait_for(QUESTION)
            there.type(b"no\n")
        code = there.end()
    if number is signal.SIGKILL:
        assert code == -number
    else:
        assert code == (ExitCode.DECLINED if stage is Stage.UNDOING else 128 + number)
    is_left = number is signal.SIGKILL or stage is Stage.VERIFIED
    assert len(waiting(host.state)) == is_left
    if is_left:
        pass_time(host.state)
    wait_for(lambda: not (waiting(host.state) or is_watched(host.state)))
    assert not host.is_unsettled()
    assert host.rules() == before, host.log()


def test_a_watchdog_cannot_be_talked_out_of_it(host: Host) -> None:
    before = host.rules()
    assert host.try_out().returncode == 0
    pid = host.watchdog()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    open_files = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    assert not {file for file in open_files if file.endswith("/lock") or "/pts/" in file or file.startswith("pipe:")}
    session, terminal = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3:5]
    assert (session, terminal) == (str(pid), "0")
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before


def replace_watchdog(host: Host) -> None:
    """Those behind it are killed, and missed; then it is killed itself, and another one is at work."""
    first = host.watchdog()
    wait_for(lambda: len(watchdogs(host.state)) > 1)
    others = watchdogs(host.state) - {first}
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_waiting(watchdogs(host.state) - {first, *others}))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: host.watchdog() != first)


def test_where_a_watchdog_is_killed_another_one_undoes_it(host: Host) -> None:
    before = host.rules()
    assert host.try_out().returncode == 0
    for _ in range(2):
        replace_watchdog(host)
    pass_time(host.state)
    wait_for(lambda: not waiting(host.state))
    assert host.rules() == before, host.log()


def is_waiting(pids: set[int]) -> bool:
    """Whether a process waits for a lock of a file."""
    return any(str(pid) in line.split() for pid in pids for line in Path("/proc/locks").read_text().splitlines())


def test_where_all_watchdogs_were_killed_the_next_command_undoes_it_or_starts_one(host: Host) -> None:
    before = host.rules()
    assert host.try_out().returncode == 0
    kill_watchdogs(host.state)
    wait_for(lambda: not is_watched(host.state))
    status = host.orch("status")
    assert (status.returncode, "nobody is there who would undo it" in status.stdout) == (ExitCode.DIFFERS, True)
    refused = host.orch("apply", host.first)
    assert (refused.returncode, "waits for its confirmation" in refused.stderr) == (ExitCode.FAILED, True)
    assert is_watched(host.state)
    kill_watchdogs(host.state)
    pass_time(host.state)
    assert "not confirmed in time" in host.orch("status").stdout
    done = host.orch("apply", host.first)
    assert (done.returncode, "was not confirmed in time: undoing it" in done.stderr) == (0, True), done.stderr
    assert (host.rules(), waiting(host.state)) == (before, ())


def test_a_watchdog_ends_when_the_ledger_is_taken_away(host: Host, tmp_path: Path) -> None:
    assert host.try_out().returncode == 0
    kept = tmp_path / "ledger.sqlite"
    shutil.copy(host.state / "ledger.sqlite", kept)
    (host.state / "ledger.sqlite").unlink()
    wait_for(lambda: not is_watched(host.state))
    shutil.copy(kept, host.state / "ledger.sqlite")
    assert host.orch("rollback").returncode == 0
