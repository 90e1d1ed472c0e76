"""The names, texts and labels of all metrics: what was seen, as Prometheus reads it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator import __version__
from orchestrator.engine.counters import NAMES
from orchestrator.errors import OrchError
from orchestrator.exporter.scrape import HostSeen, ProfileSeen
from orchestrator.exporter.survey import Survey
from orchestrator.model import Status
from orchestrator.status import HelperState, HelperStatus

log = logging.getLogger(__name__)

_Labels = tuple[str, ...]

_PROFILE = ("profile", "netns")
_HELPER = (*_PROFILE, "helper")
_REGISTERED = (*Status, "missing")


@dataclass(frozen=True, slots=True)
class _Metric:
    """One figure of every helper that has it; `value` is None where there is none."""

    kind: type[CounterMetricFamily | GaugeMetricFamily]
    name: str
    text: str
    value: Callable[[HelperStatus], float | None]


def _counted(field: str, name: str, text: str, *, per_unit: float = 1) -> _Metric:
    """What a native helper process counts since it started."""

    def value(helper: HelperStatus) -> float | None:
        page = helper.counters
        count: int | None = getattr(page.counters, field) if page else None
        return None if count is None else count / per_unit

    return _Metric(CounterMetricFamily, f"orch_helper_{name}", text, value)


def _ended(field: str, text: str) -> _Metric:
    """What a supervisor counts since it started."""

    def value(helper: HelperStatus) -> float | None:
        count: int | None = getattr(helper.lifetimes, field) if helper.lifetimes else None
        return count

    return _Metric(CounterMetricFamily, f"orch_helper_expectations_{field}", text, value)


def _has_process(helper: HelperStatus) -> bool:
    """It should have one: the kernel does not inspect its packets."""
    return helper.state is not HelperState.IN_KERNEL


def _is_up(helper: HelperStatus) -> bool | None:
    if not _has_process(helper):
        return None
    return bool(helper.pid) and all(queue.is_bound for queue in helper.queues)


COUNTED: Mapping[str, _Metric] = {
    "packets": _counted("packets", "packets", "Packets that the process inspected"),
    "batches": _counted("batches", "batches", "Answers of the process to the kernel, each for one or more packets"),
    "expectations": _counted("expectations", "expectations_requested", "Expectations that the process asked for"),
    "refused": _counted("refused", "expectations_refused", "Expectations that the guard or the helper refused"),
    "rewritten": _counted("rewritten", "payloads_rewritten", "Payloads that the process changed for NAT"),
    "parse_errors": _counted("parse_errors", "parse_errors", "Messages of the kernel that could not be read"),
    "exceptions": _counted("exceptions", "exceptions", "Exceptions that the code of the helper raised"),
    "overruns": _counted("overruns", "overruns", "Packets that the socket buffer of the process had no room for"),
    "truncated": _counted("truncated", "truncated_packets", "Packets longer than the buffer of the process"),
    "stale": _counted("stale", "stale_verdicts", "Verdicts for packets that were gone"),
    "kernel_errors": _counted("kernel_errors", "kernel_errors", "Other requests that the kernel refused"),
    "denied": _counted("denied", "denied_calls", "What the code of the helper tried to do and may not"),
    "busy_ns": _counted("busy_ns", "busy_seconds", "CPU time that the process spent on packets", per_unit=1e9),
}
"""The metric of each field of a helper process' page of counters."""

_HELPERS = (
    _Metric(GaugeMetricFamily, "orch_helper_up", "1 if its process runs and every queue is bound", _is_up),
    _Metric(
        GaugeMetricFamily,
        "orch_helper_hung",
        "1 if packets wait and its process does not touch them",
        lambda helper: helper.hung_s > 0 if _has_process(helper) else None,
    ),
    _Metric(
        CounterMetricFamily,
        "orch_helper_restarts",
        "Restarts of its process that nobody asked for",
        lambda helper: helper.restarts,
    ),
    _Metric(
        GaugeMetricFamily,
        "orch_helper_expectations",
        "Expectations that exist now",
        lambda helper: helper.expectations,
    ),
    _ended("made", "Expectations that the kernel accepted"),
    _ended("used", "Expectations that a connection opened"),
    _ended("expired", "Expectations that no connection opened in time"),
    _ended("cancelled", "Expectations that went away with their master connection"),
    *(COUNTED[name] for name in NAMES),
)


class OrchCollector(Collector):
    """Looks whenever it is asked; `survey` gives the last one that was taken, None before the first."""

    def __init__(self, look: Callable[[], HostSeen], survey: Callable[[], Survey | None]) -> None:
        self._look = look
        self._survey = survey

    def collect(self) -> Iterator[Metric]:
        started = time.perf_counter()
        yield InfoMetricFamily("orch_build", "Version of orch", value={"version": __version__})
        try:
            seen = self._look()
        except OrchError as error:
            log.error("%s", error)
            yield _up(is_up=False)
            return
        yield _up(is_up=True)
        yield GaugeMetricFamily(
            "orch_scrape_duration_seconds", "How long this look took", value=time.perf_counter() - started
        )
        yield from families(seen, self._survey(), now_s=time.time())


def _up(*, is_up: bool) -> Metric:
    return GaugeMetricFamily("orch_up", "1 if the host could be looked at", value=is_up)


def families(seen: HostSeen, survey: Survey | None, *, now_s: float) -> Iterator[Metric]:
    """All metrics of what was seen at a time of the wall clock."""
    profiles = _told_apart(seen.profiles)
    helpers = [((*at, helper.name), helper) for at, profile in profiles.items() for helper in profile.helpers or ()]
    yield from _of_host(seen)
    yield from _of_profiles(profiles, now_s)
    yield from _of_helpers(helpers, now_s)
    yield from _of_queues(helpers)
    if survey is not None:
        yield from _of_survey(survey)


