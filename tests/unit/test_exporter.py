"""The metrics: they agree with `orch status`, Prometheus can read them, and alerts and dashboard know only them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from lab.layout import PROMTOOL
from orchestrator import cli
from orchestrator.commands import exporter as command
from orchestrator.engine.counters import NAMES, Counters, Snapshot, State
from orchestrator.errors import OrchError, UsageError
from orchestrator.exporter import survey
from orchestrator.exporter.metrics import COUNTED, OrchCollector, families
from orchestrator.exporter.scrape import HostSeen, ProfileSeen, Scraper
from orchestrator.fake import FakeKernel
from orchestrator.kernel.netns import scratch
from orchestrator.model import L4Proto, Netns
from orchestrator.ports import Lifetimes, ProcessState, Supervised
from orchestrator.reports import Trial
from orchestrator.session import ExitCode
from orchestrator.state import Held, Mending, Owner
from orchestrator.views import machine
from tests.hosts import Harness, both
from tests.metrics import check_figures, samples, value
from tests.waiting import until

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/exporter/metrics.prom"
PROMETHEUS = ROOT / "contrib/prometheus"
DASHBOARD = ROOT / "contrib/grafana/orch.json"

EDGE = "profile: edge\nhelpers:\n  ftp: {}\n  tftp: {queueing: registration}\n  sip: {engine: kernel}\n"
RPC = "profile: rpc\nhelpers:\n  rpc: {engine: conntrackd}\n"
COUNTS = Counters(**{name: number for number, name in enumerate(NAMES, start=1)})
NOW = 1_800_000_000.0
_NAME = re.compile(r"\borch_[a-z_]+\b")

needs_promtool = pytest.mark.skipif(not PROMTOOL.exists(), reason="python3 -m lab.fetch promtool")
needs_root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")


@pytest.fixture
def kernel() -> FakeKernel:
    """Two profiles in two namespaces; in one of them all is well, in the other it is not."""
    sip = (("sip", L4Proto.TCP), ("sip", L4Proto.UDP))
    return FakeKernel(modules_available={"nf_conntrack_sip": sip, "nf_nat_sip": ()})


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    orch = Harness(kernel.system(), tmp_path / "state")
    blue, red = kernel.add_netns("blue"), kernel.add_netns("red")
    orch.apply(EDGE, "blue")
    orch.apply(RPC, "red")
    kernel.counters = {"ftp": Snapshot(1, State.READY, 1, 0, COUNTS), "tftp": Snapshot(1, State.READY, 1, 0, COUNTS)}
    kernel.supervised = {
        ("edge", blue.identity): (
            Supervised("ftp", ProcessState.RUNNING, 100, 2, NOW - 60, "killed by SIGKILL"),
            Supervised("tftp", ProcessState.BACKOFF, 0, 7, NOW - 1, "exited with 1"),
        )
    }
    kernel.lifetimes = {("edge", blue.identity): {"ftp-us": Lifetimes(made=9, used=5, expired=3, cancelled=1)}}
    kernel.at(blue).expectations = {"ftp-us": 2}
    kernel.at(blue).connections = {"ftp-us": 4}
    queue = next(iter(kernel.at(red).queues))
    kernel.at(red).queues[queue] = replace(kernel.at(red).queues[queue], waiting=3, queue_dropped=5, user_dropped=6)
    kernel.now = 60.0
    return orch


def scraper(orch: Harness) -> Scraper:
    return Scraper(orch.system, orch.state_dir, "boot-1")


def surveyed(orch: Harness) -> survey.Survey:
    return survey.read(machine.status_value(orch.status()), NOW - 30, 1.5)


def text_of(orch: Harness) -> str:
    registry = CollectorRegistry()
    registry.register(OrchCollector(scraper(orch).look, lambda: surveyed(orch)))
    return generate_latest(registry).decode()


def names_of(text: str) -> set[str]:
    """Names of all metrics, without those that tell of the exporter's own process."""
    return set(re.findall(r"^# TYPE (orch_\w+)", text, re.M))


def test_the_text_is_as_it_was(orch: Harness) -> None:
    seen = scraper(orch).look()
    edge, rpc = (replace(p, applied=replace(p.applied, applied_at=NOW - 3600)) for p in seen.profiles)
    profiles = (replace(edge, undone_in_s=45.0, held=1), rpc)

    class Then:
        def collect(self) -> Iterator[Any]:
            return families(replace(seen, profiles=profiles), surveyed(orch), now_s=NOW)

    registry = CollectorRegistry()
    registry.register(Then())
    text = generate_latest(registry).decode()
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_the_figures_are_those_of_status(orch: Harness) -> None:
    status = machine.status_value(orch.status())
    assert [len(profile["helpers"]) for profile in status["profiles"]] == [3, 1]
    check_figures(text_of(orch), status)


