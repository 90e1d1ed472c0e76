"""`orch rollback`: undo what waits for its confirmation, or return to what was applied before."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.session import (
    DEFAULT_STATE,
    AppliedArgument,
    AskOption,
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    NetnsOption,
    QuietOption,
    StateOption,
    VerboseOption,
    WaitOption,
    YesOption,
    make_app,
    new_session,
)


def rollback(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    to: Annotated[
        int | None,
        typer.Option("--to", envvar="ORCH_TO", min=1, metavar="N", help="To this line of orch history."),
    ] = None,
    ask: AskOption = False,
    is_yes: YesOption = False,
    wait_s: WaitOption = 10.0,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Undo what was applied with --confirm-within; if nothing waits, return to what was applied before."""
    from orchestrator import confirm as confirming
    from orchestrator.views import history as view

    session = new_session("rollback", is_json, colour, verbose, is_quiet)
    session.is_yes = is_yes
    with session.catching_signals():
        app = make_app(session, netns=netns, state_dir=state_dir, wait_s=wait_s)
        ended = confirming.roll_back(app, profile, to=to, ask=ask)
    report = ended.report
    leftovers = report.leftovers if report else ()
    for note in report.notes if report else ():
        session.warn(note)
    for sentence in leftovers:
        session.warn(f"left: {sentence}")
    code = ExitCode.MIXED if leftovers else ExitCode.OK
    if report and report.declined:
        code = ExitCode.DECLINED
    return session.result(code, view.rollback_text(ended), rollback=view.rollback_value(ended))
