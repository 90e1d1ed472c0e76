"""`orch history`, `orch rollback`, and the verdict on an apply that had to be confirmed: as text and as values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.confirm import History, Rollback, Verdict
from orchestrator.state import Applied, Owner, Past, Pending
from orchestrator.typed import how_to
from orchestrator.views import machine

_NOW = "  <- applied now"
_NAMED = 8  # of thousands of helpers


def text(histories: tuple[History, ...], wanted: str = "") -> str:
    if not histories:
        return f"Profile {wanted} was not applied.\n" if wanted else "Nothing was applied.\n"
    return "".join(f"{line}\n" for history in histories for line in _lines(history))


def _lines(history: History) -> Iterator[str]:
    waits = ": what is applied now waits for its confirmation" if history.is_pending else ""
    yield f"{history.owner}{waits}"
    width = max((len(past.command) for past in history.past), default=0)
    for number, past in enumerate(history.past, 1):
        helpers = _some([helper.name for helper in past.applied.helpers])
        now = _NOW if number - 1 == history.current else ""
        time_text, source = say_time(past.applied.applied_at), past.applied.source
        yield f"  {number:2}  {time_text}  {past.command.ljust(width)}  {source} ({helpers}){now}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def value(histories: tuple[History, ...]) -> list[dict[str, Any]]:
    return [
        {
            **_owner_value(history.owner),
            "pending": history.is_pending,
            "lines": [
                {"number": number, "current": number - 1 == history.current, **_past_value(past)}
                for number, past in enumerate(history.past, 1)
            ],
        }
        for history in histories
    ]


def rollback_text(ended: Rollback) -> str:
    if ended.report and ended.report.declined:
        return "Nothing was changed.\n"
    if ended.report and ended.report.leftovers:
        way = "removed" if ended.to is None else "as it was before"
        return f"{_upper(ended.owner)} is not wholly {way}.\n"
    return f"Rolled back: {_is_now(ended.owner, ended.to)}.\n"


def rollback_value(ended: Rollback) -> dict[str, Any]:
    return {
        **_owner_value(ended.owner),
        "unconfirmed": ended.is_verdict,
        "source": ended.to.source if ended.to else None,
        "applied_at": ended.to.applied_at if ended.to else None,
        "report": machine.report_value(ended.report) if ended.report else None,
    }


def verdict_text(pending: Pending, verdict: Verdict) -> str:
    if verdict is Verdict.CONFIRMED:
        return f"Confirmed: {pending.owner}.\n"
    return f"Not confirmed, and rolled back: {_is_now(pending.owner, pending.prior)}.\n"


def pending_value(pending: Pending, left_s: float, state_dir: Path) -> dict[str, Any]:
    command = confirm_command(pending, state_dir)
    return {"within_s": pending.within_s, "seconds_left": round(left_s, 1), "confirm": command}


def confirm_command(pending: Pending, state_dir: Path) -> str:
    return how_to("confirm", pending.owner.profile, state_dir=state_dir)


def say_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _is_now(owner: Owner, applied: Applied | None) -> str:
    if applied is None:
        return f"nothing of {owner} is applied"
    return f"{owner} is as applied from {applied.source} at {say_time(applied.applied_at)}"


def _owner_value(owner: Owner) -> dict[str, Any]:
    return {"profile": owner.profile, "netns": owner.netns.label}


def _past_value(past: Past) -> dict[str, Any]:
    applied = past.applied
    return {
        "command": past.command,
        "applied_at": applied.applied_at,
        "source": applied.source,
        "helpers": [helper.name for helper in applied.helpers],
    }


def _upper(owner: Owner) -> str:
    return f"P{str(owner)[1:]}"
