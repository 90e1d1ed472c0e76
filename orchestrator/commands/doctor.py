"""`orch doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from orchestrator.session import (
    DEFAULT_STATE,
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

ProbeOption = Annotated[
    bool, typer.Option("--probe", envvar="ORCH_PROBE", help="Ask the kernel, which may load modules for it.")
]


def doctor(
    netns: NetnsOption = None,
    is_probing: ProbeOption = False,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Look for everything that can be wrong on this host: the cause and the cure, one line each; changes nothing."""
    from orchestrator.doctor.findings import Verdict, examine
    from orchestrator.doctor.gather import gather
    from orchestrator.doctor.host_probes import HOST_PROBES
    from orchestrator.doctor.place_probes import PLACE_PROBES
    from orchestrator.views import doctor as view

    session = new_session("doctor", is_json, colour, verbose, is_quiet)
    app = make_app(session, netns=netns, state_dir=state_dir)
    answers = app.system.host.probe() if is_probing else None
    findings = examine(gather(app, answers=answers), HOST_PROBES, PLACE_PROBES)
    code = ExitCode.DIFFERS if any(f.verdict is Verdict.PROBLEM for f in findings) else ExitCode.OK
    text = view.text(findings, session.paint(sys.stdout), is_full=verbose > 0)
    return session.result(code, text, findings=view.value(findings))
