"""What every command shares: its options, its exit codes, how it speaks, and how it gets its profile and its app."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import complete
from orchestrator.errors import Interrupted, OrchError, OutputError, UsageError
from orchestrator.typed import DEFAULT_STATE as DEFAULT_STATE

if TYPE_CHECKING:
    from orchestrator.app import App
    from orchestrator.execute import Outcome
    from orchestrator.model import Desired, Target
    from orchestrator.state import Plan
    from orchestrator.views.human import Paint


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    DIFFERS = 2
    MIXED = 3
    DECLINED = 4
    USAGE = 64


class Colour(enum.StrEnum):
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


def _refuse_empty(netns: str | None) -> str | None:
    """An empty name is a variable of a script that is not set, and would be the caller's namespace."""
    if netns == "":
        raise typer.BadParameter("it is empty; leave the option out for the namespace of the profile or the caller")
    return netns


ProfileArgument = Annotated[
    str,
    typer.Argument(
        metavar="PROFILE", help="Profile file; - reads standard input.", autocompletion=complete.profile_files
    ),
]
AppliedArgument = Annotated[
    str,
    typer.Argument(
        metavar="[PROFILE]", help="Name of a profile; default: all.", autocompletion=complete.applied_profiles
    ),
]
NetnsOption = Annotated[
    str | None,
    typer.Option(
        "--netns",
        envvar="ORCH_NETNS",
        help="Namespace, by name or path; overrides the profile's.",
        autocompletion=complete.netns_names,
        callback=_refuse_empty,
    ),
]
StateOption = Annotated[
    Path, typer.Option("--state-dir", envvar="ORCH_STATE_DIR", help="Where the ledger and the runtime files are.")
]
TemplatesOption = Annotated[
    Path | None,
    typer.Option(
        "--templates", envvar="ORCH_TEMPLATES", help="Directory of templates that replace ours, file by file."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", envvar="ORCH_JSON", help="JSON Lines on standard output.")]
ColourOption = Annotated[Colour, typer.Option("--color", envvar="ORCH_COLOR", help="Colour the output.")]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, envvar="ORCH_VERBOSE", help="Say more; repeat for still more.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", envvar="ORCH_QUIET", help="Errors only.")]
WaitOption = Annotated[
    float, typer.Option("--wait", envvar="ORCH_WAIT", min=0, help="Seconds to wait for another orch to finish.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", envvar="ORCH_YES", help="Answer every question with yes.")]
