"""Apply, diff, death, drift and teardown on the running kernel, and that a host is as before when all is over."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lab import topology
from lab.topology import CLIENT, CLIENT_IP, CONTENT, PASSIVE, ROUTER, ROUTER_FILTER, SERVER_IP, inside, run
from orchestrator import profile as profiles
from orchestrator import render
from orchestrator.engine.privileges import NET_ADMIN, own_user
from orchestrator.errors import HelperProcessError
from orchestrator.kernel.netns import entered, find
from orchestrator.model import HelperKey, L3Proto, L4Proto, Status
from orchestrator.ports import ProcessState
from orchestrator.reports import PlanRefusedError
from orchestrator.state import WatchProcess
from orchestrator.supervise.launcher import LocalProcesses
from tests.hosts import FTP, Harness
from tests.kernel.conftest import clean_orch, cli, cli_here, snapshot, turns
from tests.kernel.native import kill
from tests.waiting import until

OWN = HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)
PROFILES = [(file, backend) for file in sorted(Path("profiles").glob("*.yaml")) for backend in ("nftables", "iptables")]
HAS_OLD_DELETE = int(os.uname().release.split(".")[0]) < 7


def conntrackd(orch: Harness) -> int:
    return orch.system.processes.running()[0].pid


def kill_supervisor() -> None:
    kill(int(run("pgrep", "-f", "orchestrator/supervise/supervisor.py").stdout))


def restarts(orch: Harness) -> int:
    (seen,) = orch.system.processes.supervised("ftp", find(ROUTER)) or (None,)
    return seen.restarts if seen and seen.state is ProcessState.RUNNING else -1


def wait_for_restarts(orch: Harness, wanted: int) -> None:
    until(lambda: restarts(orch) == wanted, f"{wanted} restarts")


def wait_for_status(orch: Harness, wanted: Status) -> None:
    """The supervisor acts in its own time; give it that."""
    until(lambda: wanted in {r.status for r in orch.system.registry.dump() if r.key == OWN}, f"{OWN} is {wanted}")


# -- one profile at work: deaths, drift, neighbours --------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(routed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    with clean_orch(tmp_path_factory.mktemp("state")) as orch:
        topology.load_filter(ROUTER, ROUTER_FILTER)
        yield orch


@pytest.fixture
def served(router: Harness) -> Harness:
    """FTP works through the router, whatever the test before has left."""
    router.apply(FTP, ROUTER)
    router.steps.clear()
    return router


def test_death_of_the_listener_does_not_block_new_connections(served: Harness) -> None:
    """It is replaced, and enabled again by then: conntrackd's own registration is not."""
    kill(conntrackd(served))
    assert "Content-Length" in topology.ftp("--head").stdout  # curl logs in, and needs no data connection
    wait_for_restarts(served, 1)
    wait_for_status(served, Status.ENABLED)
    status = served.status().profiles[0]
    assert status.drift == ()
    (seen,) = served.system.processes.supervised("ftp", find(ROUTER))
    assert (seen.pid, seen.reason) == (conntrackd(served), "killed by SIGKILL")
    assert topology.ftp(*PASSIVE).stdout == CONTENT


def test_without_a_supervisor_the_same_death_blocks(served: Harness) -> None:
    """What the supervisor is for: an enabled helper without a listener lets nobody log in any more."""
    kill_supervisor()
    assert served.status().profiles[0].drift == ("conntrackd: its supervisor is gone",)
    kill(conntrackd(served))
    assert "Connected" not in topology.ftp("--verbose", "--head", within_s=3).stderr
    served.apply(FTP, ROUTER)
    assert topology.ftp(*PASSIVE).stdout == CONTENT


def test_a_new_supervisor_adopts_the_process(served: Harness) -> None:
    pid = conntrackd(served)
    kill_supervisor()
    served.apply(FTP, ROUTER)
    assert conntrackd(served) == pid
    kill(pid)
    wait_for_restarts(served, 1)
    wait_for_status(served, Status.ENABLED)


