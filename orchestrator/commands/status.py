"""`orch status`: once, or refreshed until somebody interrupts it."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    writing,
)

_CLEAR = "\x1b[H\x1b[J"  # ECMA-48: cursor to the top left, erase to the end


def status(
    profile: AppliedArgument = "",
    netns: NetnsOption = None,
    is_watching: Annotated[
        bool, typer.Option("--watch", envvar="ORCH_WATCH", help="Show it again and again, until interrupted.")
    ] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", envvar="ORCH_INTERVAL", min=0.1, metavar="SECONDS", help="How often, with --watch."),
    ] = 2.0,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Show every applied profile: is each helper working, what has it done, and what is not as it was applied."""
    session = new_session("status", is_json, colour, verbose, is_quiet)
    app = make_app(session, netns=netns, state_dir=state_dir)

    def show(prefix: str) -> ExitCode:
        import time

        from orchestrator.views import machine
        from orchestrator.views import status as view

        seen = app.status(profile)
        text = prefix + view.text(
            seen,
            session.paint(sys.stdout),
            now_s=time.time(),
            wanted=profile,
            width=_width(),
            is_verbose=verbose > 0,
            state_dir=app.state_dir,
        )
        is_there = bool(seen.profiles or not profile)
        code = ExitCode.OK if seen.is_right and is_there else ExitCode.DIFFERS
        (session.tell if is_watching else session.result)(code, text, status=machine.status_value(seen))
        return code

    return _watch(show, interval_s) if is_watching else show("")


def _watch(show: Callable[[str], ExitCode], interval_s: float) -> ExitCode:
    """Show until INT; returns what the last one told."""
    import gc
    import time

    gc.enable()  # this command does not end soon
    prefix = _CLEAR if sys.stdout.isatty() else ""
    code = ExitCode.OK
    try:
        while True:
            code = show(prefix)
            with writing():
                sys.stdout.flush()
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return code


def _width() -> int | None:
    """Columns of the terminal, None where there is none: then nothing is cut."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
