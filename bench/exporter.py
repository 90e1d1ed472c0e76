"""A scrape of `orch exporter`, on this host: processes, queues, namespaces and ledger are there, and it goes over HTTP.

python3 -m bench.exporter, as root. All of it lives in namespaces that are made for it and removed again. The processes
are stand-ins that hold the queues, and the bench writes their pages of counters. Where this kernel has no registry of
user-space helpers, its dump is a recorded one. The scrapes ask as Prometheus does. The figures go to standard output
and to .cache/bench/exporter.txt; CPU is that of the exporter and of who asks it, so it is no less than the exporter's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from bench import standin
from bench.control import RESULTS
from orchestrator import profile, render
from orchestrator.app import boot_id, kernel_system
from orchestrator.engine.counters import Counters, Page, State
from orchestrator.exporter.metrics import OrchCollector
from orchestrator.exporter.scrape import Scraper
from orchestrator.exporter.server import serving
from orchestrator.journal import Ledger
from orchestrator.kernel import cthelper_codec as codec
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.netns import find, scratch
from orchestrator.launches import launches
from orchestrator.model import Desired, Listing, Netns, Registration, Target
from orchestrator.ports import Launch, System
from orchestrator.state import Applied, HelperSummary, Owner
from orchestrator.supervise.describe import describe

HELPERS_EACH = 5
_FIRST_PORT = 2000
_AS_PROMETHEUS = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}


@dataclass(frozen=True, slots=True)
class Order:
    """How many profiles of five helpers, in how many namespaces, and how many scrapes of them."""

    profiles: int
    namespaces: int
    scrapes: int


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one took, in seconds, and what it said."""

    wall_s: float
    cpu_s: float
    look_s: float
    text: str


class RecordedRegistry(KernelRegistry):
    """The registry as a kernel would dump it."""

    def __init__(self, registrations: list[Registration]) -> None:
        self._messages = [codec.encode_create(registration) for registration in registrations]

    def dump(self) -> tuple[Registration, ...]:
        found = map(codec.decode, self._messages)
        return tuple(sorted((entry for entry in found if isinstance(entry, Registration)), key=lambda r: r.key))


def profile_of(number: int) -> tuple[Desired, Target]:
    """Five FTP helpers of their own names and ports."""
    first = number * HELPERS_EACH
    helpers = (
        f"  ftp{each}: {{use: ftp, name: ftp{each}, attach: [{{path: incoming, ports: {_FIRST_PORT + each}}}]}}\n"
        for each in range(first, first + HELPERS_EACH)
    )
    desired = profile.load(f"profile: bench{number}\nhelpers:\n{''.join(helpers)}", "bench.yaml", describe)
    return desired, render.target(desired)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Netns]]:
    """Named namespaces for as long as the block runs."""
    names = [f"orch-bench{number}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        yield [find(name) for name in names]


@contextlib.contextmanager
def applied(order: Order, state_dir: Path) -> Iterator[System]:
    """A system on which all of it runs, as far as a scrape can see."""
    state_dir.mkdir()
    system = kernel_system(state_dir)
    ledger = Ledger.open(state_dir, boot_id=boot_id(), create=True)
    registrations: list[Registration] = []
    pages: list[Page] = []
    with namespaces(order.namespaces) as spaces, contextlib.ExitStack() as stack:
        stack.callback(stop_all, system)
        for number in range(order.profiles):
            desired, target = profile_of(number)
            netns = spaces[number % len(spaces)]
            for launch in launches(desired.profile, netns, target.processes, target.documents):
                system.processes.start(stand_in(launch))
                pages.append(page_of(launch, state_dir))
            helpers = tuple(HelperSummary(h.name, h.engine, h.keys) for h in desired.helpers)
            baseline = Listing(target.rules.backend, target.rules.digest, "", frozenset())
            owner = Owner(desired.profile, netns)
            ledger.settle_applied(None, Applied(owner, desired.source, time.time(), target, baseline, "", helpers))
            registrations += target.registrations
        yield system if system.registry.is_present() else replace(system, registry=RecordedRegistry(registrations))


def stand_in(launch: Launch) -> Launch:
    """The same, but for the program."""
    spec = launch.spec
    argv = (sys.executable, "-I", "-S", standin.__file__, *map(str, spec.queues))
    return replace(launch, spec=replace(spec, argv=argv))


def page_of(launch: Launch, state_dir: Path) -> Page:
    """What the process would count after a while."""
    (file,) = state_dir.glob(f"{launch.profile}@*/{launch.spec.files[0]}")
    page = Page(str(file.with_name(f"{launch.spec.name}.stats")))
    page.counters = Counters(packets=1_000_000, batches=300_000, expectations=1000, busy_ns=50_000_000_000)
    page.state = State.READY
    page.beat()
    return page


def stop_all(system: System) -> None:
    for process in system.processes.running():
        system.processes.stop(process)


def measure(order: Order) -> str:
    """The report."""
    with tempfile.TemporaryDirectory() as name, applied(order, Path(name, "state")) as system, scratch():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        scraper = Scraper(system, Path(name, "state"), boot_id())
        registry = CollectorRegistry()
        registry.register(OrchCollector(scraper.look, lambda: None))
        with serving(registry, "127.0.0.1", 0) as url:
            request = urllib.request.Request(url, headers=_AS_PROMETHEUS)
            scrapes = [scrape(request) for _ in range(order.scrapes + 1)][1:]  # the first one fills the caches
    return report(order, scrapes)


def scrape(request: urllib.request.Request) -> Scrape:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    with urllib.request.urlopen(request) as answer:
        text = answer.read().decode()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    (look,) = re.findall(r"^orch_scrape_duration_seconds (.+)$", text, re.M)
    return Scrape(wall_s, cpu_s, float(look), text)


def report(order: Order, scrapes: list[Scrape]) -> str:
    samples = [sample for family in text_string_to_metric_families(scrapes[0].text) for sample in family.samples]
    up = sum(sample.value for sample in samples if sample.name == "orch_helper_up")
    lines = [
        f"{order.profiles * HELPERS_EACH} helpers ({up:.0f} up) in {order.profiles} profiles and {order.namespaces} "
        f"namespaces; {len(samples)} samples, {len(scrapes[0].text) >> 10} KiB; {order.scrapes} scrapes",
        f"{'ms':<24}{'min':>8}{'p50':>8}{'p99':>8}",
        _line("scrape over HTTP", [one.wall_s for one in scrapes]),
        _line("its CPU", [one.cpu_s for one in scrapes]),
        _line("of which looking", [one.look_s for one in scrapes]),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, seconds: list[float]) -> str:
    p99 = statistics.quantiles(seconds, n=100, method="inclusive")[98]
    return f"{name:<24}" + "".join(f"{1e3 * value:8.1f}" for value in (min(seconds), statistics.median(seconds), p99))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.exporter", description=__doc__)
    parser.add_argument("--profiles", type=int, default=20, help=f"of {HELPERS_EACH} helpers each")
    parser.add_argument("--namespaces", type=int, default=10)
    parser.add_argument("--scrapes", type=int, default=200)
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        print("error: needs root", file=sys.stderr)
        return 1
    text = measure(Order(chosen.profiles, chosen.namespaces, chosen.scrapes))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "exporter.txt").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