def test_status_counts_what_there_is(served: Harness) -> None:
    inside(ROUTER, "conntrack", "-F")
    with entered(find(CLIENT)):
        control = socket.create_connection((SERVER_IP, 21), timeout=30)
    with control:
        assert control.recv(100).startswith(b"220 ")
        assert served.system.host.connections(find(ROUTER)) == {"ftp-us": 1}
    helper = served.status().profiles[0].helpers[0]
    assert (helper.engine, helper.queueing, helper.pid) == ("conntrackd", "registration", conntrackd(served))
    (row,) = served.system.host.queues(find(ROUTER))
    assert (row.queue_num, row.is_ready) == (36160, True)
    assert row.seen > 0


def test_conntrackd_has_a_user_of_its_own_and_one_capability(served: Harness) -> None:
    pid = conntrackd(served)
    status = dict(line.partition(":\t")[::2] for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert [int(status[f"Cap{kind}"], 16) for kind in ("Eff", "Prm", "Inh", "Bnd", "Amb")] == [NET_ADMIN] * 5
    assert (status["Groups"].split(), status["NoNewPrivs"]) == ([], "1")
    processes = served.system.processes
    assert isinstance(processes, LocalProcesses)
    directory = processes.runtime_dir("ftp", find(ROUTER))
    (user,) = set(status["Uid"].split())
    assert (directory / "conntrackd.d" / "conntrackd.ctl").stat().st_uid == int(user)
    assert int(user) == own_user(str(directory), "conntrackd").uid


def test_a_disabled_registration_is_drift(served: Harness) -> None:
    live = next(r for r in served.system.registry.dump() if r.key == OWN)
    served.system.registry.update(replace(live, status=Status.DISABLED))
    assert served.status().profiles[0].drift == ("ftp-us/ip/tcp: status disabled -> enabled",)
    served.apply(FTP, ROUTER)
    assert served.status().profiles[0].drift == ()


def test_rules_that_are_gone_are_seen_and_mended(served: Harness) -> None:
    inside(ROUTER, "nft", "delete", "table", "inet", "orch-ftp")
    assert served.status().profiles[0].drift == ("inet orch-ftp: missing: 2 rules",)
    served.apply(FTP, ROUTER)
    assert served.steps == ["load rules inet orch-ftp"]


def test_an_edited_rule_is_seen_shown_and_mended(served: Harness) -> None:
    inside(ROUTER, "nft", "insert rule inet orch-ftp prerouting-mangle150 tcp dport 21 accept")
    assert served.status().profiles[0].drift == ("inet orch-ftp: somebody changed them",)
    difference = served.diff(FTP, ROUTER)
    assert "tcp dport 21 accept" in difference.live_listing
    assert "tcp dport 21 accept" not in difference.baseline_listing
    served.apply(FTP, ROUTER)
    assert served.diff(FTP, ROUTER).plan.is_empty


def test_a_changed_profile_is_updated_in_place(served: Harness) -> None:
    """The process stays when a policy changes; the table stays when the rules do."""
    pid = conntrackd(served)
    text = (
        "profile: ftp\nhelpers: {ftp: {engine: conntrackd, policies: {ftp: {expect_max: 4, expect_timeout: 1m}}, "
        "attach: [{ports: [21, 2121]}]}}\n"
    )
    served.apply(text, ROUTER)
    assert served.steps == ["update helper ftp-us/ip/tcp", "load rules inet orch-ftp"]
    assert conntrackd(served) == pid
    assert served.diff(text, ROUTER).plan.is_empty


def test_the_kernel_engine_is_refused_while_a_user_space_helper_has_the_name(served: Harness) -> None:
    with pytest.raises(PlanRefusedError, match="cannot use the in-kernel helper ftp/ip/tcp"):
        served.apply("profile: k\nhelpers: {ftp: {engine: kernel}}\n", CLIENT)


def test_a_second_namespace_cannot_take_the_queue_away(served: Harness) -> None:
    with pytest.raises(PlanRefusedError, match=r"shared with profile ftp in netns orch-router.*queue 36160 -> 9"):
        served.apply("profile: other\nhelpers: {ftp: {engine: conntrackd, queue: 9}}\n", CLIENT)
    assert topology.ftp(*PASSIVE).stdout == CONTENT


def test_two_namespaces_share_and_part(served: Harness) -> None:
    served.apply(FTP, CLIENT)
    assert topology.ftp(*PASSIVE).stdout == CONTENT
    report = served.teardown(netns=CLIENT)
    assert [str(o) for o in report.others] == [f"profile ftp in netns {ROUTER}"]
    assert served.system.host.queues(find(CLIENT)) == ()
    assert [p.netns for p in served.system.processes.running()] == [find(ROUTER).identity]
    assert topology.ftp(*PASSIVE).stdout == CONTENT
    assert served.status().profiles[0].drift == ()


def test_a_registration_deleted_under_live_rules_is_healed(served: Harness) -> None:
    """On 7.3 the kernel lets that happen, and the rules go on attaching the dead helper, even to a new one's name."""
    if HAS_OLD_DELETE:
        inside(ROUTER, "nft", "delete", "table", "inet", "orch-ftp")
    served.system.registry.delete(OWN)
    served.apply(FTP, ROUTER)
    assert topology.ftp(*PASSIVE).stdout == CONTENT


def test_a_replaced_registration_serves_again(served: Harness) -> None:
    live = next(r for r in served.system.registry.dump() if r.key == OWN)
    served.teardown(netns=ROUTER)
    served.system.registry.create(replace(live, priv_data_len=32))
    with pytest.raises(PlanRefusedError, match="priv_data_len 32 -> 24"):
        served.apply(FTP, ROUTER)
    served.system.registry.delete(OWN)
    served.apply(FTP, ROUTER)
    assert topology.ftp(*PASSIVE).stdout == CONTENT


# -- from nothing to nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "backend"), turns(PROFILES), ids=lambda value: getattr(value, "stem", value))
def test_every_shipped_profile(orch: Harness, file: Path, backend: str) -> None:
    """Applied, nothing differs; torn down, nothing is left."""
    text = file.read_text() + f"\nbackend: {backend}\n"
    before = snapshot()
    orch.apply(text, ROUTER)
    assert snapshot() != before
    assert orch.diff(text, ROUTER).plan.is_empty
    assert orch.status().profiles[0].drift == ()
    report = orch.teardown(netns=ROUTER)
    assert [one.leftovers for one in report.reports] == [()]
    assert snapshot() == before
    assert sorted(p.name for p in orch.state_dir.iterdir()) == ["ledger.sqlite", "lock"]


def test_the_command_line(orch: Harness, tmp_path: Path) -> None:
    """Exit codes and streams, on the real kernel; one of them as a program, the others in this process."""
    state = tmp_path / "state"
    ftp = "profiles/ftp.yaml"
    differs = cli_here("diff", ftp, "--netns", ROUTER, state=state)
    assert (differs.returncode, differs.stderr) == (2, "")
    assert "Plan: 4 to add, 0 to change, 0 to replace, 0 to remove." in differs.stdout
    assert not state.exists()
    applied = cli("apply", ftp, "--netns", ROUTER, state=state)
    assert applied.returncode == 0
    assert applied.stdout.endswith("Applied: 4 added, 0 changed, 0 replaced, 0 removed. Verified.\n")
    handles = inside(ROUTER, "nft", "-a", "list", "ruleset").stdout
    again = cli_here("apply", ftp, "--netns", ROUTER, state=state)
    assert (again.returncode, again.stdout) == (0, f"No changes. netns {ROUTER} matches {ftp}.\n")
    assert inside(ROUTER, "nft", "-a", "list", "ruleset").stdout == handles
    status = cli_here("status", "--json", state=state)
    assert status.returncode == 0
    assert '"drift": []' in status.stdout
    assert topology.ftp(*PASSIVE).stdout == CONTENT
    with entered(find(CLIENT)):
        control = socket.create_connection((SERVER_IP, 21), timeout=30)
    with control:
        assert control.recv(100).startswith(b"220 ")
        refused = cli_here("teardown", "--netns", ROUTER, state=state)
        assert (refused.returncode, refused.stdout) == (64, "")
        assert "1 live connection loses its helper" in refused.stderr
    gone = cli_here("teardown", "--netns", ROUTER, "-y", state=state)
    assert gone.returncode == 0
    assert cli_here("teardown", "--netns", ROUTER, state=state).stdout == "Nothing to remove.\n"


def test_looking_loads_no_module(orch: Harness, tmp_path: Path) -> None:
    for module in ("nfnetlink_cthelper", "nfnetlink_queue", "nf_conntrack_netlink"):
        run("modprobe", "-r", module, check=False)
    before = Path("/proc/modules").read_text().split("\n")
    names = {line.split(" ")[0] for line in before}
    assert "nfnetlink_cthelper" not in names
    state = tmp_path / "state"
    assert cli_here("check", "profiles/ftp.yaml", state=state).returncode == 0
    assert cli_here("diff", "profiles/ftp.yaml", "--netns", ROUTER, state=state).returncode == 2
    assert cli_here("status", state=state).returncode == 0
    assert {line.split(" ")[0] for line in Path("/proc/modules").read_text().split("\n")} == names


def test_a_listener_that_never_binds_is_undone(orch: Harness, tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "supervise.yaml.j2").write_text(
        "processes:\n  - name: conntrackd\n    argv: [sleep, '60']\n    files: [conntrackd.conf]\n"
        "    queues: [36160]\n    keys: [ftp/ip/tcp, ftp-us/ip/tcp]\n    enables: []\n    ready_within_s: 1\n"
        "    restart: on-failure\n    restart_limit: 10\n    restart_window_s: 600\n"
    )
    desired = profiles.load(FTP, "ftp.yaml")
    target = render.target(desired, template_dir=templates)
    before = snapshot()
    with pytest.raises(HelperProcessError, match="does not listen on queue 36160"):
        orch.app(ROUTER).apply(desired, target, ask=False)
    assert snapshot() == before


def test_a_program_that_ends_at_once_says_why(orch: Harness, tmp_path: Path) -> None:
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "conntrackd.conf.j2").write_text("Nonsense\n")
    desired = profiles.load(FTP, "ftp.yaml")
    target = render.target(desired, template_dir=templates)
    before = snapshot()
    with pytest.raises(HelperProcessError, match="does not start: exited with 1") as caught:
        orch.app(ROUTER).apply(desired, target, ask=False)
    assert "syntax error" in caught.value.hint
    assert snapshot() == before


