"""`orch watch`: a line for each thing that was mended, or that could not be."""

from __future__ import annotations

import json
import time

from orchestrator.drift import MendReport, Outcome
from orchestrator.state import Action, Change
from orchestrator.views.human import Paint

_COLOURS = {Outcome.RIGHT: "ok", Outcome.MENDED: "ok", Outcome.FAILED: "error", Outcome.GIVEN_UP: "error"}
_STATES = {Action.CREATE: "missing", Action.DELETE: "should not be there"}


def text(report: MendReport, now_s: float, paint: Paint, *, culprit: str = "") -> str:
    """When, where, what became of it, and what had drifted; `culprit` had changed the rules. Without an end of line."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
    word = paint(report.outcome, _COLOURS.get(report.outcome, "warning"))
    drift = "; ".join(map(_change, report.changes))
    reason = f" ({report.reason})" if report.reason and drift else report.reason
    who = f", by {culprit}" if culprit and drift else ""
    return f"{when} {report.owner}: {word}{': ' if drift or reason else ''}{drift}{who}{reason}"


def line(report: MendReport, now_s: float, *, culprit: str = "") -> str:
    return json.dumps(
        {
            "type": "drift",
            "time": round(now_s, 3),
            "profile": report.owner.profile,
            "netns": report.owner.netns.label,
            "outcome": report.outcome,
            "changes": [
                {
                    "action": change.action,
                    "scope": change.scope,
                    "subject": change.subject,
                    "detail": change.detail,
                    "reason": change.reason,
                }
                for change in report.changes
            ],
            "reason": report.reason,
            "changed_by": culprit,
        },
        ensure_ascii=False,
    )


def _change(change: Change) -> str:
    words = change.reason or _STATES.get(change.action, "") or change.detail
    return f"{change.subject} {words}".rstrip()
