"""`orch history`: what was applied, newest first."""

from __future__ import annotations

from orchestrator.session import (
    DEFAULT_STATE,
    AppliedArgument,
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    NetnsOption,
    QuietOption,
    StateOption,
    VerboseOption,
    make_app,
    new_session,
)


def history(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """List the last ten that were applied of every profile, newest first; orch rollback --to returns to one."""
    from orchestrator import confirm as confirming
    from orchestrator.views import history as view

    session = new_session("history", is_json, colour, verbose, is_quiet)
    histories = confirming.history(make_app(session, netns=netns, state_dir=state_dir), profile)
    return session.result(ExitCode.OK, view.text(histories, profile), history=view.value(histories))