@pytest.mark.parametrize("backend", turns(["nftables", "iptables-nft", "iptables-legacy"]))
def test_a_lost_ledger_is_made_again(orch: Harness, backend: str) -> None:
    text = f"{FTP}backend: {backend}\n"
    before = snapshot()
    orch.apply(text, ROUTER)
    shutil.rmtree(orch.state_dir)
    pid = conntrackd(orch)
    report = orch.apply(text, ROUTER)  # the supervisor cannot be reached any more
    assert [type(step) for step in report.plan.steps] == [WatchProcess]
    assert conntrackd(orch) == pid
    shutil.rmtree(orch.state_dir)
    orch.teardown_file(text, ROUTER)
    assert snapshot() == before


@pytest.mark.parametrize("backend", turns(["iptables-nft", "iptables-legacy"], first=1) or ["iptables-nft"])
def test_a_rule_of_others_behind_ours_stays_behind(orch: Harness, backend: str) -> None:
    """Before ours, one that accepts leaves nothing to attach; that is told."""
    helper = "ftp: {engine: kernel, attach: [{ports: %s}]}"
    text = f"profile: p\nfamilies: [ip]\nbackend: {backend}\nhelpers:\n  {helper}\n"
    jump = ("-j", "orch-p-pre")

    def raw(*words: str) -> None:
        inside(ROUTER, backend, "-t", "raw", *words)

    def explained() -> tuple[int, str]:
        done = cli_here("explain", CLIENT_IP, f"{SERVER_IP}:21", "--netns", ROUTER, state=orch.state_dir)
        return done.returncode, done.stdout

    topology.load_filter(ROUTER, ROUTER_FILTER)
    orch.apply(text % "[21]", ROUTER)
    raw("-A", "PREROUTING", "-p", "tcp", "-j", "ACCEPT")
    assert topology.ftp(*PASSIVE).stdout == CONTENT
    orch.apply(text % "[21, 2121]", ROUTER)
    assert topology.ftp(*PASSIVE).stdout == CONTENT, "the jump was moved"
    assert explained()[0] == 0

    raw("-D", "PREROUTING", *jump)
    raw("-A", "PREROUTING", *jump)
    assert topology.ftp(*PASSIVE, within_s=3).stdout != CONTENT
    assert orch.status().is_right, "the place of a jump is everybody's matter"
    code, said = explained()
    assert code == 2
    assert f"comes first, and takes it: ip raw PREROUTING ({backend}) -p tcp -j ACCEPT" in said
    told = cli_here("doctor", "--netns", ROUTER, state=orch.state_dir)
    assert told.returncode == 2
    assert f"earlier rules in netns {ROUTER}: ip raw PREROUTING ({backend}) -p tcp -j ACCEPT" in told.stdout

    raw("-D", "PREROUTING", *jump)
    raw("-I", "PREROUTING", *jump)
    orch.apply(text % "[21]", ROUTER)
    assert topology.ftp(*PASSIVE).stdout == CONTENT
    assert explained()[0] == 0
    orch.teardown(every_netns=True)


