"""`orch enable` under a real systemd: the order of a boot, a restart of the firewall, namespaces that come and go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from lab.control import control
from lab.layout import REPOSITORY, LabError
from lab.systemd import SHIPPED_UNITS, Systemd, booted
from lab.topology import ROUTER, ROUTER_FILTER, run
from orchestrator.boot import names
from orchestrator.session import DEFAULT_STATE
from tests.hosts import Harness
from tests.kernel.conftest import clean_orch, cli_here, snapshot
from tests.reports import REPORTS
from tests.waiting import until

PROGRAM = REPOSITORY / ".venv/bin/orch"
PROFILES = Path("/etc/orch")
LATE = "orch-late"
FTP, LATE_UNIT = names("ftp", ROUTER)[0], names("late", "")[0]
FIREWALL = "nftables.service"
FIREWALL_DROP_IN = """
[Service]
NetworkNamespacePath=/run/netns/{netns}
ExecStart=
ExecStart=nft -f {ruleset}
"""
# Whoever waits for the network finds the rules of orch.
ONLINE = """
[Unit]
DefaultDependencies=no
Requires=network-online.target
After=network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
NetworkNamespacePath=/run/netns/{netns}
ExecStart=nft list table inet orch-ftp
"""
# The other firewalls of a distribution, in the router; they load iptables' table raw, or flush it.
IN_THE_ROUTER = "[Service]\nNetworkNamespacePath=/run/netns/{netns}\n"
FIREWALLD, PERSISTENT = "firewalld.service", "netfilter-persistent.service"
BUS = ("dbus.service", "dbus.socket")
BUS_USER = "messagebus"
IPTABLES_RULES = Path("/etc/iptables/rules.v4")
MARK = "lab-mark"
_WITHIN_S = 240.0  # a guest is slow to start a program, and this takes several
FIGURES = REPORTS.setdefault("service: the rules are there again after a restart of the firewall", [])


def profile(name: str, netns: str = "", backend: str = "nftables") -> str:
    place = f"netns: {netns}\n" if netns else ""
    # With iptables a registration queues, with nftables rules do: two profiles of one registration must agree.
    ftp = f"ftp: {{name: ftp-{backend[:3]}, attach: [{{path: incoming, ports: 2121}}]}}"
    return f"profile: {name}\n{place}backend: {backend}\nhelpers:\n  {ftp}\n"


@pytest.fixture(scope="module")
def systemd(routed: None) -> Iterator[Systemd]:
    """A systemd with the firewall of the distribution, which is that of the router, and orch enabled for two profiles.

    One is for the router, the other for a namespace that does not exist yet.
    """
    PROFILES.mkdir()
    try:
        for name, netns in (("ftp", ""), ("late", LATE)):
            (PROFILES / f"{name}.yaml").write_text(profile(name, netns))
        (PROFILES / "ruleset.nft").write_text(f"flush ruleset\n{ROUTER_FILTER}")
        with booted() as made:
            (made.units / "sysinit.target.wants").mkdir()
            for file in (made.units / FIREWALL, made.units / "sysinit.target.wants" / FIREWALL):
                file.symlink_to(SHIPPED_UNITS / FIREWALL)
            drop_in = FIREWALL_DROP_IN.format(netns=ROUTER, ruleset=PROFILES / "ruleset.nft")
            made.install(f"{FIREWALL}.d/netns.conf", drop_in)
            made.install("online.service", ONLINE.format(netns=ROUTER))
            yield made
    finally:
        shutil.rmtree(PROFILES)
        run("ip", "netns", "delete", LATE, check=False)


@pytest.fixture(scope="module")
def orch(systemd: Systemd) -> Iterator[Harness]:
    with clean_orch(DEFAULT_STATE) as harness:
        yield harness


def files(systemd: Systemd) -> set[str]:
    """The units and links of orch."""
    return {str(path.relative_to(systemd.units)) for path in systemd.units.rglob("orch-*")}


def transfer(port: int) -> None:
    with control() as session:
        session.transfer("PASV", port)


def has_rules() -> bool:
    return "table inet orch-ftp" in topology.ruleset(ROUTER)


def wait_for_rules() -> float:
    """Seconds until the rules are there again."""
    return until(has_rules, "the rules are there again", within_s=_WITHIN_S)


def wait_until(systemd: Systemd, unit: str, wanted: str) -> None:
    try:
        until(lambda: state(systemd, unit) == wanted, f"{unit} is {wanted}", within_s=_WITHIN_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{systemd.journal(unit)}") from error


def applied(orch: Harness) -> set[str]:
    return {str(one.owner) for one in orch.app().applied()}


def started(systemd: Systemd, unit: str) -> int:
    """When a unit was started, in microseconds."""
    return int(systemd.properties(unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"])


def state(systemd: Systemd, unit: str) -> str:
    return systemd.properties(unit, "ActiveState")["ActiveState"]


def test_without_systemd_it_says_what_to_do_instead(routed: None, tmp_path: Path) -> None:
    assert not Path("/run/systemd/system").exists()
    file = Path("/etc/orch-instead.yaml")
    file.write_text(profile("ftp"))
    try:
        done = cli_here("enable", str(file), "--netns", ROUTER, "--unit-dir", str(tmp_path), state=tmp_path)
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1
        assert line.endswith(f"orch apply {file} --netns {ROUTER} --confirm-within 0")
        assert not list(tmp_path.glob("orch*"))
    finally:
        file.unlink()


def test_units_are_written_once_and_a_failure_leaves_none(systemd: Systemd, orch: Harness) -> None:
    enable = (str(PROGRAM), "enable", str(PROFILES / "ftp.yaml"), "--netns", ROUTER)
    systemd.install(f"{FTP}.d/broken.conf", "[Service]\nExecStart=\nExecStart=false\n")
    with pytest.raises(LabError, match="systemctl start failed"):
        systemd.run(*enable, "--now")
    shutil.rmtree(systemd.units / f"{FTP}.d")
    assert files(systemd) == set()
    assert systemd.run(*enable) == f"{FTP} is enabled.\n"
    systemd.run(str(PROGRAM), "enable", str(PROFILES / "late.yaml"))
    before = {path: path.lstat().st_mtime_ns for path in systemd.units.rglob("orch-*")}
    assert systemd.run(*enable) == f"{FTP} was enabled already.\n"
    assert {path: path.lstat().st_mtime_ns for path in systemd.units.rglob("orch-*")} == before
    assert f"multi-user.target.wants/{FTP}" in files(systemd)
    assert f"multi-user.target.wants/{names('late', '')[2]}" in files(systemd)
    assert state(systemd, FTP) == "inactive"


def test_at_boot_it_is_applied_after_the_firewall_and_before_the_network_is_used(
    systemd: Systemd, orch: Harness
) -> None:
    systemd.run("systemctl", "start", "multi-user.target", "online.service")
    assert state(systemd, "online.service") == "active"
    assert state(systemd, FTP) == "active"
    assert started(systemd, FIREWALL) < started(systemd, FTP) < started(systemd, "network-online.target")
    assert systemd.properties(LATE_UNIT, "ActiveState", "ConditionResult") == {
        "ActiveState": "inactive",
        "ConditionResult": "no",
    }
    transfer(21001)


def test_a_restart_of_the_firewall_applies_it_again(systemd: Systemd, orch: Harness) -> None:
    pid = systemd.properties(FTP, "MainPID")
    systemd.run("systemctl", "restart", FIREWALL)
    FIGURES.append(f"{FIREWALL}, restart: {wait_for_rules():.2f} s")
    transfer(21002)
    systemd.run("systemctl", "stop", FIREWALL)
    until(lambda: not has_rules(), "its stop flushes")
    systemd.run("systemctl", "start", FIREWALL)
    wait_for_rules()
    transfer(21003)
    assert systemd.properties(FTP, "MainPID") == pid


def test_a_namespace_that_comes_and_goes_is_followed(systemd: Systemd, orch: Harness) -> None:
    """Its registration is shared with the router, which goes on working."""
    run("ip", "netns", "add", LATE)
    wait_until(systemd, LATE_UNIT, "active")
    assert applied(orch) == {f"profile ftp in netns {ROUTER}", f"profile late in netns {LATE}"}
    run("ip", "netns", "delete", LATE)
    wait_until(systemd, LATE_UNIT, "inactive")
    assert applied(orch) == {f"profile ftp in netns {ROUTER}"}
    transfer(21004)
    run("ip", "netns", "add", LATE)
    wait_until(systemd, LATE_UNIT, "active")


def raw_table() -> str:
    return topology.inside(ROUTER, "iptables-nft-save", "-t", "raw").stdout


def wait_until_flushed_and_applied(systemd: Systemd, *command: str) -> float:
    """Seconds from a command that flushes until it has done so, and the rules are there again."""
    topology.inside(ROUTER, "iptables-nft", "-t", "raw", "-N", MARK)

    def is_again() -> bool:
        table = raw_table()
        return MARK not in table and "-j orch-ftp-pre" in table

    systemd.run("systemctl", *command)
    try:
        return until(is_again, f"after {' '.join(command)}", within_s=_WITHIN_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{systemd.journal(FTP)}\n{raw_table()}") from error


def test_other_firewalls_flush_the_rules_of_iptables(systemd: Systemd, orch: Harness) -> None:
    """Those of nftables they leave alone.

    firewalld flushes after it told systemd that it has started, or reloads; and it conflicts with nftables.service.
    """
    systemd.run("systemctl", "stop", FIREWALL)
    (PROFILES / "ftp.yaml").write_text(profile("ftp", backend="iptables-nft"))
    IPTABLES_RULES.parent.mkdir(exist_ok=True)
    IPTABLES_RULES.write_text("*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n")
    run("useradd", "--system", BUS_USER, check=False)  # Debian's dbus makes it; the sysroot runs no package script
    for unit in (FIREWALLD, PERSISTENT, *BUS):
        (systemd.units / unit).symlink_to(SHIPPED_UNITS / unit)
    for unit in (FIREWALLD, PERSISTENT):
        systemd.install(f"{unit}.d/netns.conf", IN_THE_ROUTER.format(netns=ROUTER))
    pid = systemd.properties(FTP, "MainPID")
    systemd.run("systemctl", "reload", FTP)
    until(lambda: "-j orch-ftp-pre" in raw_table(), "the rules are those of iptables", within_s=_WITHIN_S)
    for command, unit in (("restart", PERSISTENT), ("restart", FIREWALLD), ("reload", FIREWALLD)):
        FIGURES.append(f"{unit}, {command}: {wait_until_flushed_and_applied(systemd, command, unit):.2f} s")
    systemd.run("systemctl", "stop", FIREWALLD, PERSISTENT)
    assert systemd.properties(FTP, "MainPID") == pid


def test_what_was_enabled_is_taken_away_again(systemd: Systemd, orch: Harness) -> None:
    systemd.install(f"{FTP}.d/mine.conf", "[Service]\nCPUQuota=100%\n")
    assert systemd.run(str(PROGRAM), "disable", "ftp", "--netns", ROUTER, "--now") == f"{FTP} is disabled.\n"
    systemd.run(str(PROGRAM), "disable", str(PROFILES / "late.yaml"), "--now")
    assert files(systemd) == {f"{FTP}.d"}
    assert snapshot() == topology.ruleset(ROUTER)
