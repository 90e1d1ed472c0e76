"""The control path: CPU, time and memory of orch, next to the recipe that people write by hand.

python3 -m bench.control --kernel 6.1 measures `orch` on this host where that needs no helper subsystem, then boots a
virtual machine that counts instructions and measures both there. The tables go to standard output and, as text and
JSON, to .cache/bench. Nothing here judges a figure; only a row whose rules and listener are not all there is invalid.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.recipes import Command, Recipe, by_hand, by_orch
from lab.layout import CACHE, REPOSITORY, Kernel, LabError
from lab.vm import Machine, boot

RESULTS = CACHE / "bench"
ORCH = str(REPOSITORY / ".venv/bin/orch")
BACKENDS = ("nftables", "iptables")
SIZES = (1, 100, 10_000)
NATIVE_RUNS = 15
NETNS = "orch-bench"
GUEST_TIMEOUT_S = 3600
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
_QUEUES = Path("/proc/net/netfilter/nfnetlink_queue")
_READY_WITHIN_S = 60.0
_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36  # prctl.h


@dataclass(frozen=True, slots=True)
class Order:
    """What to measure: the program, the backends and numbers of attachments in the guest, the runs on this host."""

    orch: str
    backends: tuple[str, ...]
    sizes: tuple[int, ...]
    runs: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What commands took: seconds of CPU and of the clock, and the largest resident set of any process, in MiB.

    CPU is that of every process they started, also of those that stay behind; `system_s` is the kernel's part of it,
    without the latter. `peak_mib` is never less than what the bench itself has: a child begins as a copy of it.
    """

    cpu_s: float
    system_s: float
    wall_s: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Row:
    """One action on `attachments`; `fault` says why the row does not count."""

    backend: str
    attachments: int
    action: str
    who: str
    cost: Cost
    fault: str = ""


@dataclass(frozen=True, slots=True)
class NativeRow:
    """The medians of some runs of one command on this host, and between what its time lay."""

    command: str
    runs: int
    cost: Cost
    fastest_s: float
    slowest_s: float


class BenchError(Exception):
    """A command failed that must not."""


# -- one measurement ---------------------------------------------------------------------------------------------------


def become_subreaper() -> None:
    """Make processes that our commands leave behind our children: seen, counted and ended by us. Source: prctl(2)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def measured(commands: Sequence[Command]) -> Cost:
    """Run commands one after the other; raises BenchError, with what it said, for the first that fails."""
    before = set(descendants())
    start = time.monotonic()
    usages = [_run(command) for command in commands]
    wall_s = time.monotonic() - start
    usages += _reaped()
    left_s = sum(_run_time_s(pid) for pid in descendants() if pid not in before)
    return Cost(
        cpu_s=left_s + sum(usage.ru_utime + usage.ru_stime for usage in usages),
        system_s=sum(usage.ru_stime for usage in usages),
        wall_s=wall_s,
        peak_mib=max(usage.ru_maxrss for usage in usages) / 1024,
    )


def _run(command: Command) -> resource.struct_rusage:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()[-2000:]
            raise BenchError(f"{' '.join(command)}: exit {process.returncode}: {said}")
    return usage


def _reaped() -> list[resource.struct_rusage]:
    """What those processes used that our commands left and that have ended."""
    usages: list[resource.struct_rusage] = []
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return usages
        if not pid:
            return usages
        usages.append(usage)


def descendants() -> Iterator[int]:
    """Every process that we started, or that one of those started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    ours = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in ours} - ours:
        yield from found
        ours |= found


def run_time_ns(pid: int) -> int:
    """CPU of a live process with one thread; raises OSError if it ended. Source: the first number of schedstat."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def _run_time_s(pid: int) -> float:
    try:
        return run_time_ns(pid) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


# -- in the virtual machine --------------------------------------------------------------------------------------------


def compare(backend: str, attachments: int, *, orch: str) -> Iterator[Row]:
    """All actions on a profile, by hand and by orch, from a clean namespace each.

    By hand first: `conntrackd -d` returns when it listens, however long its files take to come from the host. While
    the guest waits for those, its clock runs ahead, and orch would give up.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        recipes = (
            by_hand(backend, attachments, directory=directory),
            by_orch(backend, attachments, orch=orch, directory=directory, netns=NETNS),
        )
        for recipe in recipes:
            yield from _rows(recipe, backend, attachments)


def _rows(recipe: Recipe, backend: str, attachments: int) -> Iterator[Row]:
    for action, commands in recipe.actions:
        cost = measured(commands)
        yield Row(backend, attachments, action, recipe.who, cost, _fault(recipe, attachments))
    for command in recipe.undo:
        _run(command)
    if not _becomes_true(_is_alone):
        raise BenchError(f"{recipe.who}: processes stay behind")


