"""The command line as a person and a script meet it: exit codes, streams, JSON, colour, questions."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import app as app_module
from orchestrator import cli
from orchestrator.fake import FakeKernel
from orchestrator.model import QueueRow
from orchestrator.session import ExitCode
from tests.hosts import FTP

Answer = tuple[int, str, str]


class Terminal:
    """`orch(*argv)` -> (code, out, err) on a fake kernel."""

    def __init__(self, kernel: FakeKernel, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.kernel = kernel
        self.directory = directory
        self.capsys = capsys

    def __call__(self, *argv: str) -> Answer:
        code = cli.run([*argv])
        out, err = self.capsys.readouterr()
        return code, out, err

    def profile(self, text: str = FTP) -> str:
        file = self.directory / "profile.yaml"
        file.write_text(text)
        return str(file)


@pytest.fixture
def orch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    kernel = FakeKernel()
    monkeypatch.setattr(app_module, "kernel_system", lambda _state: kernel.system())
    monkeypatch.setenv("ORCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return Terminal(kernel, tmp_path, capsys)


def test_check_ok(orch: Terminal) -> None:
    file = orch.profile(FTP + "families: [ip]\n")
    assert orch("check", file) == (0, f"{file}: ok\n", "")


def test_check_tells_every_problem(orch: Terminal) -> None:
    file = orch.profile("profile: x\nhelpers: {ftp: {queue: 70000}, nfs: {}}\nbackend: pf\n")
    code, out, err = orch("check", file)
    assert (code, out) == (1, "")
    assert [line.split(": ")[0].removeprefix(file) for line in err.splitlines() if file in line] == [
        ":2:24",
        ":2:32",
        ":3:10",
    ]


def test_diff_differs_and_matches(orch: Terminal) -> None:
    file = orch.profile()
    code, out, _ = orch("diff", file)
    assert code == ExitCode.DIFFERS
    assert out.splitlines()[-1] == "Plan: 4 to add, 0 to change, 0 to replace, 0 to remove."
    assert orch("apply", "--dry-run", file)[:2] == (code, out)
    assert orch("apply", file)[0] == ExitCode.OK
    assert orch("diff", file)[:2] == (0, f"No changes. netns host matches {file}.\n")
    assert orch("apply", "--dry-run", file)[0] == ExitCode.OK


def test_apply_speaks_on_the_right_stream(orch: Terminal) -> None:
    code, out, err = orch("apply", orch.profile())
    assert code == 0
    assert out.splitlines()[-1] == "Applied: 4 added, 0 changed, 0 replaced, 0 removed. Verified."
    assert "register helper ftp-us/ip/tcp  ok" in err.splitlines()


def test_quiet_says_nothing(orch: Terminal) -> None:
    assert orch("apply", "-q", orch.profile()) == (0, "", "")


def test_teardown_twice(orch: Terminal) -> None:
    orch("apply", orch.profile())
    assert orch("teardown")[:2] == (0, "Removed profile ftp from netns host.\n")
    assert orch("teardown")[:2] == (0, "Nothing to remove.\n")


def test_a_failure_is_1_and_told_with_where_and_hint(orch: Terminal) -> None:
    orch.kernel.programs.clear()
    code, out, err = orch("apply", orch.profile(FTP + "families: [ip]\n"))
    assert (code, out) == (ExitCode.FAILED, "")
    assert err == ("error: conntrackd is not installed\n  hint:  apt-get install conntrackd, or engine: kernel\n")


def test_diff_with_refusals_is_a_failure(orch: Terminal) -> None:
    orch.kernel.programs.clear()
    code, out, err = orch("diff", orch.profile())
    assert code == ExitCode.FAILED
    assert "Plan: 4 to add" in out
    assert "conntrackd is not installed" in err


def test_a_failed_way_back_is_3_and_lists_what_is_left(orch: Terminal) -> None:
    file = orch.profile()
    orch.kernel._fail = {5: 12, 6: 5}
    code, _, err = orch("apply", file)
    assert code == ExitCode.MIXED
    assert "  left:  " in err
    code, out, _ = orch("status")
    assert code == ExitCode.DIFFERS
    assert "apply of profile ftp in netns host was not finished" in out


def test_a_teardown_that_leaves_something_is_3_and_can_be_tried_again(orch: Terminal) -> None:
    orch("apply", orch.profile())
    orch.kernel.fail_at(4, 5)
    code, out, err = orch("teardown")
    assert code == ExitCode.MIXED
    assert "left: unregister helper ftp/ip/tcp" in err
    assert "Profile ftp is not wholly removed" in out
    assert orch("status")[0] == ExitCode.DIFFERS
    assert orch("teardown")[0] == ExitCode.OK
    assert not orch.kernel.registrations


def test_no_is_no(orch: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    orch("apply", orch.profile())
    orch.kernel.namespaces[""].connections["ftp-us"] = 2
    terminal = io.StringIO("no\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert orch("teardown")[:2] == (ExitCode.DECLINED, "Nothing was changed.\n")


def test_usage_errors_are_json_too(orch: Terminal) -> None:
    code, out, err = orch("diff", "--json", "--no-such-option", "x")
    assert code == ExitCode.USAGE
    assert json.loads(out)["exit_code"] == code
    assert "No such option" in err


@pytest.mark.parametrize("content", [b"", b"garbage that is no database, but long enough to be looked at closely" * 50])
def test_a_broken_ledger_is_told(orch: Terminal, content: bytes) -> None:
    (orch.directory / "state").mkdir()
    (orch.directory / "state" / "ledger.sqlite").write_bytes(content)
    wanted = (ExitCode.FAILED, "") if content else (ExitCode.OK, "Nothing is applied.\n")
    assert orch("status")[:2] == wanted
    code, _, err = orch("apply", orch.profile())
    assert code == wanted[0]
    assert not content or "the ledger cannot be read: file is not a database" in err


def test_status_while_another_orch_works(orch: Terminal) -> None:
    import fcntl

    orch("apply", orch.profile())
    with (orch.directory / "state" / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another orch is at work right now" in orch("status")[1]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_were_closed_before_the_start(closed: str) -> None:
    for arguments, code in (("--version", ExitCode.OK), ("explain nobody nobody", ExitCode.USAGE)):
        command = f'exec "$0" -m orchestrator {arguments} {closed}'
        done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)


def _run(file: Path, *argv: str, stdout: int, is_buffered: bool) -> tuple[int, str]:
    """Exit code and standard error of a real command that writes into `stdout`."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    command = [sys.executable, "-m", "orchestrator", *argv]
    done = subprocess.run(
        command,
        cwd=file.parent,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=variables,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("command", ["check profile.yaml", "schema", "status --watch"])
def test_a_reader_that_went_away_is_no_failure(orch: Terminal, command: str, *, is_buffered: bool) -> None:
    file = Path(orch.profile(FTP + "families: [ip]\n"))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert _run(file, *command.split(), stdout=writing, is_buffered=is_buffered) == (ExitCode.OK, "")
    finally:
        os.close(writing)


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("command", ["check profile.yaml", "schema"])
def test_output_for_which_there_is_no_room_is_a_failure(orch: Terminal, command: str, *, is_buffered: bool) -> None:
    file = Path(orch.profile(FTP + "families: [ip]\n"))
    with Path("/dev/full").open("w") as full:
        code, err = _run(file, *command.split(), stdout=full.fileno(), is_buffered=is_buffered)
    assert code == ExitCode.FAILED
    assert err == (
        "error: cannot write the result: No space left on device\n  where: standard output\n  cause: ENOSPC, write\n"
    )


_FAKED = """
import sys
from orchestrator import app, cli
from orchestrator.fake import FakeKernel

kernel = FakeKernel()
app.kernel_system = lambda _state: kernel.system()
cli.main()
"""


@pytest.mark.parametrize("options", ["", "--json"])
@pytest.mark.parametrize("is_buffered", [True, False])
def test_work_that_was_done_is_no_failure_where_there_is_no_room_to_tell(
    orch: Terminal, options: str, *, is_buffered: bool
) -> None:
    """1 would say that the system is as before."""
    argv = [sys.executable, "-c", _FAKED, "apply", orch.profile(), *options.split()]
    variables = {**os.environ, "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=variables)
    assert done.returncode == ExitCode.OK
    assert done.stderr[done.stderr.index("error: ") :] == (
        "error: cannot write the result: No space left on device\n"
        "  where: standard output\n"
        "  hint:  the work was done: Applied: 4 added, 0 changed, 0 replaced, 0 removed. Verified.\n"
        "  cause: ENOSPC, write\n"
    )


@pytest.mark.parametrize("options, is_shown", [(["--full"], True), ([], False)])
def test_full_shows_the_rules_with_the_question(
    orch: Terminal, monkeypatch: pytest.MonkeyPatch, options: list[str], *, is_shown: bool
) -> None:
    terminal = io.StringIO("no\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    code, _, err = orch("apply", "--ask", *options, orch.profile())
    assert code == ExitCode.DECLINED
    assert ("+++ profile" in err, err.index("Plan: 4 to add") > err.find("+++ profile")) == (is_shown, True)


def test_all_namespaces_and_one_is_a_contradiction(orch: Terminal) -> None:
    orch.kernel.add_netns("blue")
    orch("apply", orch.profile())
    before = orch.kernel.dump_text()
    code, out, err = orch("teardown", "--all", "--netns", "blue")
    assert (code, out, err) == (ExitCode.USAGE, "", "error: --all and --netns exclude each other\n")
    assert orch.kernel.dump_text() == before


def test_the_history_of_what_was_not_applied(orch: Terminal) -> None:
    assert orch("history", "nosuch")[:2] == (0, "Profile nosuch was not applied.\n")
    assert orch("history")[:2] == (0, "Nothing was applied.\n")
    orch("apply", orch.profile())
    assert orch("history", "nosuch")[:2] == (0, "Profile nosuch was not applied.\n")


@pytest.mark.parametrize("option", ["--color=never", "--json"])
def test_a_look_of_which_nobody_reads_is_as_good(orch: Terminal, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    orch("apply", orch.profile())
    orch.kernel.namespaces[""].rules.clear()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as written, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, write_through=True))
        assert cli.run(["watch", "--once", "--dry-run", option]) == ExitCode.DIFFERS


def test_no_command_shows_the_help_once(orch: Terminal) -> None:
    code, out, err = orch()
    assert (code, out) == (ExitCode.USAGE, "")
    assert (err.count("Usage: "), "error" in err) == (1, False)


@pytest.mark.parametrize("words", ["diff {}", "apply {}", "teardown", "status", "enable {} --dry-run", "disable ftp"])
def test_an_empty_namespace_is_not_that_of_the_caller(orch: Terminal, words: str) -> None:
    """As a script gives it whose variable is empty: what was meant for a namespace would be done to the host."""
    before = orch.kernel.dump_text()
    code, out, err = orch(*words.format(orch.profile()).split(), "--netns", "")
    assert (code, out) == (ExitCode.USAGE, "")
    assert "'--netns'" in err
    assert orch.kernel.dump_text() == before


@pytest.mark.parametrize("word", ["gone.yaml", "/etc/orch/gone.yaml", "Office"])
def test_what_is_neither_a_file_nor_a_name_is_not_said_to_be_disabled(orch: Terminal, word: str) -> None:
    """The file of an enabled profile may be gone or misspelt; its unit would stay."""
    code, out, err = orch("disable", word, "--unit-dir", str(orch.directory))
    assert (code, out) == (ExitCode.FAILED, "")
    assert err == (
        f"error: cannot read the profile: no such file\n  where: {word}\n"
        "  hint:  give its name: systemctl list-unit-files 'orch-*' lists the units\n"
    )


@pytest.mark.parametrize("words", ["diff {}", "apply {}", "teardown", "status", "history", "confirm"])
def test_a_state_directory_that_is_a_file(orch: Terminal, words: str) -> None:
    file = orch.profile()
    code, out, err = orch(*words.format(file).split(), "--state-dir", file)
    assert (code, out) == (ExitCode.FAILED, "")
    assert err.endswith(f"error: the state directory is not a directory\n  where: {file}\n  hint:  set --state-dir\n")


def test_a_closed_stderr_does_not_stop_the_work(orch: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError

    file = orch.profile()
    monkeypatch.setattr(sys, "stderr", Gone())
    assert orch("apply", "-q", file)[0] == 0
    orch.kernel._fail = {len(orch.kernel.calls) + 2: 5}
    before = orch.kernel.dump_text()
    changed = orch.profile("profile: ftp\nhelpers: {ftp: {engine: conntrackd, queue: 9}}\n")
    assert orch("apply", changed)[0] == ExitCode.FAILED
    assert orch.kernel.dump_text() == before


@pytest.mark.parametrize(
    "argv",
    [
        ("nonsense",),
        ("check",),
        ("diff", "--no-such-option", "x"),
        ("apply", "--wait", "soon", "x"),
        ("apply", "--dry", "x"),
        ("status", "one", "two"),
        ("diff", "--color", "purple", "x"),
    ],
)
def test_wrong_usage_is_64(orch: Terminal, argv: tuple[str, ...]) -> None:
    code, out, err = orch(*argv)
    assert (code, out) == (ExitCode.USAGE, "")
    assert "error: " in err


def test_a_misspelt_command_gets_a_suggestion(orch: Terminal) -> None:
    assert "apply" in orch("aply")[2]


def test_help_and_version(orch: Terminal) -> None:
    code, out, err = orch("--help")
    assert (code, err) == (0, "")
    assert "Exit codes: 0 done" in " ".join(out.split())
    assert orch("--version") == (0, "orch 0.1.0\n", "")


def test_a_question_without_a_terminal_is_64_and_changes_nothing(orch: Terminal) -> None:
    orch("apply", orch.profile())
    orch.kernel.namespaces[""].connections["ftp-us"] = 2
    before = orch.kernel.dump_text()
    code, _, err = orch("teardown")
    assert code == ExitCode.USAGE
    assert "2 live connections lose their helper" in err
    assert "-y/--yes" in err
    assert orch.kernel.dump_text() == before
    assert orch("teardown", "-y")[0] == ExitCode.OK


@pytest.mark.parametrize("answer, code", [("yes\n", 0), ("y\n", 4), ("\n", 4), ("", 4)])
def test_only_yes_is_yes(orch: Terminal, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    got, _, err = orch("apply", "--ask", orch.profile())
    assert got == code
    assert 'Only "yes" is accepted: ' in err
    assert bool(orch.kernel.registrations) is (code == 0)


_SIGNALLED = """
import atexit, os, signal, sys
from orchestrator import app, cli
from orchestrator.fake import FakeKernel

class Output:
    def write(self, text):
        os.kill(os.getpid(), int(number))
        return len(text)

    def flush(self):
        os.kill(os.getpid(), int(number))

    def isatty(self):
        return False

number = sys.argv.pop(1)
kernel = FakeKernel()
app.kernel_system = lambda _state: kernel.system()
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.stdout = Output()
atexit.register(os.kill, os.getpid(), int(number))
cli.main()
"""


@pytest.mark.parametrize("words, code", [("apply {}", 0), ("teardown", 0), ("confirm", 1), ("watch --once", 0)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_work_was_done_changes_nothing(
    orch: Terminal, number: signal.Signals, words: str, code: int
) -> None:
    """Not while the result is told either, nor while the interpreter ends: 130 would say that it was undone."""
    argv = [sys.executable, "-c", _SIGNALLED, str(int(number)), *words.format(orch.profile()).split()]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


def test_one_that_runs_a_command_in_its_own_process_keeps_its_signals(orch: Terminal) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert orch("apply", orch.profile())[0] == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_undoes_and_is_the_exit_code(
    orch: Terminal, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = orch.kernel.dump_text()
    file = orch.profile()
    modify = FakeKernel.modify

    def interrupted(kernel: FakeKernel, operation: str, key: str) -> None:
        modify(kernel, operation, key)
        if len(kernel.calls) == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(FakeKernel, "modify", interrupted)
    code, _, err = orch("apply", file)
    assert code == 128 + number
    assert "(unregister helper ftp/ip/tcp)  ok" in err
    assert orch.kernel.dump_text() == before


def test_json_ends_with_a_result_line(orch: Terminal) -> None:
    code, out, _ = orch("apply", "--json", orch.profile())
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["type"] for line in lines] == ["step"] * 6 + ["result"]
    assert lines[-1] | {"report": None} == {
        "type": "result",
        "schema": "1.3",
        "command": "apply",
        "exit_code": code,
        "report": None,
    }
    status = json.loads(orch("status", "--json")[1])
    assert status["status"]["profiles"][0]["helpers"][0]["pid"] == 100
    orch.kernel.programs.clear()
    orch("teardown", "-y")
    error = json.loads(orch("apply", "--json", orch.profile())[1])
    assert error["exit_code"] == 1
    assert error["error"]["refusals"][0]["what"] == "conntrackd is not installed"


def test_status_shows_drift_and_exits_with_2(orch: Terminal) -> None:
    orch("apply", orch.profile())
    code, out, _ = orch("status")
    assert code == 0
    assert "ftp     conntrackd  running  100    0 s" in out
    orch.kernel.kill(100)
    code, out, _ = orch("status")
    assert code == ExitCode.DIFFERS
    assert "drift: ftp-us/ip/tcp: status disabled -> enabled" in out
    assert "no process" in out


def test_a_missing_related_rule_is_told(orch: Terminal) -> None:
    orch.kernel.namespaces[""].dropping_filters = ("inet filter forward",)
    code, out, err = orch("apply", orch.profile())
    assert code == 0
    assert "ct state established,related accept" in out
    assert "warning: inet filter forward drops, and has no rule that accepts what helpers expect" in err


@pytest.mark.parametrize(
    "argv, variables, is_coloured",
    [
        ((), {}, False),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1"}, True),
        ((), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ((), {"NO_COLOR": ""}, False),
        (("--color", "never"), {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colour(
    orch: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    variables: dict[str, str],
    *,
    is_coloured: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in orch("diff", *argv, orch.profile())[1]) is is_coloured


def test_standard_input_is_a_profile(orch: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FTP.encode())))
    assert orch("check", "-")[:2] == (0, "-: ok\n")


def test_render_prints_one_document_as_it_is(orch: Terminal) -> None:
    file = orch.profile()
    _, text, _ = orch("render", file, "--document", "ruleset.nft")
    assert text.startswith("# Rules of profile ftp")
    assert text in orch("render", file)[1]
    code, _, err = orch("render", file, "--document", "nonsense")
    assert code == ExitCode.USAGE
    assert "registrations.yaml, ruleset.nft, conntrackd.conf, supervise.yaml" in err


def test_a_broken_profile_can_still_be_torn_down_by_name(orch: Terminal) -> None:
    file = orch.profile()
    orch("apply", file)
    Path(file).write_text("profile: [")
    code, _, err = orch("teardown", file)
    assert code == ExitCode.FAILED
    assert "tear it down by its name" in err
    assert orch("teardown", "ftp")[0] == ExitCode.OK


def test_a_stale_plan_is_refused(orch: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    file = orch.profile()

    class Slow:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            orch.kernel.namespaces[""].queues[36160] = QueueRow(36160, 7, 0, 0, 0, 0)
            return "yes\n"

    monkeypatch.setattr(sys, "stdin", Slow())
    code, _, err = orch("apply", "--ask", file)
    assert code == ExitCode.FAILED
    assert "plan is stale" in err
    assert not orch.kernel.registrations


def test_a_second_orch_waits_and_then_says_who_is_there(orch: Terminal) -> None:
    import fcntl

    orch("apply", orch.profile())
    with (orch.directory / "state" / "lock").open("a+") as lock:
        lock.write("orch apply other.yaml (pid 42)")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = orch("apply", "--wait", "0.1", orch.profile())
    assert code == ExitCode.FAILED
    assert "busy: orch apply other.yaml (pid 42) holds the lock of this host" in err
