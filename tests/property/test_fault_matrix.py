"""The matrix of faults (tests/faults.py), on the fake: a part of it always, all of it in `make test`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import Scenario, faults_of, prepare, scenarios, try_all
from tests.reports import REPORTS

SCENARIOS = list(scenarios())
_tried: list[int] = []


@pytest.fixture(scope="module", autouse=True)
def count() -> Iterator[None]:
    yield
    REPORTS["fault matrix"] = [f"{sum(_tried)} points tried"]


@pytest.mark.parametrize("scenario", SCENARIOS[::9], ids=lambda scenario: scenario.name)
def test_some_points(scenario: Scenario) -> None:
    count, failures = try_all([scenario], every=10)
    _tried.append(count)
    assert not failures


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_point(scenario: Scenario) -> None:
    count, failures = try_all([scenario])
    _tried.append(count)
    assert not failures


def test_the_matrix_has_every_call_that_changes_something() -> None:
    events = {event for scenario in SCENARIOS for event in prepare(scenario).events}
    assert events == {
        "wait for", "load rules of another family", "flush rules of another family", "remove rules of another family",
        "put back rules",
        "commit", "load module", "register helper", "update helper", "unregister helper", "start", "stop", "watch",
        "hand over", "serve queues", "load rules", "flush rules", "remove rules", "reconcile", "clean up",
    }  # fmt: skip
    assert all(any(faults_of(event)) for event in events)