AskOption = Annotated[bool, typer.Option("--ask", envvar="ORCH_ASK", help="Show the plan and ask before it runs.")]
FullOption = Annotated[bool, typer.Option("--full", envvar="ORCH_FULL", help="Show the text of the rules as a diff.")]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Session:
    """How one command speaks: streams, colour, verbosity, JSON or text, and the signals that reached it.

    `is_full` shows the text of the rules with a question, `has_worked` tells that the result is of work that was done.
    """

    command: str
    is_json: bool = False
    colour: Colour = Colour.AUTO
    verbose: int = 0
    is_quiet: bool = False
    is_yes: bool = False
    is_full: bool = False
    signal_number: int = 0
    has_worked: bool = False
    _is_asking: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        level = [logging.WARNING, logging.INFO, logging.DEBUG][min(self.verbose, 2)]
        logging.basicConfig(
            level=logging.ERROR if self.is_quiet else level, format="%(levelname)s %(name)s: %(message)s", force=True
        )

    def paint(self, stream: Any = None) -> Paint:
        from orchestrator.views.human import Paint

        return Paint(is_on=is_coloured(self.colour, stream or sys.stderr))

    def write(self, text: str) -> None:
        with writing():
            sys.stdout.write(text)

    def flush(self) -> None:
        with writing():
            sys.stdout.flush()

    def write_at_work(self, text: str) -> None:
        """On standard output now, while the work goes on: that there is no room for it is told at the end."""
        with contextlib.suppress(OSError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def ask(self, question: str) -> None:
        """On standard error; who cannot read it may answer all the same."""
        with contextlib.suppress(OSError):
            sys.stderr.write(question)
            sys.stderr.flush()

    def say(self, text: str) -> None:
        if not self.is_quiet:
            with contextlib.suppress(OSError):  # nobody listens any more; the work goes on
                sys.stderr.write(text if text.endswith("\n") else text + "\n")

    def warn(self, sentence: str) -> None:
        self.say(f"{self.paint()('warning', 'warning')}: {sentence}")

    def complain(self, sentence: str) -> None:
        """An error that does not end the command; --quiet leaves it."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{self.paint()('error', 'error')}: {sentence}\n")

    def step(self, outcome: Outcome) -> None:
        from orchestrator.views import human, machine

        if self.is_json:
            self.write(machine.step_line(outcome) + "\n")
        else:
            self.say(human.step_text(outcome, self.paint(), with_time=self.verbose > 0))

    def confirm(self, plan: Plan, reason: str) -> bool:
        """True if the question is answered with exactly `yes`, or was with --yes."""
        from orchestrator.views.human import plan_text, rules_text

        if self.is_yes:
            return True
        if not sys.stdin.isatty():
            raise UsageError(
                f"needs a confirmation: {reason or 'asked for with --ask'}".strip(),
                where="standard input is not a terminal",
                hint="give -y/--yes if that is meant",
            )
        texts = rules_text(plan, self.paint()) if self.is_full else ""
        question = f'{reason} Only "yes" is accepted: '.lstrip()
        self.ask(f"{plan_text(plan, plan.profile, self.paint(), texts)}{question}")
        with self.asking():
            return sys.stdin.readline().strip() == "yes"

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While somebody is asked, a signal that is caught ends the command at once, with Interrupted."""
        self._is_asking = True
        try:
            if self.signal_number:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self._is_asking = False

    def result(self, exit_code: ExitCode, text: str, **content: Any) -> ExitCode:
        """The last thing a command says; that nobody reads it any more does not change what was done.

        Raises OutputError if it cannot be written.
        """
        try:
            self.tell(exit_code, text, **content)
            self.flush()
        except BrokenPipeError:
            pass
        except OutputError as error:
            if self.has_worked:
                last = text.rstrip().rpartition("\n")[2]
                error.exit_code, error.hint = exit_code, f"the work was done{': ' if last else ''}{last}"
            raise
        return exit_code

    def tell(self, exit_code: ExitCode, text: str, **content: Any) -> None:
        """A JSON line, or text, on standard output."""
        if self.is_json:
            from orchestrator.views import machine

            self.write(machine.result_line(self.command, exit_code, **content) + "\n")
        elif not self.is_quiet:
            self.write(text)

    @contextmanager
    def catching_signals(self, *, is_once: bool = True) -> Iterator[None]:
        """INT, TERM and HUP are remembered, so that the running step can end and be undone; a question ends at once.

        Afterwards they are as before, or, where that was the work of this command (`is_once`), ignored: it is done or
        undone by then, and the exit code says which.
        """

        def handle(number: int, _frame: object) -> None:
            self.signal_number = self.signal_number or number
            if self._is_asking:
                raise Interrupted(number)

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        self.has_worked = is_once
        try:
            yield
        finally:
            for number, handler in before.items():
                # Not a function of ours: the interpreter takes those away before the process ends.
                signal.signal(number, signal.SIG_IGN if is_once else handler)


@contextmanager
def writing() -> Iterator[None]:
    """Raises OutputError if standard output cannot be written, and BrokenPipeError if nobody reads it any more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error) from error


def is_coloured(colour: Colour, stream: Any) -> bool:
    if colour is not Colour.AUTO:
        return colour is Colour.ALWAYS
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def load(profile: str) -> Desired:
    from orchestrator import profile as profiles
    from orchestrator.supervise.describe import describe

    if profile == "-":
        return profiles.load(sys.stdin.buffer.read(), "<stdin>", describe)
    return profiles.load_file(Path(profile), describe)


def render_target(desired: Desired, templates: Path | None) -> Target:
    from orchestrator import render

    return render.target(desired, template_dir=templates)


def make_app(session: Session, *, netns: str | None, state_dir: Path, wait_s: float = 10.0) -> App:
    """The use cases, on this kernel. Raises OrchError if the state directory is something else."""
    from orchestrator import app, reports

    def guard() -> None:
        from orchestrator import watchdog

        watchdog.start(state_dir)

    talk = reports.Talk(session.step, session.warn, session.confirm, lambda: session.signal_number)
    state_dir = state_dir.resolve()  # processes are found by its text
    if state_dir.exists() and not state_dir.is_dir():
        raise OrchError("the state directory is not a directory", where=str(state_dir), hint="set --state-dir")
    return app.App(app.kernel_system(state_dir), state_dir, app.boot_id(), talk, netns, wait_s, guard)


def warn_all(session: Session, desired: Desired) -> None:
    for sentence in desired.warnings:
        session.warn(sentence)


def new_session(command: str, is_json: bool, colour: Colour, verbose: int, is_quiet: bool) -> Session:
    return Session(command, is_json=is_json, colour=colour, verbose=verbose, is_quiet=is_quiet)
