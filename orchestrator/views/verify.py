"""`orch verify`: a line for each dialogue, and the counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.verify.run import Outcome, Result, Verification
from orchestrator.views.human import Paint

_COLOURS: dict[str, str] = {
    Outcome.OK: "ok",
    Outcome.FAILED: "error",
    Outcome.SKIPPED: "warning",
    Outcome.NO_DIALOGUE: "warning",
}
_HEADINGS = ("HELPER", "TRAFFIC", "PATH", "DIALOGUE", "RESULT", "TIME", "")
_OUTCOME = 4


def text(verification: Verification, paint: Paint) -> str:
    rows = [_HEADINGS, *map(_cells, verification.results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[_OUTCOME] = paint(cells[_OUTCOME], _COLOURS.get(row[_OUTCOME], ""))
        lines.append("  ".join(cells).rstrip())
    return "\n".join((*lines, _summary(verification))) + "\n"


def _cells(result: Result) -> tuple[str, ...]:
    case = result.case
    return (
        case.helper,
        f"{case.l3proto}/{case.l4proto}/{case.port}",
        case.path,
        case.dialogue.name if case.dialogue else "-",
        result.outcome,
        f"{result.seconds * 1000:.0f} ms" if result.seconds else "-",
        result.reason,
    )


def _summary(verification: Verification) -> str:
    return f"Profile {verification.profile}: {', '.join(_counts(verification))}."


def _counts(verification: Verification) -> Iterator[str]:
    for outcome in Outcome:
        number = verification.count(outcome)
        if number or outcome in (Outcome.OK, Outcome.FAILED):
            yield f"{number} {outcome}" if outcome is not Outcome.NO_DIALOGUE else f"{number} without a dialogue"


def value(verification: Verification) -> dict[str, Any]:
    return {
        "profile": verification.profile,
        "modules_loaded": list(verification.modules),
        "results": [
            {
                "helper": result.case.helper,
                "l3proto": result.case.l3proto,
                "l4proto": result.case.l4proto,
                "path": result.case.path,
                "port": result.case.port,
                "dialogue": result.case.dialogue.name if result.case.dialogue else None,
                "outcome": result.outcome,
                "reason": result.reason,
                "seconds": round(result.seconds, 6),
            }
            for result in verification.results
        ],
    }
