"""`orch doctor` and `orch explain` on the real kernel: a host that is well, and one that is made ill on purpose."""

from __future__ import annotations

import ftplib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.topology import CLIENT, CLIENT_IP, ROUTER, ROUTER_FILTER, SERVER_IP, load_filter, run
from orchestrator import app as app_module
from orchestrator import cli
from orchestrator.doctor.host_probes import MODULES
from orchestrator.kernel.cthelper import KernelRegistry
from orchestrator.kernel.modules import module_present
from orchestrator.kernel.netns import entered, find
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status
from tests.hosts import Harness

PROFILE = "profile: ftp\nhelpers:\n  ftp: {engine: native}\n"
WITHIN_S = 60
NOBODY_LISTENS = 4711
ILL = """
table inet mine {
    ct helper f {
        type "ftp" protocol tcp
        l3proto ip
    }
    chain pre {
        type filter hook prerouting priority mangle
        tcp dport 21 ct helper set "f"
    }
    chain early {
        type filter hook prerouting priority raw
        tcp dport 2121 ct helper set "f"
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established accept
    }
}
"""

ILL_KINDS = {
    *("problem rules", "problem listeners", "problem filters"),
    *("warning names", "warning registrations", "warning families", "warning directories"),
}

Orch = Callable[..., tuple[int, Any]]


@pytest.fixture
def said(orch: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Orch:
    """`said(*argv)` -> exit code, and the result line."""
    monkeypatch.setenv("ORCH_STATE_DIR", str(orch.state_dir))
    monkeypatch.setattr(app_module, "boot_id", lambda: orch.app().boot_id)  # a ledger of another boot reads as empty

    def command(*argv: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = cli.run([*argv, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return command


def control(port: int = 21) -> ftplib.FTP:
    """A control connection through the router."""
    with entered(find(CLIENT)):
        session = ftplib.FTP(timeout=WITHIN_S)
        session.connect(SERVER_IP, port)
    return session


def ends(session: ftplib.FTP) -> tuple[str, str]:
    assert session.sock is not None
    return f"{CLIENT_IP}:{session.sock.getsockname()[1]}", f"{SERVER_IP}:21"


def loaded() -> list[str]:
    return sorted(path.name for path in Path("/sys/module").iterdir())


def wrong(result: Any) -> list[str]:
    """Problems and warnings, a line each."""
    found = [f for f in result["findings"] if f["verdict"] in ("problem", "warning")]
    assert all(finding["cure"] for finding in found)
    return [f"{f['verdict']} {f['probe']}: {f['cause']}" for f in found]


def test_a_host_that_is_well_and_its_connections(routed: None, orch: Harness, said: Orch) -> None:
    before = loaded()
    assert said("doctor")[0] == 0
    assert loaded() == before
    code, result = said("doctor", "--probe")
    assert (code, wrong(result)) == (0, [])
    assert all(map(module_present, MODULES))

    load_filter(ROUTER, ROUTER_FILTER)  # which also makes the kernel track what is older than our rules
    old = control()
    orch.apply(PROFILE, netns=ROUTER)
    code, result = said("doctor")
    assert (code, wrong(result)) == (0, [])

    run("ip", "-n", ROUTER, "link", "add", "red", "type", "vrf", "table", "10")
    run("ip", "-n", ROUTER, "link", "add", "red0", "master", "red", "type", "dummy")
    (vrf,) = wrong(said("doctor")[1])
    assert vrf.startswith("warning vrf: red0 belongs to the VRF red")
    run("ip", "-n", ROUTER, "link", "delete", "red0")
    run("ip", "-n", ROUTER, "link", "delete", "red")

    code, result = said("explain", *ends(old), "--netns", ROUTER)
    assert (code, result["explanation"]["reason"]) == (2, "older")
    old.close()

    new = control()
    new.login()
    code, result = said("explain", *ends(new), "--netns", ROUTER)
    found = result["explanation"]
    assert (code, found["reason"], found["ways"]) == (0, "helped", [{"path": "incoming", "interface": "lan0"}])
    assert [c["helper"] for c in found["connections"]] == ["ftp-us"]
    assert found["expectations"] == []
    _, announced = ftplib.parse227(new.sendcmd("PASV"))
    (expected,) = said("explain", *ends(new), "--netns", ROUTER)[1]["explanation"]["expectations"]
    assert (expected["dport"], expected["daddr"], expected["helper"]) == (announced, SERVER_IP, "ftp-us")
    new.close()

    code, result = said("explain", CLIENT_IP, f"{SERVER_IP}:8021", "--netns", ROUTER)
    assert (code, result["explanation"]["reason"]) == (2, "port")
    code, result = said("explain", CLIENT_IP, f"{SERVER_IP}:21", "--netns", CLIENT)
    assert (code, result["explanation"]["reason"]) == (2, "no profile")
    assert result["explanation"]["ways"][0]["path"] == "outgoing"


def test_a_host_that_was_made_ill(routed: None, orch: Harness, said: Orch) -> None:
    registry = KernelRegistry()
    policy = (Policy("ftp", expect_max=1, expect_timeout_s=300),)
    ftp, stray = (HelperKey(name, L3Proto.IP, L4Proto.TCP) for name in ("ftp", "stray"))
    registry.create(Registration(ftp, NOBODY_LISTENS, Status.ENABLED, policy, 24))
    registry.create(Registration(stray, 0, Status.DISABLED, policy, 0))
    run("modprobe", "nf_conntrack_tftp")
    load_filter(ROUTER, ILL)
    (orch.state_dir / "gone@4-99").mkdir(parents=True)

    code, result = said("doctor")
    assert (code, kinds(result)) == (2, ILL_KINDS)
    causes = "\n".join(wrong(result))
    assert f"ftp/ip/tcp is enabled and attached, and nobody listens on queue {NOBODY_LISTENS}" in causes
    assert "inet mine early attaches ftp at prerouting -300" in causes
    assert "inet mine forward drops" in causes
    assert "stray/ip/tcp (disabled, queue 0) is not orch's, and no rule attaches it" in causes


def kinds(result: Any) -> set[str]:
    return {line.partition(":")[0] for line in wrong(result)}