def test_a_profile_file_that_is_gone_can_be_torn_down_by_name(orch: Harness) -> None:
    before = snapshot()
    orch.apply(FTP, ROUTER)
    orch.teardown("ftp", ROUTER)
    assert snapshot() == before


def test_a_namespace_deleted_under_us_is_taken_away(orch: Harness) -> None:
    """Its name is gone, and it lives on in our process: rules, registrations and process must go all the same."""
    before = snapshot()
    run("ip", "netns", "add", "orch-doomed")
    orch.apply(FTP, "orch-doomed")
    run("ip", "netns", "del", "orch-doomed")
    assert "it is gone" in orch.status().profiles[0].drift[0]
    (report,) = orch.teardown(every_netns=True).reports
    assert report.leftovers == ()
    until(lambda: snapshot() == before, "what its supervisor began for the same reason has ended", within_s=60)
    assert not orch.status().profiles


# -- failures that are silent elsewhere --------------------------------------------------------------------------------


def test_a_helper_taken_by_a_kernel_module_is_refused(orch: Harness) -> None:
    run("modprobe", "nf_conntrack_ftp")
    before = snapshot()
    with pytest.raises(PlanRefusedError, match="the in-kernel helper of that name is loaded") as caught:
        orch.apply(FTP, ROUTER)
    assert "engine: kernel" in caught.value.hint
    assert snapshot() == before


