"""Metrics, read back and compared with what `orch status --json` says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import Sample
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.exporter.metrics import COUNTED
from orchestrator.ports import Lifetimes


def samples(text: str) -> Iterator[Sample]:
    return (sample for family in text_string_to_metric_families(text) for sample in family.samples)


def value(text: str, name: str, **labels: str) -> float | None:
    found = [sample.value for sample in samples(text) if sample.name == name and sample.labels == labels]
    assert len(found) <= 1
    return found[0] if found else None


def check_figures(text: str, status: dict[str, Any]) -> None:
    """Every figure that the status has of a profile and its helpers is a metric, and none is a metric without it."""
    for profile in status["profiles"]:
        at = {"profile": profile["profile"], "netns": profile["netns"]}
        assert value(text, "orch_profile_drift", **at) == len(profile["drift"])
        for helper in profile["helpers"]:
            _check_helper(text, helper, {**at, "helper": helper["name"]})


def _check_helper(text: str, helper: dict[str, Any], of: dict[str, str]) -> None:
    def figure(name: str, **more: str) -> float | None:
        return value(text, f"orch_{name}", **of, **more)

    assert figure("helper_info", engine=helper["engine"], queueing=helper["queueing"]) == 1
    assert figure("helper_state", state=helper["state"]) == 1
    assert figure("helper_expectations") == helper["expectations"]
    assert figure("helper_connections") == helper["connections"]
    assert figure("helper_restarts_total") == helper["restarts"]
    for status, count in Counter(helper["registrations"].values()).items():
        assert figure("helper_registrations", status=status) == count
    for queue in helper["queues"]:
        number = str(queue["queue_num"])
        assert figure("queue_waiting", queue=number) == queue["waiting"]
        assert figure("queue_dropped_total", queue=number) == queue["dropped"]
    for name, metric in COUNTED.items():
        counted = helper["counters"] and helper["counters"][name] / (1e9 if name == "busy_ns" else 1)
        assert value(text, f"{metric.name}_total", **of) == counted
    ended = helper["lifetimes"] or dict.fromkeys(asdict(Lifetimes()))
    assert {name: figure(f"helper_expectations_{name}_total") for name in ended} == ended
