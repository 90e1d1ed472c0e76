"""With ORCH_REQUIRE=1, as `make test` sets it, a test that skips itself is a failure: nothing goes untested unseen.

Below the results is what tests have to report (tests/reports.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest

from tests.reports import REPORTS


def pytest_configure() -> None:
    """In a background job of a shell SIGINT is ignored, and so it would be in every program that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("ORCH_REQUIRE"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped itself, and ORCH_REQUIRE is set: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, lines in REPORTS.items():
        if lines:
            terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
