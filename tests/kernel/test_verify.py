"""`orch verify` on kernels with a helper registry: what works is found to work, what does not is not, nothing stays."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.topology import run
from orchestrator import cli
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status
from tests.kernel.conftest import HELPER_MODULES
from tests.waiting import until

NATIVE = """
profile: native
helpers:
  ftp: {}
  tftp: {queueing: registration, attach: [{saddr: [10.0.0.0/8, "fd00::/8"], iif: lan7}]}
  steam: {use: ./steam.py, attach: [{path: outgoing}]}
"""
BROKEN = """
profile: broken
helpers:
  ftp: {use: ./broken.py, attach: [{path: incoming}]}
  other: {use: ftp, engine: conntrackd, attach: [{path: incoming, ports: 2121}]}
  tftp: {engine: conntrackd, attach: [{path: incoming}]}
  amanda: {engine: conntrackd, attach: [{path: incoming}]}
  rpc: {attach: [{path: outgoing, l4proto: udp}]}
"""
BROKEN_HELPER = """
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves


class Broken(Helper):
    summary = "looks at everything, and never expects anything"
    serves = (Serves(L4.TCP, (21,)),)
    policies = (Policy("broken", expect_max=1, expect_timeout_s=10),)

    def inspect(self, payload, direction, flow, private):
        return NOTHING
"""
SMALL = "profile: small\nhelpers: {tftp: {queueing: registration, attach: [{path: incoming}]}}\n"
KERNEL = """
profile: kernel
helpers:
  ftp: {engine: kernel}
  tftp: {engine: kernel}
  amanda: {}
  irc: {}
  netbios-ns: {}
  pptp: {}
  sane: {engine: kernel}
  sip: {}
  snmp: {}
