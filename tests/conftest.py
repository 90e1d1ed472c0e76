"""With ORCH_REQUIRE=1, as `make test` sets it, a test that skips itself is a failure: nothing goes untested unseen."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("ORCH_REQUIRE"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped itself, and ORCH_REQUIRE is set: {report.longrepr}"
    return report