def test_every_counter_of_a_process_has_a_metric() -> None:
    assert set(COUNTED) == set(NAMES)


def test_a_helper_is_up_while_its_process_runs_and_listens(orch: Harness, kernel: FakeKernel) -> None:
    def up(netns: str, helper: str) -> float | None:
        profile = {"blue": "edge", "red": "rpc"}[netns]
        return value(text_of(orch), "orch_helper_up", profile=profile, netns=netns, helper=helper)

    assert (up("blue", "ftp"), up("red", "rpc"), up("blue", "sip")) == (1, 1, None)
    (conntrackd,) = [pid for pid, (seen, _) in kernel.running_processes.items() if seen.profile == "rpc"]
    kernel.kill(conntrackd)
    assert (up("blue", "ftp"), up("red", "rpc")) == (1, 0)
    queues = kernel.namespaces["blue"].queues
    queues.pop(min(queues))
    assert 0 in (up("blue", "ftp"), up("blue", "tftp"))


def test_what_is_fought_over_and_what_has_to_be_confirmed_are_counted(orch: Harness, kernel: FakeKernel) -> None:
    blue = {"profile": "edge", "netns": "blue"}
    held, deadline = "orch_profile_drift_held", "orch_profile_confirm_deadline_timestamp_seconds"
    assert (value(text_of(orch), held, **blue), value(text_of(orch), deadline, **blue)) == (0, None)
    app = orch.app("blue")
    (owner,) = (one.owner for one in app.applied())
    with app.settled("test") as ledger:
        ledger.remember_mending(owner, Mending(held=(Held("a", kernel.now + 9, "why"), Held("b", kernel.now, "why"))))
    assert value(text_of(orch), held, **blue) == 1
    desired, target = both(EDGE.replace("tftp: {queueing: registration}", "tftp: {}"))
    app.apply(desired, target, ask=False, trial=Trial(60.0, lambda: None))
    (seen,) = (profile for profile in scraper(orch).look().profiles if profile.applied.owner == owner)
    assert seen.undone_in_s == pytest.approx(60.0, abs=1)
    told = value(text_of(orch), deadline, **blue)
    assert told is not None
    assert told == pytest.approx(time.time() + 60, abs=30)
    assert value(text_of(orch), held, **blue) == 0


def test_a_namespace_that_is_gone_takes_nothing_with_it(orch: Harness, kernel: FakeKernel) -> None:
    before = text_of(orch)
    del kernel.namespaces["red"]
    kernel.running_processes = {p: at for p, at in kernel.running_processes.items() if at[0].profile != "rpc"}
    text = text_of(orch)
    assert value(text, "orch_profile_up", profile="rpc", netns="red") == 0
    kept = [{str(s) for s in samples(each) if s.labels.get("netns") == "blue"} for each in (before, text)]
    assert kept[0] == kept[1]


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["blue", "red"]), st.booleans()), max_size=6))
def test_no_two_samples_have_the_same_labels(profiles: list[tuple[str, str, bool]]) -> None:
    """Prometheus refuses a whole scrape for one sample that is there twice: namespaces may share a name."""
    one = a_profile()
    seen = tuple(
        ProfileSeen(replace(one.applied, owner=Owner(name, Netns(label, "", str(number)))), one.helpers if up else None)
        for number, (name, label, up) in enumerate(profiles)
    )
    found = [s for family in families(HostSeen(seen, (), 0), None, now_s=NOW) for s in family.samples]
    assert max(Counter((s.name, *sorted(s.labels.items())) for s in found).values()) == 1
    ups = {(s.labels["profile"], s.labels["netns"]): s.value for s in found if s.name == "orch_profile_up"}
    assert ups == {(n, at): any(up for *o, up in profiles if o == [n, at]) for n, at, _ in profiles}


@cache
def a_profile() -> ProfileSeen:
    with tempfile.TemporaryDirectory() as directory:
        orch = Harness(FakeKernel().system(), Path(directory))
        orch.apply(RPC)
        (seen,) = scraper(orch).look().profiles
        return seen


def test_a_host_that_cannot_be_looked_at_is_not_up() -> None:
    def refused() -> HostSeen:
        raise OrchError("not root")

    registry = CollectorRegistry()
    registry.register(OrchCollector(refused, lambda: None))
    text = generate_latest(registry).decode()
    assert value(text, "orch_up") == 0
    assert names_of(text) == {"orch_up", "orch_build_info"}


