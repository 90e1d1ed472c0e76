"""The data path: what helpers cost per packet, and what connections get, for every engine under the same load.

python3 -m bench.data --kernel 6.1 boots a virtual machine that counts instructions, applies each engine through orch on
a router between a client and a server, and drives the same transactions through it. The tables go to standard output
and, as text and JSON, to .cache/bench. Nothing here judges a figure; a row counts only if the kernel made exactly one
expectation for each transaction that announces a connection, and lost nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import load
from bench.control import ORCH, RESULTS, run_time_ns
from bench.load import WORKLOADS, Timing, Workload
from lab import topology
from lab.layout import Kernel, LabError
from lab.topology import CLIENT, CLIENT_IP, ROUTER, ROUTER_FILTER, SERVER, SERVER_IP
from lab.vm import Machine, boot
from orchestrator.kernel import netns
from orchestrator.kernel.procfs import parse_queues

CONNECTIONS = (1, 8, 64)
TRANSACTIONS = 2000
WARM_UP_EACH = 4
GUEST_TIMEOUT_S = 5400
HELPERS = ("ftp", "tftp")
_CONNTRACKD_PRIORITY = 99  # what it gives itself unless its configuration says otherwise


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine as options of a profile, none where nobody helps. A `priority` above 0 is that of SCHED_RR."""

    name: str
    options: str
    helpers: tuple[str, ...] = HELPERS
    priority: int = 0


BASIS = "conntrackd as shipped"
ENGINES = (
    Engine("no helper", ""),
    Engine(BASIS, "engine: conntrackd", priority=_CONNTRACKD_PRIORITY),
    Engine("conntrackd, SCHED_OTHER", "engine: conntrackd"),
    Engine("native, registration", "engine: native, queueing: registration"),
    Engine("native, rules", "engine: native, queueing: rules"),
    Engine("native, triggers", "engine: native, queueing: rules, inspect: triggers", helpers=("ftp",)),
    Engine("in-kernel", "engine: kernel"),  # last: its modules stay and bar the names that conntrackd insists on
)


@dataclass(frozen=True, slots=True)
class Order:
    """What to measure, by name, and how often."""

    orch: str
    engines: tuple[str, ...]
    workloads: tuple[str, ...]
    connections: tuple[int, ...]
    transactions: int


@dataclass(frozen=True, slots=True)
class HelperProcess:
    """Who serves a helper, as `orch status` says; `pid` is 0 where nobody does, or the kernel."""

    pid: int
    queues: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """One helper process after it became ready and before its first packet, and what it holds after its last.

    `ready_cpu_ms` is its CPU since the fork.
    """

    engine: str
    helper: str
    ready_cpu_ms: float
    resident_mib: float


@dataclass(frozen=True, slots=True)
class Row:
    """One workload on one engine. `cpu_us` is the helper's CPU per packet, with all that the kernel does in its name.

    `packets` were queued; `fault` says why the row does not count.
    """

    engine: str
    workload: str
    connections: int
    packets: int
    cpu_us: float
    timing: Timing | None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Counters:
    """What was counted in the router since it was made: packets queued and lost, expectations; and CPU in ns."""

    packets: int
    lost: int
    expectations: int
    run_time_ns: int


# -- in the virtual machine --------------------------------------------------------------------------------------------


def profile_text(engine: Engine) -> str:
    """One profile for every helper of the engine, attached to forwarded connections."""
    entries = "".join(f"  {name}: {{{engine.options}, attach: [{{path: incoming}}]}}\n" for name in engine.helpers)
    return f"profile: bench\nfamilies: ip\nhelpers:\n{entries}"


