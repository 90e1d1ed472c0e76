"""`orch confirm`, and the same answer where `orch apply --confirm-within` asks on its terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.errors import Interrupted, OrchError, RollbackError, UsageError
from orchestrator.session import (
    DEFAULT_STATE,
    AppliedArgument,
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    NetnsOption,
    QuietOption,
    Session,
    StateOption,
    VerboseOption,
    WaitOption,
    make_app,
    new_session,
)

if TYPE_CHECKING:
    from orchestrator.app import App
    from orchestrator.confirm import Verdict
    from orchestrator.reports import Report, Trial
    from orchestrator.state import Pending

_UNDOING_WAITS_S = 600.0  # for the lock: the watchdog may be at it already
_LINE_MAX = 4096


def confirm(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    wait_s: WaitOption = 10.0,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Keep what was applied with --confirm-within."""
    from orchestrator import confirm as confirming

    session = new_session("confirm", is_json, colour, verbose, is_quiet)
    with session.catching_signals():
        owner = confirming.confirm(make_app(session, netns=netns, state_dir=state_dir, wait_s=wait_s), profile)
    content = {"profile": owner.profile, "netns": owner.netns.label}
    return session.result(ExitCode.OK, f"Confirmed: {owner}.\n", confirmed=content)


def new_trial(app: App, within_s: float, *, accepts_loss: bool) -> Trial:
    """A trial whose guard is a watchdog of its own. Raises UsageError if it would be too long."""
    from orchestrator import watchdog
    from orchestrator.model import CONFIRM_MAX_S
    from orchestrator.reports import Trial

    if not within_s <= CONFIRM_MAX_S:  # nan neither
        raise UsageError(f"--confirm-within takes at most {CONFIRM_MAX_S} seconds, not {within_s:g}")
    return Trial(within_s, lambda: watchdog.start(app.state_dir), accepts_loss=accepts_loss)


def ask(session: Session, app: App, report: Report, pending: Pending, *, is_asked: bool) -> ExitCode:
    """The end of an apply that has to be confirmed: the answer of whoever sits there, or how to give it."""
    from orchestrator import confirm as confirming
    from orchestrator.views import history as view
    from orchestrator.views import human, machine

    value = machine.report_value(report)
    applied = human.applied_text(report, pending.source)
    if not (is_asked and sys.stdin.isatty()):
        left_s = _left_s(app, pending)
        command = view.confirm_command(pending, app.state_dir)
        text = f"{applied}Undone in {human.duration_text(left_s)}, unless confirmed: {command}\n"
        waits = view.pending_value(pending, left_s, app.state_dir)
        return session.result(ExitCode.OK, text, report=value, pending=waits)
    if not (session.is_json or session.is_quiet):
        session.write_at_work(applied)
    found = _settle(session, app, pending)
    code = ExitCode.OK if found is confirming.Verdict.CONFIRMED else ExitCode.DECLINED
    return session.result(code, view.verdict_text(pending, found), report=value, verdict=found)


def _settle(session: Session, app: App, pending: Pending) -> Verdict:
    """Wait for an answer, from here or from elsewhere, and do what it says. Interrupted leaves it to the watchdog."""
    from orchestrator import confirm as confirming
    from orchestrator.views import history as view

    answer, found = None, confirming.Verdict.WAITING
    try:
        with session.asking():
            answer = _Answer(session, app, pending).wait()
        if answer == "yes":
            found = confirming.keep(app, pending)
        elif answer is None:
            found = confirming.verdict(app, pending)
    except OrchError:
        new_line, command = "\n" if answer is None else "", view.confirm_command(pending, app.state_dir)
        session.say(f"{new_line}not confirmed yet: {command}, or it is undone in time")
        raise
    if answer is None:
        session.say("")
    if found is not confirming.Verdict.WAITING:
        return found
    if answer is not None:
        session.say("not confirmed in time: undoing it" if answer == "yes" else "undoing it")
    patient = replace(app, wait_s=_UNDOING_WAITS_S, talk=replace(app.talk, interrupted=lambda: 0))
    with patient.settled(f"rollback {pending.owner.profile}") as ledger:
        ended = confirming.undo(patient, ledger, pending)
    if ended.report and ended.report.leftovers:
        raise RollbackError(OrchError(f"the apply of {pending.owner} could not be undone"), ended.report.leftovers)
    return confirming.Verdict.ROLLED_BACK


class _Answer:
    """The question, and everything that may end it: a line, the end of the terminal, the deadline, another orch."""

    def __init__(self, session: Session, app: App, pending: Pending) -> None:
        from orchestrator.supervise import inotify

        self._session = session
        self._app = app
        self._pending = pending
        self._changes = inotify.Inotify()
        self._changes.add(str(app.state_dir), inotify.MODIFIED | inotify.CREATED | inotify.DELETED)
        self._poll = select.poll()
        self._poll.register(self._changes.fileno(), select.POLLIN)
        self._poll.register(sys.stdin.fileno(), select.POLLIN)

    def wait(self) -> str | None:
        """The line that was given, None if there is none. Raises Interrupted if the terminal is gone."""
        from orchestrator import confirm as confirming

        left_s = _left_s(self._app, self._pending)
        self._session.ask(
            "Open a NEW connection through this host. Keep the changes?"
            f' Only "yes" is accepted ({max(0, round(left_s))} s): '
        )
        while confirming.verdict(self._app, self._pending) is confirming.Verdict.WAITING:
            left_s = _left_s(self._app, self._pending)
            if left_s <= 0:
                return None
            happened = dict(self._poll.poll(left_s * 1000 + 1))
            self._changes.read()
            if said := happened.get(sys.stdin.fileno()):
                return self._line(said)
        return None

    def _line(self, said: int) -> str:
        """A terminal that was hung up says nothing, as does one at which somebody only ends the input: that is a no."""
        if said & (select.POLLHUP | select.POLLERR):
            raise Interrupted(signal.SIGHUP)
        return os.read(sys.stdin.fileno(), _LINE_MAX).decode(errors="replace").strip()


def _left_s(app: App, pending: Pending) -> float:
    return pending.left_s(app.system.clock.boottime())
