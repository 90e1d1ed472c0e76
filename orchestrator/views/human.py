"""What people read: plans, steps, reports and errors as text. Colour repeats what a symbol or a word already says."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from orchestrator.errors import OrchError, Problem, ProfileError, RollbackError
from orchestrator.execute import Outcome
from orchestrator.model import Rules
from orchestrator.reports import (
    RELATED_RULE,
    Difference,
    PlanRefusedError,
    Report,
    TeardownReport,
)
from orchestrator.state import Action, Change, LoadRules, Plan, Scope, describe

SYMBOLS = {Action.CREATE: "+", Action.UPDATE: "~", Action.REPLACE: "-/+", Action.DELETE: "-"}
_COLOURS = {"+": 32, "~": 33, "-/+": 35, "-": 31, "error": 31, "warning": 33, "ok": 32}


class Paint:
    """Colours words, or leaves them alone."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on

    def __call__(self, word: str, kind: str) -> str:
        code = _COLOURS.get(kind.strip())
        return f"\x1b[{code}m{word}\x1b[0m" if self.is_on and code else word


def plan_text(plan: Plan, source: str, paint: Paint, texts: str = "") -> str:
    """The changes of a plan by scope, in the order of execution; then `texts`, and the counts in the last line."""
    texts += "".join(f"{sentence}\n" for sentence in plan.waiting)
    if not plan.changes:
        return texts + _no_changes(plan, source)
    lines = [f"profile {source}, netns {plan.netns}"]
    for scope in Scope:
        changes = [change for change in plan.changes if change.scope is scope]
        if changes:
            lines.append(f"  {scope}")
            lines += _change_lines(changes, paint)
    return "\n".join(lines) + f"\n{texts}Plan: {counts_text(plan)}.\n"


def _no_changes(plan: Plan, source: str) -> str:
    return "No changes for now.\n" if plan.waiting else f"No changes. netns {plan.netns} matches {source}.\n"


def _change_lines(changes: list[Change], paint: Paint) -> Iterable[str]:
    width = max(len(change.subject) for change in changes)
    for change in changes:
        symbol = SYMBOLS[change.action].rjust(5)
        parts = [change.detail, f"({change.reason})" if change.reason else ""]
        detail = " ".join(part for part in parts if part)
        effect = f"; {change.effect}" if change.effect else ""
        yield f"{paint(symbol, symbol)} {change.subject.ljust(width)}  {detail}{effect}".rstrip()


def counts_text(plan: Plan) -> str:
    return (
        f"{plan.count(Action.CREATE)} to add, {plan.count(Action.UPDATE)} to change, "
        f"{plan.count(Action.REPLACE)} to replace, {plan.count(Action.DELETE)} to remove"
    )


def difference_text(difference: Difference, paint: Paint, *, is_full: bool) -> str:
    text = ""
    changed = any(change.scope is Scope.RULES for change in difference.plan.changes)
    if difference.live_listing != difference.baseline_listing:
        text += unified(difference.baseline_listing, difference.live_listing, "as loaded", "now", paint)
    if is_full and changed:
        text += unified(difference.loaded_documents, difference.wanted_documents, "loaded", "profile", paint)
    elif changed and difference.loaded_documents != difference.wanted_documents:
        text += "--full shows the text of the rules.\n"
    return plan_text(difference.plan, difference.source, paint, text)


def rules_text(plan: Plan, paint: Paint) -> str:
    """What a plan changes in the text of the rules; empty if it loads none."""
    loads = (step for step in plan.steps if isinstance(step, LoadRules))
    return "".join(unified(_text(step.before), _text(step.after), "loaded", "profile", paint) for step in loads)


def _text(rules: Rules | None) -> str:
    return "\n".join(document.text for document in rules.documents) if rules else ""


def unified(before: str, after: str, before_name: str, after_name: str, paint: Paint) -> str:
    """A unified diff of two texts; empty if they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
    return "".join(f"{paint(line, line[:1]) if line[:1] in '+-' else line}\n" for line in lines)


def step_text(outcome: Outcome, paint: Paint, *, with_time: bool) -> str:
    """One line per step, written when it ended; in parentheses on the way back."""
    name = f"({describe(outcome.step)})" if outcome.is_undo else describe(outcome.step)
    result = paint("failed", "error") if outcome.error else paint("ok", "ok")
    time = f" {outcome.seconds * 1000:.0f} ms" if with_time else ""
    return f"{name}  {result}{time}"


def applied_text(report: Report, source: str) -> str:
    plan = report.plan
    if plan.is_empty:
        adopted = "".join(f"Adopted {key}: it is as it should be.\n" for key in plan.adopted)
        return adopted + _no_changes(plan, source)
    counts = (
        f"{plan.count(Action.CREATE)} added, {plan.count(Action.UPDATE)} changed, "
        f"{plan.count(Action.REPLACE)} replaced, {plan.count(Action.DELETE)} removed"
    )
    rule = f"A filter must accept what helpers expect; orch writes no such rule: {RELATED_RULE}\n"
    return f"{rule}Applied: {counts}. Verified.\n"


def teardown_text(report: TeardownReport, *, every_netns: bool) -> str:
    lines = []
    for one in report.reports:
        lines += list(one.plan.kept)
        if one.declined:
            continue
        if one.leftovers:
            lines.append(f"Profile {one.plan.profile} is not wholly removed from netns {one.plan.netns}.")
        elif not one.plan.is_empty:
            lines.append(f"Removed profile {one.plan.profile} from netns {one.plan.netns}.")
        elif one.is_forgotten:
            lines.append(f"Nothing was left of profile {one.plan.profile} in netns {one.plan.netns}; forgotten.")
    if any(one.declined for one in report.reports):
        lines.append("Nothing was changed.")
    elif all(one.plan.is_empty and not one.is_forgotten for one in report.reports):
        lines.append("Nothing to remove.")
    if report.others and not every_netns:
        lines.append("Still applied: " + ", ".join(map(str, report.others)) + " (--all removes everything).")
    return "\n".join(lines) + "\n"


def duration_text(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h`, `12 d`: whole units, rounded down."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def error_text(error: OrchError, paint: Paint) -> str:
    """What, where, what to do, and the errno; every problem of a profile, every refusal of a plan."""
    if isinstance(error, ProfileError):
        return "".join(problem_text(problem, paint) for problem in error.problems)
    if isinstance(error, PlanRefusedError):
        return "".join(_error(r.what, where=r.where, hint=r.hint, cause="", paint=paint) for r in error.refusals)
    text = _error(error.what, where=error.where, hint=error.hint, cause=error.cause, paint=paint)
    if isinstance(error, RollbackError):
        text += "".join(f"  left:  {leftover}\n" for leftover in error.leftovers)
    return text


def problem_text(problem: Problem, paint: Paint) -> str:
    hint = f"\n  hint:  {problem.hint}" if problem.hint else ""
    return f"{problem.place}: {paint('error', 'error')}: {problem.message}{hint}\n"


def _error(what: str, *, where: str, hint: str, cause: str, paint: Paint) -> str:
    lines = [f"{paint('error', 'error')}: {what}"]
    named = (("where:", where), ("hint:", hint), ("cause:", cause))
    lines += [f"  {name.ljust(6)} {text}" for name, text in named if text]
    return "\n".join(lines) + "\n"
