"""`orch watch`: keep what is applied as it was applied."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

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
    from orchestrator.drift import MendReport
    from orchestrator.execute import Outcome as StepOutcome
    from orchestrator.state import Owner

_ONCE_WITHIN_S = 10.0


def watch(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    interval_s: Annotated[
        float,
        typer.Option(
            "--interval",
            envvar="ORCH_INTERVAL",
            min=0.1,
            metavar="SECONDS",
            help="How often to look for what nobody tells of: registrations, modules, rules of iptables-legacy.",
        ),
    ] = 30.0,
    repairs: Annotated[
        int,
        typer.Option(
            "--repairs",
            envvar="ORCH_REPAIRS",
            min=1,
            help="How often a minute to mend one thing, before giving up.",
        ),
    ] = 5,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", envvar="ORCH_DRY_RUN", help="Say what has drifted, and leave it so.")
    ] = False,
    is_once: Annotated[bool, typer.Option("--once", envvar="ORCH_ONCE", help="Look once, mend, and end.")] = False,
    is_news_only: Annotated[
        bool,
        typer.Option("--news", envvar="ORCH_NEWS", help="Say nothing of what is not mended if it was said before."),
    ] = False,
    wait_s: WaitOption = 10.0,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Mend what others change of an applied profile, as soon as they do, until interrupted."""
    import gc

    from orchestrator import drift, watcher
    from orchestrator.app import local_processes

    session = new_session("watch", is_json, colour, verbose, is_quiet)
    gc.enable()  # this command does not end soon
    app = make_app(session, netns=netns, state_dir=state_dir, wait_s=wait_s)
    # Nobody is there to be asked, and steps are of no interest unless somebody says so.
    talk = replace(app.talk, confirm=lambda _plan, _reason: False, step=session.step if verbose else _say_nothing)
    app = replace(app, talk=talk)
    mend = partial(drift.mend, app, limits=drift.Limits(repairs), is_dry_run=is_dry_run)
    teller = _Teller(session, is_news_only=is_news_only)
    if is_once:
        owners = [applied.owner for applied in app.applied(profile)]
        sleep, interrupted = app.system.clock.sleep, app.talk.interrupted
        with session.catching_signals():
            reports = watcher.look_once(
                owners, mend, teller.tell, within_s=_ONCE_WITHIN_S, sleep=sleep, interrupted=interrupted
            )
        if profile and not owners:
            session.warn(f"profile {profile} is not applied")
        return session.result(_code(reports, is_there=bool(owners or not profile)), "", profiles=len(owners))

    def interruptible(owner: Owner) -> MendReport:
        """To mend many things may take minutes, and no service manager waits as long."""
        with session.catching_signals(is_once=False):
            return mend(owner)

    watching = watcher.Watcher(
        app,
        local_processes(app.state_dir),
        profile=profile,
        interval_s=interval_s,
        mend=interruptible,
        tell=teller.tell,
    )
    watching.run()
    return session.result(ExitCode.OK, "", profiles=len(watching.owners))


def _say_nothing(_outcome: StepOutcome) -> None:
    pass


def _code(reports: list[MendReport], *, is_there: bool) -> ExitCode:
    from orchestrator.drift import Outcome

    outcomes = {report.outcome for report in reports}
    if any(r.outcome is Outcome.FAILED or (r.outcome is Outcome.MENDED and r.reason) for r in reports):
        return ExitCode.FAILED
    is_right = outcomes <= {Outcome.RIGHT, Outcome.MENDED} and not any(report.is_partial for report in reports)
    return ExitCode.OK if is_right and is_there else ExitCode.DIFFERS


class _Teller:
    """Says what came of each look, and of trouble nothing twice; also what others have said before, unless told not to.

    What is right again may be said again when it is not.
    """

    def __init__(self, session: Session, *, is_news_only: bool) -> None:
        self._session = session
        self._is_news_only = is_news_only
        self._told: dict[str, MendReport] = {}
        self._trouble: dict[str, str] = {}

    def tell(self, report: MendReport, culprit: str = "") -> None:
        import time

        from orchestrator.drift import Outcome
        from orchestrator.views import watch as view

        if self._is_known(report):
            return
        now_s = time.time()
        if report.outcome is Outcome.GIVEN_UP:
            self._session.complain(f"{report.owner}: not mended any more: {report.reason}")
        if self._session.is_json:
            self._session.write_at_work(view.line(report, now_s, culprit=culprit) + "\n")
        elif not self._session.is_quiet:
            text = view.text(report, now_s, self._session.paint(sys.stdout), culprit=culprit)
            self._session.write_at_work(text + "\n")

    def _is_known(self, report: MendReport) -> bool:
        from orchestrator.drift import Outcome

        at = str(report.owner)
        before, self._told[at] = self._told.get(at), report
        if report.outcome is Outcome.MENDED:
            return False
        if report.outcome is Outcome.RIGHT:
            self._trouble.pop(at, None)
        if report.outcome in (Outcome.RIGHT, Outcome.WAITING):
            return report == before or not self._session.verbose
        if report.outcome is Outcome.DIFFERS:
            return report == before
        said, self._trouble[at] = self._trouble.get(at), f"{report.outcome}: {report.reason}"
        return said == self._trouble[at] or (self._is_news_only and not report.is_news)
