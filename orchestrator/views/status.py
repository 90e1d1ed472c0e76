"""`orch status`: a table that answers whether each helper works, and a line for everything that is not as applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.status import HelperState, HelperStatus, HostStatus, ProfileStatus, Waiting
from orchestrator.typed import DEFAULT_STATE, how_to
from orchestrator.views.human import Paint, duration_text

_INDENT = "    "
_GAP = "  "
_NOTHING = "-"
_LAST = "LAST ERROR"
_ERROR_WIDTH = 20  # what a table of limited width leaves of a longer message, at least
_COLOURS = {
    HelperState.RUNNING: "ok",
    HelperState.IN_KERNEL: "ok",
    HelperState.STARTING: "warning",
    HelperState.BACKOFF: "warning",
    HelperState.STOPPING: "warning",
}


@dataclass(frozen=True, slots=True)
class _Column:
    """`keep` says how long a column stays when the terminal is too narrow for all: the smallest goes first."""

    title: str
    value: Callable[[HelperStatus, float], str]
    keep: int
    is_number: bool = True


def text(
    status: HostStatus,
    paint: Paint,
    *,
    now_s: float,
    wanted: str = "",
    width: int | None = None,
    is_verbose: bool = False,
    state_dir: Path = DEFAULT_STATE,
) -> str:
    """The whole status at `now_s` of the wall clock; a table wider than `width` loses columns, and is never wrapped."""
    if not (status.profiles or status.unknown or status.unsettled or status.working):
        return f"Profile {wanted} is not applied.\n" if wanted else "Nothing is applied.\n"
    table = _Table([helper for profile in status.profiles for helper in profile.helpers], now_s, width)
    lines: list[str] = []
    for profile in status.profiles:
        lines += _profile_lines(profile, table, paint, is_verbose=is_verbose, state_dir=state_dir)
    mark = paint("!", "warning")
    lines += [
        f"{mark} {o} has rules or processes, and the ledger does not know it: apply or tear it down"
        for o in status.unknown
    ]
    lines += [f"{mark} {one.sentence}: the next apply or teardown {one.remedy}" for one in status.unsettled]
    lines += [f"{mark} another orch is at work right now"] if status.working else []
    return "\n".join(lines) + "\n"


def _profile_lines(
    profile: ProfileStatus, table: _Table, paint: Paint, *, is_verbose: bool, state_dir: Path
) -> Iterable[str]:
    is_well = all(helper.state.is_well for helper in profile.helpers)
    mark = paint("*", "ok") if is_well and not profile.drift else paint("!", "warning")
    state = "drifted" if profile.drift else "as applied" if is_well else "as applied, but a helper does not work"
    yield f"{mark} {profile.owner} ({profile.backend}, {profile.source}): {state}"
    if profile.helpers:
        yield table.heading()
    for helper in profile.helpers:
        yield table.row(helper, paint)
        yield from (f"{_INDENT}{_INDENT}{line}" for line in _detail_lines(helper, is_verbose=is_verbose))
    if profile.trial:
        yield f"{_INDENT}{paint('trial:', 'warning')} {_trial_text(profile.owner.profile, profile.trial, state_dir)}"
    for line in profile.drift:
        yield f"{_INDENT}{paint('drift:', 'warning')} {line}"
    if profile.mending:
        yield f"{_INDENT}{paint('not mended:', 'error')} {profile.mending}"


def _trial_text(profile: str, trial: Waiting, state_dir: Path) -> str:
    confirm, rollback = (how_to(command, profile, state_dir=state_dir) for command in ("confirm", "rollback"))
    if trial.is_overdue:
        return f"not confirmed in time, and not undone yet: {rollback}"
    left = duration_text(trial.left_s)
    if not trial.is_watched:
        return f"{left} to confirm it, but nobody is there who would undo it then: {rollback}"
    return f"undone in {left}, unless confirmed: {confirm}"


def _detail_lines(helper: HelperStatus, *, is_verbose: bool) -> Iterable[str]:
    """What has no column: always what went wrong in a native helper process, the rest if it was asked for."""
    if is_verbose:
        yield from _more_lines(helper)
    if helper.counters is None:
        return
    seen = helper.counters.counters
    wrong = {
        "parse errors": seen.parse_errors,
        "exceptions": seen.exceptions,
        "overruns": seen.overruns,
        "denied": seen.denied,
    }
    counts = [f"{name} {count}" for name, count in wrong.items() if count]
    if counts:
        yield ", ".join(counts)


def _more_lines(helper: HelperStatus) -> Iterable[str]:
    parts = [f"{key} {state}" for key, state in helper.registrations]
    parts += [f"queueing by {helper.queueing}"] if helper.queueing else []
    parts += [f"queue {queue.queue_num} has no listener" for queue in helper.queues if not queue.is_bound]
    parts.append(f"expectations now {helper.expectations}")
    parts += [f"cancelled {helper.lifetimes.cancelled}"] if helper.lifetimes else []
    seen = helper.counters.counters if helper.counters else None
    if seen and seen.packets:
        parts.append(f"{seen.busy_ns / seen.packets / 1000:.0f} us a packet")
    yield ", ".join(parts)


class _Table:
    """The columns that fit, as wide as the widest of all rows: the tables of all profiles are aligned."""

    def __init__(self, helpers: Sequence[HelperStatus], now_s: float, width: int | None) -> None:
        self._now_s = now_s
        self._columns = list(_COLUMNS)
        self._widths = {c.title: max(len(c.title), *(len(c.value(h, now_s)) for h in helpers), 0) for c in _COLUMNS}
        errors = max((len(_error(helper)) for helper in helpers), default=0)
        self._room: int | None = None
        if width is None:
            return
        wanted = min(errors, _ERROR_WIDTH)
        # Name and state matter more than the room for a message.
        while len(self._columns) > 1 and self._used() + (wanted if len(self._columns) > 2 else 0) > width:
            self._columns.remove(min(self._columns, key=lambda column: column.keep))
        room = max(0, width - self._used())
        self._room = room if errors or room >= len(_LAST) else 0

    def _used(self) -> int:
        return len(_INDENT) + sum(self._widths[column.title] + len(_GAP) for column in self._columns)

    def heading(self) -> str:
        return self._line([self._fit(column, column.title) for column in self._columns], _LAST)

    def row(self, helper: HelperStatus, paint: Paint) -> str:
        cells = {c.title: self._fit(c, c.value(helper, self._now_s)) for c in self._columns}
        if "STATE" in cells:
            cells["STATE"] = paint(cells["STATE"], _COLOURS.get(helper.state, "error"))
        return self._line(list(cells.values()), _error(helper) or _NOTHING)

    def _fit(self, column: _Column, cell: str) -> str:
        width = self._widths[column.title]
        return cell.rjust(width) if column.is_number else cell.ljust(width)

    def _line(self, cells: list[str], last: str) -> str:
        return _INDENT + _GAP.join((*cells, self._cut(last))).rstrip()

    def _cut(self, message: str) -> str:
        if self._room is None or len(message) <= self._room:
            return message
        return message[: self._room - 3] + "..." if self._room > 3 else ""


def _error(helper: HelperStatus) -> str:
    if helper.state is HelperState.HUNG:
        return f"packets wait, and it has done nothing for {duration_text(helper.hung_s)}"
    return helper.last_error


def _since(helper: HelperStatus, now_s: float) -> str:
    if helper.pid:
        return duration_text(helper.since_s)
    return duration_text(max(0.0, now_s - helper.state_since)) if helper.state_since else _NOTHING


def _count(number: int | None) -> str:
    return _NOTHING if number is None else str(number)


def _made(helper: HelperStatus) -> str:
    if helper.lifetimes:
        return str(helper.lifetimes.made)
    return _count(helper.counters.counters.expectations if helper.counters else None)


def _queue_sum(helper: HelperStatus, count: Callable[[HelperStatus], int]) -> str:
    return str(count(helper)) if helper.queues else _NOTHING


_COLUMNS = (
    _Column("HELPER", lambda h, _: h.name, 100, is_number=False),
    _Column("ENGINE", lambda h, _: h.engine, 20, is_number=False),
    _Column("STATE", lambda h, _: h.state, 99, is_number=False),
    _Column("PID", lambda h, _: str(h.pid or _NOTHING), 80),
    _Column("SINCE", _since, 90),
    _Column("RESTARTS", lambda h, _: _count(h.restarts), 70),
    _Column("QUEUE", lambda h, _: ",".join(str(q.queue_num) for q in h.queues) or _NOTHING, 10),
    _Column("WAITING", lambda h, _: _queue_sum(h, lambda one: sum(q.waiting for q in one.queues)), 60),
    _Column("DROPPED", lambda h, _: _queue_sum(h, lambda one: sum(q.dropped for q in one.queues)), 40),
    _Column("PACKETS", lambda h, _: _count(h.counters.counters.packets if h.counters else None), 30),
    _Column("CONNS", lambda h, _: _count(h.connections), 50),
    _Column("MADE", lambda h, _: _made(h), 45),
    _Column("USED", lambda h, _: _count(h.lifetimes.used if h.lifetimes else None), 55),
    _Column("EXPIRED", lambda h, _: _count(h.lifetimes.expired if h.lifetimes else None), 35),
    _Column("REFUSED", lambda h, _: _count(h.counters.counters.refused if h.counters else None), 33),
)