# -- what is shipped for Prometheus and Grafana, and what is written about it ------------------------------------------


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Those that ask something; rows do not."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def questions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_alerts_and_dashboard_know_only_metrics_that_exist() -> None:
    there = {sample.name for sample in samples(GOLDEN.read_text())} | {"orch_up", "orch_scrape_duration_seconds"}
    expressions = [rule["expr"] for rule in alerts()] + questions()
    assert {word for each in expressions for word in _NAME.findall(each)} <= there
    assert all(map(_NAME.search, expressions))


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    fired = {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")}
    assert {rule["alert"] for rule in alerts()} == fired
    assert all(set(rule["annotations"]) == {"summary", "description"} for rule in alerts())


def test_the_dashboard_asks_the_data_source_that_is_chosen() -> None:
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}
    assert {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]} == {"${datasource}"}


def test_no_panel_lies_on_another() -> None:
    cells = Counter(
        (x, y)
        for at in (panel["gridPos"] for panel in panels())
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


def test_every_metric_is_in_the_documentation() -> None:
    told = set(re.findall(r"^\| `(orch_\w+)", (ROOT / "docs/monitoring.md").read_text(), re.M))
    assert told == names_of(GOLDEN.read_text()) | {"orch_up", "orch_build_info", "orch_scrape_duration_seconds"}


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_metrics(orch: Harness) -> None:
    promtool("check", "metrics", text=text_of(orch))


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_alerts() -> None:
    promtool("check", "rules", "alerts.yaml")
    promtool("test", "rules", "alerts_test.yaml")


@needs_promtool
def test_promtool_understands_every_question_of_the_dashboard(tmp_path: Path) -> None:
    file = tmp_path / "dashboard.yaml"
    asked = [expression.replace("$__rate_interval", "5m") for expression in questions()]
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(asked)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))


def promtool(*arguments: str, text: str = "") -> None:
    done = subprocess.run([PROMTOOL, *arguments], input=text, capture_output=True, text=True, cwd=PROMETHEUS)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:10932", ("127.0.0.1", 10932)),
        ("[::1]:9100", ("::1", 9100)),
        ("localhost:0", ("localhost", 0)),
        (":9100", ("::", 9100)),
    ],
)
def test_where_it_listens(text: str, listen: tuple[str, int]) -> None:
    assert command.parse_listen(text) == listen


@pytest.mark.parametrize("text", ["", "9100", "localhost", ":65536", ":-1", ":9e3", "::1:", "[::1]"])
def test_what_is_no_place_to_listen(text: str) -> None:
    with pytest.raises(UsageError, match="--listen takes"):
        command.parse_listen(text)


def test_a_file_or_standard_output_but_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["exporter", "--once", "--textfile", "x"]) == ExitCode.USAGE
    assert "exclude" in capsys.readouterr().err


def orch_exporter(*arguments: str, state: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "orchestrator", "exporter", "--state-dir", str(state), *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_root
def test_the_text_file_is_replaced_at_once(tmp_path: Path) -> None:
    file = tmp_path / "orch.prom"
    file.write_text("old")
    before = file.stat().st_ino
    done = orch_exporter("--textfile", str(file), state=tmp_path / "state")
    assert done.communicate() == ("", "")
    assert done.returncode == 0
    assert file.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["orch.prom"]
    text = file.read_text()
    assert value(text, "orch_up") == 1
    assert value(text, "orch_survey_timestamp_seconds")
    assert not re.search("^process_", text, re.M), "node_exporter has those already"


@pytest.mark.slow
@needs_root
def test_it_serves_until_a_signal_ends_it(tmp_path: Path) -> None:
    with scratch(), contextlib.ExitStack() as stack:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        process = stack.enter_context(orch_exporter("--listen", "[::1]:0", state=tmp_path / "state"))
        stack.callback(process.kill)
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        text = fetch(url)
        assert value(text, "orch_up") == 1
        assert re.search("^process_resident_memory_bytes ", text, re.M)
        until(lambda: value(fetch(url), "orch_survey_timestamp_seconds") is not None, "it has surveyed", within_s=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.slow
def test_what_cannot_be_written_or_served_is_named_as_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "none" / "orch.prom"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {
            f"--textfile {file}": ("cannot write the metrics: No such file or directory", str(file)),
            f"--listen 127.0.0.1:{port}": ("cannot serve metrics: Address already in use", f"127.0.0.1:{port}"),
            "--listen [2001:db8::1]:9": ("cannot serve metrics: Cannot assign requested address", "[2001:db8::1]:9"),
        }
        for arguments, (what, where) in wrong.items():
            process = orch_exporter(*arguments.split(), state=tmp_path / "state")
            assert process.communicate()[1].splitlines()[:2] == [f"error: {what}", f"  where: {where}"]
            assert process.returncode == 1


def fetch(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return str(answer.read().decode())