def measured(engine: Engine, order: Order) -> Iterator[Row | Start]:
    """Apply an engine on the router, run every workload of it, and take it away."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        where = ("--netns", ROUTER, "--state-dir", f"{name}/state")
        if engine.options:
            profile = Path(name) / "profile.yaml"
            profile.write_text(profile_text(engine))
            topology.run(order.orch, "apply", str(profile), *where)
        processes = _processes(topology.run(order.orch, "status", "--json", *where).stdout) if engine.options else {}
        ready_cpu_ms = {helper: _run_time_ns(process) / 1e6 for helper, process in processes.items()}
        for process in processes.values():
            if process.pid and engine.priority:
                os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(engine.priority))
        for workload in WORKLOADS:
            if workload.name in order.workloads and workload.helper in engine.helpers:
                process = processes.get(workload.helper, HelperProcess(0, ()))
                for connections in order.connections:
                    yield _row(engine, workload, process, connections, order.transactions)
        for helper, process in processes.items():
            if process.pid:
                yield Start(engine.name, helper, ready_cpu_ms[helper], _resident_mib(process.pid))
        if engine.options:
            topology.run(order.orch, "teardown", "--yes", *where)


def _processes(status: str) -> dict[str, HelperProcess]:
    (profile,) = json.loads(status.splitlines()[-1])["status"]["profiles"]
    return {
        helper["name"]: HelperProcess(helper["pid"] or 0, tuple(queue["queue_num"] for queue in helper["queues"]))
        for helper in profile["helpers"]
    }


def _row(engine: Engine, workload: Workload, process: HelperProcess, connections: int, transactions: int) -> Row:
    ends = load.Ends(CLIENT, SERVER, SERVER_IP)

    def scripts(kind: Workload) -> list[tuple[load.Exchange, ...]]:
        return [load.exchanges(kind, i, client=CLIENT_IP, server=SERVER_IP) for i in range(connections)]

    try:
        with ExitStack() as stack:
            pairs = ends.connect(workload.helper, connections, stack)
            load.drive(pairs, scripts(load.warm_up(workload.helper)), connections * WARM_UP_EACH)
            before = _counters(process)
            timing = load.drive(pairs, scripts(workload), transactions)
            after = _counters(process)
    except (load.LostError, OSError) as error:
        return Row(engine.name, workload.name, connections, 0, 0.0, None, str(error))
    finally:
        topology.inside(ROUTER, "conntrack", "-F")
    packets = after.packets - before.packets
    return Row(
        engine.name,
        workload.name,
        connections,
        packets,
        (after.run_time_ns - before.run_time_ns) / packets / 1e3 if packets else 0.0,
        timing,
        _fault(
            expected=transactions if workload.expects and engine.options else 0,
            made=after.expectations - before.expectations,
            lost=after.lost - before.lost,
        ),
    )


def _fault(*, expected: int, made: int, lost: int) -> str:
    """Why a row does not count; empty if it does."""
    if lost:
        return f"{lost} packets were lost in the queue"
    return "" if made == expected else f"{made} expectations, not {expected}"


def _run_time_ns(process: HelperProcess) -> int:
    """CPU of a helper process; 0 where there is none."""
    return run_time_ns(process.pid) if process.pid else 0


def _counters(process: HelperProcess) -> Counters:
    with netns.entered(netns.find(ROUTER)):
        queues = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
        rows = parse_queues(queues.read_text() if queues.exists() else "")
        statistics = Path("/proc/thread-self/net/stat/nf_conntrack").read_text()
    ours = [row for row in rows if row.queue_num in process.queues]
    return Counters(
        packets=sum(row.seen for row in ours),
        lost=sum(row.queue_dropped + row.user_dropped for row in ours),
        expectations=summed(statistics, "expect_create"),
        run_time_ns=_run_time_ns(process),
    )


def summed(table: str, name: str) -> int:
    """The sum of a column over all CPUs, in hexadecimal. Source: nf_conntrack_standalone.c, ct_cpu_seq_show."""
    head, *lines = (line.split() for line in table.splitlines())
    place = head.index(name)
    return sum(int(line[place], 16) for line in lines)


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def guest(order: Order, result: Path) -> None:
    """Measure everything, and write it to a file of JSON."""
    rows: list[Row] = []
    starts: list[Start] = []
    with topology.routed():
        topology.load_filter(ROUTER, ROUTER_FILTER)  # stateful: connections are tracked, with and without a helper
        for engine in ENGINES:
            if engine.name not in order.engines:
                continue
            print(f"{engine.name} ...", file=sys.stderr, flush=True)
            for found in measured(engine, order):
                if isinstance(found, Row):
                    rows.append(found)
                else:
                    starts.append(found)
            content = {"rows": [asdict(row) for row in rows], "starts": [asdict(start) for start in starts]}
            result.write_text(json.dumps(content))


# -- the report --------------------------------------------------------------------------------------------------------


def report(version: str, rows: Sequence[Row], starts: Sequence[Start]) -> str:
    """The tables as text; every ratio is to conntrackd as shipped in the same run."""
    lines = [
        f"In a virtual machine that counts instructions, one CPU, kernel {version}; "
        f"ratios to {BASIS}; a queued packet costs the helper us",
        "",
        f"{'workload':<15}{'conn':>5}  {'engine':<24}{'us':>7}{'ratio':>7}{'queued':>8}"
        f"{'trans/s':>9}{'ratio':>7}{'p50 us':>9}{'p99 us':>9}",
    ]
    basis = {(row.workload, row.connections): row for row in rows if row.engine == BASIS}
    order = {workload.name: number for number, workload in enumerate(WORKLOADS)}
    last = ""
    for row in sorted(rows, key=lambda row: (order[row.workload], row.connections)):
        head = f"{row.workload:<15}{row.connections:>5}"
        lines.append(f"{head if head != last else '':<20}  {row.engine:<24}{_cells(row, basis)}")
        last = head
    lines += ["", f"{'engine':<24}{'helper':<8}{'CPU ms to ready':>16}{'resident MiB':>14}"]
    lines += [f"{s.engine:<24}{s.helper:<8}{s.ready_cpu_ms:>16.1f}{s.resident_mib:>14.1f}" for s in starts]
    return "\n".join(lines) + "\n"


def _cells(row: Row, basis: dict[tuple[str, int], Row]) -> str:
    if row.fault or row.timing is None:
        return f"  does not count: {row.fault}"
    timing, other = row.timing, basis.get((row.workload, row.connections))
    queued = row.packets / timing.transactions
    rate = timing.transactions / timing.seconds
    cost_ratio = rate_ratio = ""
    if other is not None and other.timing is not None and not other.fault:
        cost_ratio = f"{row.cpu_us / other.cpu_us:.2f}" if row.packets else ""
        rate_ratio = f"{rate / (other.timing.transactions / other.timing.seconds):.2f}"
    cost = f"{row.cpu_us:.1f}" if row.packets else "-"
    return (
        f"{cost:>7}{cost_ratio:>7}{queued:>8.2f}{rate:>9.0f}{rate_ratio:>7}{timing.p50_us:>9.0f}{timing.p99_us:>9.0f}"
    )


def run(kernel: Kernel, order: Order) -> int:
    """Measure in a guest and write the tables; the exit code is 1 if a row does not count."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    measured_file = RESULTS / "data-guest.json"
    measured_file.unlink(missing_ok=True)
    options = (
        *("--orch", order.orch, "--transactions", str(order.transactions)),
        *("--engines", *order.engines, "--workloads", *order.workloads),
        *("--connections", *map(str, order.connections)),
    )
    again = shlex.join((sys.executable, "-m", "bench.data", "--guest", str(measured_file), *options))
    code = boot(kernel, ["sh", "-c", again], timeout_s=GUEST_TIMEOUT_S, machine=Machine(cpus=1, icount=True))
    if code:
        return code
    content = json.loads(measured_file.read_text())
    rows = [Row(**{**row, "timing": Timing(**row["timing"]) if row["timing"] else None}) for row in content["rows"]]
    starts = [Start(**start) for start in content["starts"]]
    text = report(kernel.version, rows, starts)
    (RESULTS / "data.txt").write_text(text)
    (RESULTS / "data.json").write_text(json.dumps({"kernel": kernel.version, **content}, indent=1) + "\n")
    print(text, end="")
    return int(any(row.fault for row in rows))


def main() -> int:
    engines, workloads = [engine.name for engine in ENGINES], [workload.name for workload in WORKLOADS]
    parser = argparse.ArgumentParser(prog="python3 -m bench.data", description=__doc__)
    parser.add_argument("--kernel", type=Kernel, choices=list(Kernel), default=Kernel.V6_1)
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--workloads", nargs="+", choices=workloads, default=workloads)
    parser.add_argument("--connections", nargs="+", type=int, default=CONNECTIONS, help="at once")
    parser.add_argument("--transactions", type=int, default=TRANSACTIONS, help="of each row")
    parser.add_argument("--orch", default=ORCH, metavar="PROGRAM", help="another orch than that of this repository")
    parser.add_argument("--guest", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    order = Order(
        chosen.orch, tuple(chosen.engines), tuple(chosen.workloads), tuple(chosen.connections), chosen.transactions
    )
    try:
        if chosen.guest:
            guest(order, chosen.guest)
            return 0
        return run(chosen.kernel, order)
    except (LabError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
