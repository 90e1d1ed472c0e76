"""All tests: the pure ones here, the kernel ones in virtual machines, two runs at a time; one summary at the end.

python3 -m lab.suite runs everything; with --kernel only the kernel tests of one kernel, and arguments for pytest.
The logs and JUnit files are .cache/results/KERNEL-PART.log and .xml.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.layout import CACHE, REPOSITORY, TURNS_VARIABLE, Kernel

RESULTS = CACHE / "results"
HOST = "host"
AT_ONCE = 2
GUEST_TIMEOUT_S = 3600

# A kernel's tests in parts, each for a guest of its own, the longest first: so all processors have work to the end.
# Who is named in no part is in the rest. The tests that only one kernel has are a part of that one alone.
NAMED_PARTS = {
    "traffic": (
        "tests/kernel/test_doctor.py",
        "tests/kernel/test_lifetimes.py",
        "tests/kernel/test_native.py",
        "tests/kernel/test_native_traffic.py",
        "tests/kernel/test_oracle.py",
        "tests/kernel/test_real_software.py",
        "tests/kernel/test_rule_queueing.py",
        "tests/kernel/test_verify.py",
    ),
    "changes": (
        "tests/kernel/test_drift.py",
        "tests/kernel/test_faults.py",
        "tests/kernel/test_idle_rules.py",
        "tests/kernel/test_namespaces.py",
        "tests/kernel/test_supervision.py",
        "tests/kernel/test_zero_gap.py",
    ),
}
FIRST_KERNEL_PARTS = {
    "services": (
        "tests/kernel/test_boot.py",
        "tests/kernel/test_exporter.py",
        "tests/kernel/test_service.py",
    ),
}
KERNEL_TESTS = ("tests/kernel", "tests/contract")
_NAMED_FILES = [file for files in (*FIRST_KERNEL_PARTS.values(), *NAMED_PARTS.values()) for file in files]
PARTS = {**NAMED_PARTS, "rest": (*KERNEL_TESTS, *(f"--ignore={file}" for file in _NAMED_FILES))}


@dataclass(frozen=True, slots=True)
class Result:
    """One pytest run: where, its exit code, and what its JUnit file counts."""

    name: str
    exit_code: int
    seconds: float
    tests: int = 0
    failed: int = 0
    skipped: int = 0

    @property
    def is_good(self) -> bool:
        return self.exit_code == 0 and self.tests > self.skipped


def pure() -> Result:
    """The tests that need no kernel of ours, with the sysroot's tools in sight; what cannot run is a failure."""
    arguments = ["-p", "tests.unhurried", "-m", "not kernel", "--durations=10"]
    return _run(HOST, [sys.executable, "-m", "lab.inside", "--"], arguments, is_live=False)


def kernel(key: str, arguments: Sequence[str], *, name: str, is_live: bool) -> Result:
    """The kernel tests in a guest; all of them, or those that the arguments name."""
    boot = [sys.executable, "-m", "lab.vm", "run", "--kernel", key, "--cpus", "1", "--timeout", str(GUEST_TIMEOUT_S)]
    # Reading the pure tests, to run none of them, would take a guest a minute.
    where = [] if any(Path(argument.partition("::")[0]).exists() for argument in arguments) else KERNEL_TESTS
    return _run(name, [*boot, "--"], ["-m", "kernel", "--durations=10", *where, *arguments], is_live=is_live)


def _run(name: str, prefix: list[str], arguments: list[str], *, is_live: bool) -> Result:
    RESULTS.mkdir(parents=True, exist_ok=True)
    junit, log = RESULTS / f"{name}.xml", RESULTS / f"{name}.log"
    junit.unlink(missing_ok=True)
    command = [*prefix, ".venv/bin/python", "-m", "pytest", "-q", f"--junitxml={junit}", *arguments]
    turns = {} if is_live else {TURNS_VARIABLE: "1"}  # one run of many, or the only one
    environment = {**os.environ, "ORCH_REQUIRE": "1", **turns}
    start = time.monotonic()
    if is_live:
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL).returncode
    else:
        with log.open("w") as output:
            code = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            ).returncode
    return _count(Result(name, code, time.monotonic() - start), junit)


def _count(result: Result, junit: Path) -> Result:
    if not junit.exists():
        return result
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    counts = [
        (int(s.get("tests", 0)), int(s.get("failures", 0)) + int(s.get("errors", 0)), int(s.get("skipped", 0)))
        for s in suites
    ]
    tests, failed, skipped = (sum(column) for column in zip(*counts, strict=True))
    return Result(result.name, result.exit_code, result.seconds, tests, failed, skipped)


def together(name: str, parts: Sequence[Result]) -> Result:
    """The sum of all parts of one kernel's tests; bad if one of them is."""
    return Result(
        name,
        next((part.exit_code or 1 for part in parts if not part.is_good), 0),
        sum(part.seconds for part in parts),
        sum(part.tests for part in parts),
        sum(part.failed for part in parts),
        sum(part.skipped for part in parts),
    )


def everything() -> list[Result]:
    """All of it, two runs at a time; the pure tests are one: they use one processor at most, and often wait."""
    results: dict[str, list[Result]] = {name: [] for name in (HOST, *Kernel)}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = {pool.submit(pure): HOST} | {
            pool.submit(kernel, key, files, name=f"{key}-{part}", is_live=False): key for key, part, files in guests()
        }
        for job in concurrent.futures.as_completed(jobs):
            result = job.result()
            print(f"\n=== {result.name}: {result.seconds:.0f} s ===", flush=True)
            print((RESULTS / f"{result.name}.log").read_text(errors="replace"), end="", flush=True)
            results[jobs[job]].append(result)
    return [together(name, parts) for name, parts in results.items()]


def guests() -> list[tuple[Kernel, str, tuple[str, ...]]]:
    """The kernel, the part and the arguments of each guest, in the order in which they start."""
    first, *_ = Kernel
    alone = [(first, part, files) for part, files in FIRST_KERNEL_PARTS.items()]
    return [*alone, *((key, part, files) for part, files in PARTS.items() for key in Kernel)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.suite", description=__doc__)
    parser.add_argument("--kernel", choices=[k.value for k in Kernel])
    chosen, arguments = parser.parse_known_args()
    key = chosen.kernel
    results = [kernel(key, arguments, name=key, is_live=True)] if key else everything()
    print()
    for r in results:
        passed = r.tests - r.failed - r.skipped
        state = "ok" if r.is_good else f"FAILED (exit {r.exit_code})"
        counts = f"{passed} passed, {r.failed} failed, {r.skipped} skipped in {r.seconds:.0f} s"
        print(f"{r.name.ljust(10)} {counts}  {state}")
    failed = sum(r.failed for r in results) + sum(not r.is_good and not r.failed for r in results)
    print(f"{sum(r.tests - r.failed - r.skipped for r in results)} passed, {failed} failed")
    return 0 if all(r.is_good for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
