"""iptables rules go on attaching whatever orch does: Linux 6.1 makes them idle when any helper is unregistered.

That cannot be undone there: such a rule never lets go of its helper. So here is only what must not lead to it.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from lab import topology
from lab.topology import CLIENT, CONTENT, PASSIVE, ROUTER, ROUTER_FILTER
from orchestrator.model import HelperKey, L3Proto, L4Proto
from orchestrator.release import idles_iptables
from orchestrator.verify import trials
from tests.hosts import Harness
from tests.kernel.conftest import cli_here, turns

IDLES = idles_iptables(os.uname().release)
FTP = "ftp: {queueing: registration}"
TFTP = "tftp: {queueing: registration}"
OTHER = "profile: other\nhelpers:\n  ftp: {name: other, queueing: registration, attach: [{path: [outgoing]}]}\n"


def profile(backend: str, *helpers: str) -> str:
    return f"profile: p\nfamilies: [ip]\nbackend: {backend}\nhelpers:\n" + "".join(f"  {one}\n" for one in helpers)


def works() -> bool:
    done = topology.ftp(*PASSIVE)
    return (done.stdout, done.stderr) == (CONTENT, "")


def registered(orch: Harness) -> set[str]:
    return {registration.key.name for registration in orch.system.registry.dump()}


@pytest.mark.parametrize("backend", turns(["iptables-nft", "iptables-legacy"]) or ["iptables-nft"])
def test_whatever_orch_does(orch: Harness, backend: str) -> None:
    topology.load_filter(ROUTER, ROUTER_FILTER)
    orch.apply(profile(backend, FTP, TFTP), ROUTER)
    assert works()
    orch.apply(profile(backend, FTP), ROUTER)
    assert works(), "a helper was dropped"
    orch.apply(OTHER, CLIENT)
    orch.teardown("other", CLIENT)
    assert works(), "another profile went, elsewhere"
    assert registered(orch) == ({"ftp-us", "tftp-us", "other"} if IDLES else {"ftp-us"})
    assert orch.status().is_right
    orch.apply(profile(backend, FTP, TFTP), ROUTER)
    assert works()
    orch.teardown(every_netns=True)
    assert registered(orch) == set(), "nothing was left in the way"


if IDLES:  # elsewhere a trial leaves nothing

    def test_a_trial_beside_them(orch: Harness, tmp_path: Path) -> None:
        topology.load_filter(ROUTER, ROUTER_FILTER)
        orch.apply(profile("iptables-nft", FTP), ROUTER)
        file = tmp_path / "tried.yaml"
        file.write_text("profile: tried\nhelpers:\n  tftp: {engine: conntrackd}\n")
        done = cli_here("verify", str(file), state=tmp_path / "unused")
        assert done.returncode == 0
        assert "stays, disabled: this kernel would make iptables rules idle" in done.stderr
        assert works()
        assert all("stays, disabled" in reason for reason in trials.remove_abandoned(nullcontext()).values())
        assert "tftp" in registered(orch), "the name that conntrackd insists on"
        assert works()
        orch.teardown(every_netns=True)
        assert list(trials.remove_abandoned(nullcontext()).values()) == [""]
        assert registered(orch) == set()

else:  # there the rules would be idle, and their helper registered, until the next boot

    @pytest.mark.parametrize("backend", turns(["iptables-nft", "iptables-legacy"], first=1))
    def test_whatever_others_do_where_the_kernel_is_right(orch: Harness, backend: str) -> None:
        """On these kernels a helper is unregistered without further ado: orchestrator/release.py."""
        topology.load_filter(ROUTER, ROUTER_FILTER)
        orch.apply(profile(backend, FTP), ROUTER)
        like = orch.system.registry.dump()[0]
        dummy = replace(like, key=HelperKey("dummy", L3Proto.IP, L4Proto.TCP))
        orch.system.registry.create(dummy)
        orch.system.registry.delete(dummy.key)
        assert works()
        orch.teardown(every_netns=True)
        assert registered(orch) == set()
