"""Metrics of a real FTP session that two profiles in two namespaces help: they are what `orch status --json` says."""

from __future__ import annotations

import contextlib
import ftplib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.topology import CLIENT, CONTENT, ROUTER, ROUTER_FILTER, SERVER_IP, load_filter
from orchestrator.kernel.netns import entered, find
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch, cli, cli_here
from tests.metrics import check_figures, value
from tests.waiting import until

PROFILES = {
    ROUTER: "profile: edge\nhelpers:\n  ftp: {attach: [{path: incoming}]}\n",
    CLIENT: "profile: host\nhelpers:\n  ftp: {name: ftp-host, attach: [{path: outgoing}]}\n",
}
SESSIONS = (("edge", ROUTER), ("host", CLIENT))


@contextlib.contextmanager
def ftp_session() -> Iterator[None]:
    """A connection that fetched the file, and stays open."""
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        with entered(find(CLIENT)):
            client = stack.enter_context(ftplib.FTP(SERVER_IP, timeout=30))
            client.login()
            client.retrlines("RETR file", lines.append)
        assert lines == CONTENT.splitlines()
        yield


def status(state: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cli_here("status", "--json", state=state).stdout)["status"]
    return found


def used(orch: Harness, profile: str, netns: str) -> int:
    """What a supervisor wrote down; it does so once a second."""
    return sum(one.used for one in orch.system.processes.lifetimes(profile, find(netns)).values())


def test_the_figures_of_two_namespaces_are_those_of_status(routed: None, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with clean_orch(state) as orch:
        load_filter(ROUTER, ROUTER_FILTER)
        for netns, text in PROFILES.items():
            file = tmp_path / f"{netns}.yaml"
            file.write_text(text)
            done = cli_here("apply", str(file), "--netns", netns, state=state)
            assert done.returncode == 0, done.stderr
        with ftp_session():
            until(lambda: all(used(orch, *at) == 1 for at in SESSIONS), "the expectation counted as used")
            done = cli("exporter", "--once", state=state)
            assert (done.returncode, done.stderr) == (0, "")
            seen = status(state)
        check_figures(done.stdout, seen)
        for profile, netns in SESSIONS:
            check_session(done.stdout, profile=profile, netns=netns, helper="ftp")


def check_session(text: str, **of: str) -> None:
    """One session, one file: what came of it."""
    figures = ("packets_total", "busy_seconds_total")
    assert all(value(text, f"orch_helper_{name}", **of) for name in figures)
    once = ("up", "connections", "expectations_requested_total", "expectations_made_total", "expectations_used_total")
    assert {name: value(text, f"orch_helper_{name}", **of) for name in once} == dict.fromkeys(once, 1)
    assert value(text, "orch_helper_state", **of, state="running") == 1