"""
BEGUN_WITHIN_S = 120  # an orch that starts, makes a network, and applies, on an emulated machine
THEIRS = Registration(
    HelperKey("tftp", L3Proto.IP, L4Proto.UDP), 4711, Status.DISABLED, (Policy("tftp", 1, 300),), priv_data_len=0
)


@pytest.fixture
def directory() -> Iterator[Path]:
    """For profiles and helpers: only root can write there, as orch wants it. Whatever a test does, nothing is left."""
    assert not KernelRegistry().dump()
    with tempfile.TemporaryDirectory(prefix="orch-test-", dir="/run") as name:
        yield Path(name)
    left = {registration.key for registration in KernelRegistry().dump()}
    for key in left:
        KernelRegistry().delete(key)
    assert not left
    until(lambda: not trial_processes(), "all processes gone")
    assert not list(Path("/run").glob("orch-verify-*"))
    loaded = [module for module in HELPER_MODULES if Path("/sys/module", module).exists()]
    if loaded:
        run("modprobe", "-r", *loaded)


def trial_processes() -> list[str]:
    """Processes that were started for a trial; their environment names its directory."""
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and b"/orch-verify-" in Path(entry.path, "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def written(directory: Path, text: str) -> str:
    file = directory / "profile.yaml"
    file.write_text(text)
    return str(file)


class Verified:
    """What `orch verify --json` says of a profile; in this process, as starting another is most of what it costs."""

    def __init__(self, directory: Path, text: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.code = cli.run(["verify", written(directory, text), "--json"])
        self.value = json.loads(output.getvalue().splitlines()[-1])
        self.results = self.value["verification"]["results"]

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, result.values())) for result in self.results)


def test_native_helpers_work_in_both_queueings(directory: Path) -> None:
    (directory / "steam.py").write_text(Path("profiles/steam.py").read_text())
    seen = Verified(directory, NATIVE)
    assert {r["outcome"] for r in seen.results} == {"ok"}, str(seen)
    assert seen.code == 0
    assert {(r["helper"], r["l3proto"], r["path"]) for r in seen.results} == {
        *(("ftp", ip, path) for ip in ("ip", "ip6") for path in ("incoming", "outgoing")),
        *(("tftp", ip, "incoming") for ip in ("ip", "ip6")),
        ("steam", "ip", "outgoing"),
    }


def test_what_does_not_work_is_found_and_what_others_use_is_left_alone(directory: Path) -> None:
    (directory / "broken.py").write_text(BROKEN_HELPER)
    KernelRegistry().create(THEIRS)
    try:
        seen = Verified(directory, BROKEN)
        assert KernelRegistry().dump() == (THEIRS,)
    finally:
        KernelRegistry().delete(THEIRS.key)
    assert seen.code == 2
    found = {(r["helper"], r["l3proto"], r["dialogue"]): (r["outcome"], r["reason"]) for r in seen.results}
    expected: dict[tuple[str, str, str | None], str] = {
        **{("ftp", "ip", dialogue): "failed" for dialogue in ("PORT", "PASV", "EPRT", "EPSV")},
        **{("ftp", "ip6", dialogue): "failed" for dialogue in ("EPRT", "EPSV")},
        **{("other", "ip", dialogue): "ok" for dialogue in ("PORT", "PASV", "EPRT")},
        ("other", "ip", "EPSV"): "failed",
        ("other", "ip6", None): "failed",
        **{("tftp", ip, dialogue): "skipped" for ip in ("ip", "ip6") for dialogue in ("RRQ", "WRQ")},
        ("amanda", "ip", "sendbackup"): "failed",
        ("amanda", "ip6", None): "failed",
        ("rpc", "ip", "GETPORT"): "ok",
        ("rpc", "ip", "GETADDR"): "failed",
        ("rpc", "ip6", None): "failed",
    }
    assert {case: outcome for case, (outcome, _) in found.items()} == expected, str(seen)
    assert "instead: 10.66.1.2 0 > 10.66.2.2" in found["amanda", "ip", "sendbackup"][1]
    assert "tftp/ip/udp is in use on this host" in found["tftp", "ip6", "RRQ"][1]
    assert found["other", "ip6", None][1] == "engine conntrackd does not serve IPv6"


def test_helpers_of_the_kernel_work(directory: Path) -> None:
    seen = Verified(directory, KERNEL)
    assert {r["outcome"] for r in seen.results if r["helper"] != "pptp"} == {"ok"}, str(seen)
    assert {r["outcome"] for r in seen.results if r["helper"] == "pptp"} == {"no dialogue"}
    assert seen.code == 0
    assert "nf_conntrack_ftp" in seen.value["verification"]["modules_loaded"]


def test_what_a_killed_one_leaves_is_found_and_taken_away_by_the_next(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its supervisor takes most of it away by itself, unless that is gone, too."""
    file = written(directory, SMALL)
    with subprocess.Popen([sys.executable, "-m", "orchestrator", "verify", file], stdout=subprocess.DEVNULL) as child:
        until(enabled, "the profile is applied", within_s=BEGUN_WITHIN_S)
        for pid in supervisors():
            os.kill(pid, signal.SIGKILL)
        child.kill()
    (name,) = (path.name for path in Path("/run").glob("orch-verify-*"))
    cli.run(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (found,) = (finding["cause"] for finding in findings if finding["probe"] == "trials")
    assert found.startswith(f"{name} did not clean up, and left v")
    assert Verified(directory, SMALL).code == 0
    assert f"{name} did not clean up: what it left is taken away" in capsys.readouterr().err


def enabled() -> bool:
    return any(registration.status is Status.ENABLED for registration in KernelRegistry().dump())


def supervisors() -> list[int]:
    return [int(pid) for pid in trial_processes() if b"supervisor.py" in Path("/proc", pid, "cmdline").read_bytes()]


def test_a_signal_ends_it_and_nothing_is_left(directory: Path) -> None:
    """While it applies: the registration is enabled, or about to be, and its listener is there."""
    file = written(directory, SMALL)
    pid = os.fork()
    if not pid:
        code = 70
        try:  # whatever happens, there are not two pytests
            with contextlib.redirect_stdout(io.StringIO()):
                code = cli.run(["verify", file])
        finally:
            os._exit(code)
    until(
        lambda: bool(KernelRegistry().dump() and trial_processes()),
        "the helper process is started",
        within_s=BEGUN_WITHIN_S,
    )
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