def _told_apart(profiles: Iterable[ProfileSeen]) -> dict[_Labels, ProfileSeen]:
    """Profiles by their labels; of two in namespaces of one name, one of which is gone, that which is there."""
    result: dict[_Labels, ProfileSeen] = {}
    for profile in profiles:
        at = (profile.applied.owner.profile, profile.applied.owner.netns.label)
        if at not in result or result[at].helpers is None:
            result[at] = profile
    return result


def _of_host(seen: HostSeen) -> Iterator[Metric]:
    registered = GaugeMetricFamily("orch_registrations", "Helpers registered on this host", labels=("status",))
    count = Counter(registration.status for registration in seen.registrations)
    for status in Status:
        registered.add_metric((status,), count[status])
    yield registered
    yield GaugeMetricFamily(
        "orch_transactions_unsettled", "Transactions that a killed orch left unfinished", value=seen.unsettled
    )


def _of_profiles(profiles: Mapping[_Labels, ProfileSeen], now_s: float) -> Iterator[Metric]:
    info = InfoMetricFamily("orch_profile", "Where a profile came from, and how its rules are written", labels=_PROFILE)
    up = GaugeMetricFamily("orch_profile_up", "1 if its namespace can be looked into", labels=_PROFILE)
    applied = GaugeMetricFamily("orch_profile_applied_timestamp_seconds", "When it was applied", labels=_PROFILE)
    deadline = GaugeMetricFamily(
        "orch_profile_confirm_deadline_timestamp_seconds",
        "When the apply is undone that nobody has confirmed yet",
        labels=_PROFILE,
    )
    held = GaugeMetricFamily(
        "orch_profile_drift_held", "Things that were mended too often, and are left alone for a while", labels=_PROFILE
    )
    for at, profile in profiles.items():
        info.add_metric(at, {"backend": profile.applied.target.rules.backend, "source": profile.applied.source})
        up.add_metric(at, profile.helpers is not None)
        applied.add_metric(at, profile.applied.applied_at)
        held.add_metric(at, profile.held)
        if profile.undone_in_s is not None:
            deadline.add_metric(at, round(now_s + profile.undone_in_s))
    return iter((info, up, applied, deadline, held))


def _of_helpers(helpers: list[tuple[_Labels, HelperStatus]], now_s: float) -> Iterator[Metric]:
    info = InfoMetricFamily("orch_helper", "Who inspects the packets of a helper, and who queues them", labels=_HELPER)
    state = GaugeMetricFamily("orch_helper_state", "1, its process is in this state", labels=(*_HELPER, "state"))
    started = GaugeMetricFamily("orch_helper_start_time_seconds", "When its process started", labels=_HELPER)
    registered = GaugeMetricFamily(
        "orch_helper_registrations", "Registrations that its rules attach", labels=(*_HELPER, "status")
    )
    for at, helper in helpers:
        info.add_metric(at, {"engine": helper.engine, "queueing": helper.queueing})
        state.add_metric((*at, helper.state), 1)
        if helper.pid:
            started.add_metric(at, round(now_s - helper.since_s))
        count = Counter(word for _, word in helper.registrations)
        for word in _REGISTERED if helper.registrations else ():
            registered.add_metric((*at, word), count[word])
    yield from (info, state, started, registered)
    for metric in _HELPERS:
        yield _family(metric, helpers)


def _family(metric: _Metric, helpers: list[tuple[_Labels, HelperStatus]]) -> Metric:
    family = metric.kind(metric.name, metric.text, labels=_HELPER)
    for at, helper in helpers:
        value = metric.value(helper)
        if value is not None:
            family.add_metric(at, value)
    return family


def _of_queues(helpers: list[tuple[_Labels, HelperStatus]]) -> Iterator[Metric]:
    labels = (*_HELPER, "queue")
    bound = GaugeMetricFamily("orch_queue_bound", "1 if a process listens on it", labels=labels)
    waiting = GaugeMetricFamily("orch_queue_waiting", "Packets that wait for a verdict", labels=labels)
    dropped = CounterMetricFamily(
        "orch_queue_dropped", "Packets that the queue or its socket had no room for, since it was bound", labels=labels
    )
    for at, helper in helpers:
        for queue in helper.queues:
            each = (*at, str(queue.queue_num))
            bound.add_metric(each, queue.is_bound)
            if queue.is_bound:
                waiting.add_metric(each, queue.waiting)
                dropped.add_metric(each, queue.dropped)
    return iter((bound, waiting, dropped))


def _of_survey(survey: Survey) -> Iterator[Metric]:
    drift = GaugeMetricFamily("orch_profile_drift", "Differences from what was applied", labels=_PROFILE)
    for at, lines in survey.drift.items():
        drift.add_metric(at, lines)
    connections = GaugeMetricFamily("orch_helper_connections", "Connections that have the helper", labels=_HELPER)
    for of, count in survey.connections.items():
        connections.add_metric(of, count)
    unknown = "Profiles that the ledger does not know, told by their rules or processes"
    yield from (drift, connections, GaugeMetricFamily("orch_profiles_unknown", unknown, value=survey.unknown))
    yield GaugeMetricFamily("orch_survey_timestamp_seconds", "When drift was looked for last", value=survey.taken_at)
    yield GaugeMetricFamily("orch_survey_duration_seconds", "How long that took", value=survey.took_s)
