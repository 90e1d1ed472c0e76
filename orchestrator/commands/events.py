"""`orch events`: what happens to expectations and helper processes, until somebody interrupts it."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Annotated

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
    StateOption,
    VerboseOption,
    make_app,
    new_session,
)


def events(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    count: Annotated[
        int, typer.Option("--count", envvar="ORCH_COUNT", min=0, help="End after so many; 0 is never.")
    ] = 0,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Print what becomes of expectations and of helper processes, one line each, as it happens."""
    import gc

    from orchestrator.events import Stream
    from orchestrator.views import events as view

    session = new_session("events", is_json, colour, verbose, is_quiet)
    gc.enable()  # this command does not end soon
    app = make_app(session, netns=netns, state_dir=state_dir)
    paint = session.paint(sys.stdout)
    stream = Stream(
        lambda: app.applied(profile), app.system.processes, app.state_dir, is_whole=not profile, output=_descriptor()
    )
    seen = 0
    with contextlib.closing(stream):
        stream.open()
        session.say(f"listening in {', '.join(stream.places) or 'no namespace: nothing is applied yet'}")
        for event in stream.events():
            session.write((view.line(event) if is_json else view.text(event, paint)) + "\n")
            session.flush()
            seen += 1
            if seen == count:
                break
    return session.result(ExitCode.OK, "", events=seen)


def _descriptor() -> int | None:
    try:
        return sys.stdout.fileno()
    except io.UnsupportedOperation:
        return None
