"""`orch verify PROFILE`: the check that finds what looks healthy and is not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from orchestrator.session import (
    DEFAULT_STATE,
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    ProfileArgument,
    QuietOption,
    StateOption,
    TemplatesOption,
    VerboseOption,
    WaitOption,
    load,
    new_session,
    warn_all,
)

if TYPE_CHECKING:
    from orchestrator.execute import Outcome as StepOutcome
    from orchestrator.verify.run import Verification


def verify(
    profile: ProfileArgument,
    wait_s: WaitOption = 10.0,
    templates: TemplatesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Try a profile in throw-away namespaces: hold a dialogue with each helper, and say what was not expected."""
    from orchestrator.reports import Talk
    from orchestrator.verify.disguise import narrowed
    from orchestrator.verify.run import Trial
    from orchestrator.views import verify as view

    session = new_session("verify", is_json, colour, verbose, is_quiet)
    desired = load(profile)
    warn_all(session, desired)
    if narrowed(desired):
        session.warn("interfaces and addresses of the profile are not tried: helpers are attached for any")

    def tell(outcome: StepOutcome) -> None:
        if verbose and not is_json:
            session.step(outcome)

    with session.catching_signals():
        talk = Talk(tell, session.warn, lambda _plan, _reason: True, lambda: session.signal_number)
        verification = Trial(talk, state_dir, wait_s, templates).run(desired)
    for module in verification.modules:
        session.warn(f"kernel module {module} was loaded for this, and stays")
    text = view.text(verification, session.paint(sys.stdout))
    return session.result(_code(verification), text, verification=view.value(verification))


def _code(verification: Verification) -> ExitCode:
    from orchestrator.verify.run import Outcome

    if verification.count(Outcome.FAILED):
        return ExitCode.DIFFERS
    return ExitCode.OK if verification.count(Outcome.OK) else ExitCode.FAILED