def test_no_family_is_silently_uncovered(orch: Harness) -> None:
    """An inet object without a family takes what is registered, IPv4 alone if need be; ours name theirs, or fail."""
    text = "profile: t\nhelpers: {tftp: {engine: conntrackd}}\n"
    orch.apply(text, ROUTER)
    listing = inside(ROUTER, "nft", "list", "ruleset").stdout
    assert listing.count("l3proto ip\n") == 1
    assert listing.count("l3proto ip6\n") == 1
    ip6 = HelperKey("tftp-us", L3Proto.IP6, L4Proto.UDP)
    if HAS_OLD_DELETE:
        inside(ROUTER, "nft", "flush", "ruleset")
    orch.system.registry.delete(ip6)
    assert any("tftp-us/ip6/udp" in line for line in orch.status().profiles[0].drift)
    orch.apply(text, ROUTER)
    assert orch.status().profiles[0].drift == ()


def test_a_queue_that_somebody_holds_is_refused(orch: Harness) -> None:
    """conntrackd itself would start all the same, and never see a packet."""
    holder = subprocess.Popen(
        ["ip", "netns", "exec", ROUTER, ".venv/bin/python", "-c", HOLD_QUEUE], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PlanRefusedError, match="queue 36160 is held by python"):
            orch.apply(FTP, ROUTER)
    finally:
        holder.kill()
        holder.wait()


# NFQNL_MSG_CONFIG on queue 36160: bind, then copy mode packet (nfnetlink_queue.h).
HOLD_QUEUE = """
import socket, struct, sys
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
s.bind((0, 0))
body = struct.pack(">BBH", 0, 0, 36160) + struct.pack("=HH", 8, 1) + struct.pack(">BBH", 1, 0, 0)
body += struct.pack("=HH", 9, 2) + struct.pack(">IB3x", 65535, 2)
s.send(struct.pack("=IHHII", 16 + len(body), 3 << 8 | 2, 5, 1, 0) + body)
error = struct.unpack_from("=i", s.recv(4096), 16)[0]
print("held" if error == 0 else f"errno {-error}", flush=True)
sys.stdin.read() if error else s.recv(4096)
"""
