"""What programs read: JSON Lines. Keys are those of the model, durations in seconds; additions raise the minor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from orchestrator.errors import OrchError, ProfileError, RollbackError
from orchestrator.execute import Outcome
from orchestrator.reports import Difference, PlanRefusedError, Report, TeardownReport
from orchestrator.state import Plan, Refusal, describe
from orchestrator.status import HostStatus, Waiting

SCHEMA = "1.3"


def step_line(outcome: Outcome) -> str:
    return _line(
        {
            "type": "step",
            "step": describe(outcome.step),
            "ok": not outcome.error,
            "error": outcome.error,
            "undo": outcome.is_undo,
            "seconds": round(outcome.seconds, 6),
        }
    )


def result_line(command: str, exit_code: int, **content: Any) -> str:
    """The last line of every command: `content` is one of plan, report, status, helpers, problems or error."""
    return _line({"type": "result", "schema": SCHEMA, "command": command, "exit_code": exit_code, **content})


def plan_value(plan: Plan) -> dict[str, Any]:
    return {
        "profile": plan.profile,
        "netns": plan.netns.label,
        "changes": [
            {
                "action": c.action,
                "scope": c.scope,
                "subject": c.subject,
                "detail": c.detail,
                "reason": c.reason,
                "effect": c.effect,
            }
            for c in plan.changes
        ],
        "steps": [describe(step) for step in plan.steps],
        "adopted": [str(key) for key in plan.adopted],
        "kept": list(plan.kept),
        "waiting": list(plan.waiting),
        "connections_cut": plan.cut,
        "refusals": [refusal_value(r) for r in plan.refusals],
    }


def difference_value(difference: Difference) -> dict[str, Any]:
    return {
        **plan_value(difference.plan),
        "rules": {"loaded": difference.loaded_documents, "wanted": difference.wanted_documents},
        "drift": {"as_loaded": difference.baseline_listing, "now": difference.live_listing},
    }


def report_value(report: Report) -> dict[str, Any]:
    return {
        **plan_value(report.plan),
        "declined": report.declined,
        "leftovers": list(report.leftovers),
        "notes": list(report.notes),
    }


def teardown_value(report: TeardownReport) -> dict[str, Any]:
    return {
        "profiles": [report_value(one) for one in report.reports],
        "others": [{"profile": o.profile, "netns": o.netns.label} for o in report.others],
    }


def _pending_value(trial: Waiting | None) -> dict[str, Any] | None:
    return {"seconds_left": round(trial.left_s, 1), "watched": trial.is_watched} if trial else None


def status_value(status: HostStatus) -> dict[str, Any]:
    return {
        "profiles": [
            {
                "profile": p.owner.profile,
                "netns": p.owner.netns.label,
                "source": p.source,
                "backend": p.backend,
                "applied_at": p.applied_at,
                "drift": list(p.drift),
                "not_mended": p.mending,
                "pending": _pending_value(p.trial),
                "helpers": [
                    {
                        "name": h.name,
                        "engine": h.engine,
                        "queueing": h.queueing,
                        "registrations": {str(key): state for key, state in h.registrations},
                        "queues": [
                            {"queue_num": q.queue_num, "bound": q.is_bound, "waiting": q.waiting, "dropped": q.dropped}
                            for q in h.queues
                        ],
                        "expectations": h.expectations,
                        "state": h.state,
                        "state_since": h.state_since or None,
                        "restarts": h.restarts,
                        "reason": h.reason,
                        "connections": h.connections,
                        "lifetimes": asdict(h.lifetimes) if h.lifetimes else None,
                        "pid": h.pid or None,
                        "since_s": h.since_s,
                        "last_words": h.last_words,
                        "hung_s": h.hung_s,
                        "counters": asdict(h.counters.counters) if h.counters else None,
                        "note": h.counters.note if h.counters else "",
                    }
                    for h in p.helpers
                ],
            }
            for p in status.profiles
        ],
        "unknown": [{"profile": o.profile, "netns": o.netns.label} for o in status.unknown],
        "unsettled": [f"{one.command} of {one.owner}" for one in status.unsettled],
        "working": status.working,
    }


def error_value(error: OrchError) -> dict[str, Any]:
    value: dict[str, Any] = {"what": error.what, "where": error.where, "hint": error.hint, "cause": error.cause}
    if isinstance(error, ProfileError):
        value["problems"] = [
            {"source": p.source, "line": p.line, "column": p.column, "message": p.message, "hint": p.hint}
            for p in error.problems
        ]
    if isinstance(error, PlanRefusedError):
        value["refusals"] = [refusal_value(r) for r in error.refusals]
    if isinstance(error, RollbackError):
        value["leftovers"] = list(error.leftovers)
    return value


def refusal_value(refusal: Refusal) -> dict[str, str]:
    return {"what": refusal.what, "where": refusal.where, "hint": refusal.hint}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
