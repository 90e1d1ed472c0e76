"""Probes and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TypeAlias

from orchestrator.doctor.facts import Facts, Place, UnseenError


class Verdict(StrEnum):
    PROBLEM = "problem"
    WARNING = "warning"
    SKIPPED = "skipped"
    OK = "ok"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe found, in one line, and what to do about it in another; `where` is empty for the whole host."""

    verdict: Verdict
    cause: str
    cure: str = ""
    probe: str = ""
    where: str = ""


def problem(cause: str, cure: str) -> Finding:
    return Finding(Verdict.PROBLEM, cause, cure)


def warning(cause: str, cure: str) -> Finding:
    return Finding(Verdict.WARNING, cause, cure)


def note(cause: str) -> Finding:
    """Nothing is wrong, and there is something to tell."""
    return Finding(Verdict.OK, cause)


Findings: TypeAlias = Iterable[Finding]


@dataclass(frozen=True, slots=True)
class HostProbe:
    """One question about the host; `ok` is what is said if nothing was found."""

    name: str
    ok: str
    look: Callable[[Facts], Findings]


@dataclass(frozen=True, slots=True)
class PlaceProbe:
    """One question about a network namespace."""

    name: str
    ok: str
    look: Callable[[Facts, Place], Findings]


def examine(facts: Facts, host_probes: Iterable[HostProbe], place_probes: Iterable[PlaceProbe]) -> tuple[Finding, ...]:
    """Every probe once, those of namespaces once in each; in the order of the lists."""
    asked: list[tuple[HostProbe | PlaceProbe, str, Callable[[], Findings]]]
    asked = [(probe, "", partial(probe.look, facts)) for probe in host_probes]
    asked += [
        (probe, str(place.netns), partial(probe.look, facts, place)) for place in facts.places for probe in place_probes
    ]
    return tuple(finding for probe, where, look in asked for finding in _named(probe, where, look))


def _named(probe: HostProbe | PlaceProbe, where: str, look: Callable[[], Findings]) -> Iterator[Finding]:
    try:
        found = tuple(look()) or (note(probe.ok),)
    except UnseenError as error:
        found = (Finding(Verdict.SKIPPED, str(error)),)
    yield from (replace(finding, probe=probe.name, where=finding.where or where) for finding in found)