def _fault(recipe: Recipe, attachments: int) -> str:
    """Why things are not as they should be: nobody listens, or rules are missing. Empty if all is well."""
    if not _becomes_true(_is_listening):
        return "nobody listens on the queue"
    listing = subprocess.run(recipe.listing, env=_ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    found = len(recipe.attached.findall(listing))
    return "" if found == attachments else f"{found} of {attachments} are attached"


def _is_listening() -> bool:
    """True if a queue is bound and gets packets. Source: nfnetlink_queue.c, seq_show; the fourth is the copy mode."""
    return _QUEUES.exists() and any(row.split()[3] == "2" for row in _QUEUES.read_text().splitlines())


def _is_alone() -> bool:
    _reaped()
    return not list(descendants())


def _becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _READY_WITHIN_S
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def guest(order: Order, result: Path) -> None:
    """Measure everything in the namespace we are in, and write it to a file of JSON."""
    become_subreaper()
    for backend in order.backends:
        list(compare(backend, 1, orch=order.orch))  # files into the cache, modules into the kernel
    rows: list[Row] = []
    for backend in order.backends:
        for size in order.sizes:
            print(f"{backend}, {size} attachments ...", file=sys.stderr, flush=True)
            rows += compare(backend, size, orch=order.orch)
    result.write_text(json.dumps([asdict(row) for row in rows]))


# -- on this host ------------------------------------------------------------------------------------------------------


def native(order: Order) -> Iterator[NativeRow]:
    """Commands that need no user-space helpers, on this host as it is: a small profile with a helper of the kernel.

    Applied as root only, in a namespace made for it.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        recipe = by_orch("nftables", 1, orch=order.orch, directory=Path(name), netns=NETNS, engine="kernel")
        actions = dict(recipe.actions)
        yield _native_row("--help", ((order.orch, "--help"),), order.runs)
        yield _native_row("check", actions["check"], order.runs)
        if os.geteuid() == 0:
            with namespace(NETNS):
                measured(actions["apply"])
                yield _native_row("apply again", actions["apply again"], order.runs)
                yield _native_row("diff", actions["diff"], order.runs)
                measured(recipe.undo)


def _native_row(name: str, commands: Sequence[Command], runs: int) -> NativeRow:
    measured(commands)  # files into the cache
    costs = [measured(commands) for _ in range(runs)]
    walls = [cost.wall_s for cost in costs]
    median = Cost(
        cpu_s=statistics.median(cost.cpu_s for cost in costs),
        system_s=statistics.median(cost.system_s for cost in costs),
        wall_s=statistics.median(walls),
        peak_mib=max(cost.peak_mib for cost in costs),
    )
    return NativeRow(name, runs, median, min(walls), max(walls))


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """A network namespace of that name, for as long as the block runs. Raises BenchError if there is one already."""
    _run(("ip", "netns", "add", name))
    try:
        yield
    finally:
        _run(("ip", "netns", "delete", name))


# -- the report --------------------------------------------------------------------------------------------------------


def report(kernel: Kernel, rows: Sequence[Row], native_rows: Sequence[NativeRow]) -> str:
    """Both tables as text."""
    lines = [
        f"In a virtual machine that counts instructions, kernel {kernel.version}; ratio = CPU of orch / CPU by hand",
        "",
        f"{'backend':<9}{'attach':>7}  {'action':<12}{'orch CPU':>10}{'by hand':>10}{'ratio':>7}"
        f"{'orch MiB':>10}{'by hand':>9}",
    ]
    pairs: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault((row.backend, row.attachments, row.action), {})[row.who] = row
    lines += [_line(pair["orch"], pair["by hand"]) for pair in pairs.values()]
    lines += ["", "On this host, orch alone, small profile", ""]
    lines += [f"{'command':<14}{'CPU':>8}{'wall':>9}{'of runs':>9}{'fastest':>10}{'slowest':>9}{'MiB':>6}"]
    lines += [
        f"{row.command:<14}{row.cost.cpu_s:8.3f}{row.cost.wall_s:9.3f}{row.runs:9}{row.fastest_s:10.3f}"
        f"{row.slowest_s:9.3f}{row.cost.peak_mib:6.0f}"
        for row in native_rows
    ]
    return "\n".join(lines) + "\n"


def _line(orch: Row, hand: Row) -> str:
    head = f"{orch.backend:<9}{orch.attachments:7}  {orch.action:<12}"
    faults = [f"{row.who}: {row.fault}" for row in (orch, hand) if row.fault]
    if faults:
        return f"{head}  does not count: {'; '.join(faults)}"
    one, other = orch.cost, hand.cost
    return (
        f"{head}{one.cpu_s:10.3f}{other.cpu_s:10.3f}{one.cpu_s / other.cpu_s:7.2f}"
        f"{one.peak_mib:10.0f}{other.peak_mib:9.0f}"
    )


def run(kernel: Kernel, order: Order) -> int:
    """Measure on this host and in a guest, write both tables; the exit code is 1 if a row does not count."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    native_rows = list(native(order))
    measured_file = RESULTS / "guest.json"
    measured_file.unlink(missing_ok=True)
    options = ("--orch", order.orch, "--backends", *order.backends, "--sizes", *map(str, order.sizes))
    again = shlex.join((sys.executable, "-m", "bench.control", "--guest", str(measured_file), *options))
    in_namespace = f"ip netns add {NETNS} && exec ip netns exec {NETNS} {again}"
    code = boot(kernel, ["sh", "-c", in_namespace], timeout_s=GUEST_TIMEOUT_S, machine=Machine(cpus=1, icount=True))
    if code:
        return code
    rows = [Row(**{**row, "cost": Cost(**row["cost"])}) for row in json.loads(measured_file.read_text())]
    text = report(kernel, rows, native_rows)
    (RESULTS / "control.txt").write_text(text)
    content = {"kernel": kernel.version, "rows": [asdict(r) for r in rows], "native": [asdict(r) for r in native_rows]}
    (RESULTS / "control.json").write_text(json.dumps(content, indent=1) + "\n")
    print(text, end="")
    return int(any(row.fault for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.control", description=__doc__)
    parser.add_argument("--kernel", type=Kernel, choices=list(Kernel), default=Kernel.V6_1)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of attachments")
    parser.add_argument("--orch", default=ORCH, metavar="PROGRAM", help="another orch than that of this repository")
    parser.add_argument("--runs", type=int, default=NATIVE_RUNS, help="of each command on this host")
    parser.add_argument("--guest", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    order = Order(chosen.orch, tuple(chosen.backends), tuple(chosen.sizes), chosen.runs)
    try:
        if chosen.guest:
            guest(order, chosen.guest)
            return 0
        return run(chosen.kernel, order)
    except (BenchError, LabError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
