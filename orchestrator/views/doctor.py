"""`orch doctor`: findings, the worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.doctor.findings import Finding, Verdict
from orchestrator.views.human import Paint

_COLOURS = {Verdict.PROBLEM: "error", Verdict.WARNING: "warning", Verdict.SKIPPED: "skipped", Verdict.OK: "ok"}
_WIDTH = max(map(len, Verdict)) + 2


def text(findings: Sequence[Finding], paint: Paint, *, is_full: bool) -> str:
    """A line for each cause and one for its cure; with `is_full` what is right, too."""
    lines = [line for v in (Verdict.PROBLEM, Verdict.WARNING) for f in _of(findings, v) for line in _lines(f, paint)]
    lines += _skipped_lines(_of(findings, Verdict.SKIPPED), paint)
    lines += [line for f in _of(findings, Verdict.OK) for line in _lines(f, paint)] if is_full else []
    return "\n".join([*lines, _summary(findings, is_full=is_full)]) + "\n"


def _of(findings: Sequence[Finding], verdict: Verdict) -> list[Finding]:
    return [finding for finding in findings if finding.verdict is verdict]


def _lines(finding: Finding, paint: Paint) -> Iterator[str]:
    yield f"{_verdict(finding.verdict, paint)}{_place(finding)}: {finding.cause}"
    if finding.cure:
        yield f"{' ' * _WIDTH}cure: {finding.cure}"


def _skipped_lines(findings: Sequence[Finding], paint: Paint) -> Iterator[str]:
    """One for each reason: what cannot be looked at is often the reason for several."""
    for cause in dict.fromkeys(finding.cause for finding in findings):
        places = ", ".join(_place(finding) for finding in findings if finding.cause == cause)
        yield f"{_verdict(Verdict.SKIPPED, paint)}{places}: {cause}"


def _verdict(verdict: Verdict, paint: Paint) -> str:
    return paint(verdict, _COLOURS[verdict]) + " " * (_WIDTH - len(verdict))


def _place(finding: Finding) -> str:
    return f"{finding.probe} in netns {finding.where}" if finding.where else finding.probe


def _summary(findings: Sequence[Finding], *, is_full: bool) -> str:
    count = Counter(finding.verdict for finding in findings)
    parts = (
        _plural(count[Verdict.PROBLEM], "problem"),
        _plural(count[Verdict.WARNING], "warning"),
        f"{count[Verdict.SKIPPED]} skipped",
        f"{count[Verdict.OK]} ok" + ("" if is_full else " (-v shows them)"),
    )
    return ", ".join(parts) + "."


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def value(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
