"""iptables has a commit for each family: orch is killed, or fails, between the two, on this machine's kernel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from orchestrator.app import kernel_system
from orchestrator.errors import HalfDoneError, KernelError
from orchestrator.kernel import iptables, modules
from orchestrator.kernel.netns import entered, find
from orchestrator.model import Backend
from tests.hosts import Harness
from tests.namespaces import named_netns

NEEDED = ("ip", "iptables-legacy", "iptables-nft")
SBIN = "/usr/sbin:/usr/bin:/sbin:/bin"
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(program, path=SBIN) for program in NEEDED)
    or not modules.available(("nf_conntrack_ftp",)),
    reason=f"needs root, {', '.join(NEEDED)}, and the kernel's ftp helper",
)

KILL = "kill -KILL $PPID"
FAIL = "echo it did not work >&2; exit 1"
ONE, TWO = "21", "[21, 2121]"


class Place:
    """A namespace, and a profile of the kernel's own helper there."""

    def __init__(self, orch: Harness, netns: str, backend: Backend, programs: Path) -> None:
        self.orch = orch
        self.netns = netns
        self.backend = backend
        self.programs = programs

    def apply(self, ports: str) -> None:
        helper = f"{{engine: kernel, attach: [{{ports: {ports}}}]}}"
        self.orch.apply(f"profile: half\nbackend: {self.backend}\nhelpers:\n  ftp: {helper}\n", self.netns)

    def teardown(self) -> None:
        self.orch.teardown("half", self.netns)

    def listing(self) -> str:
        found = self.orch.system.rules[self.backend].listing(find(self.netns), "half")
        return found.text if found else ""

    def foreign(self, program: str) -> None:
        """A rule of somebody else, behind ours, that ends the way through table raw."""
        command = [program, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-j", "ACCEPT"]
        with entered(find(self.netns)):
            subprocess.run(command, check=True, capture_output=True, env={"PATH": SBIN})

    def saved(self, program: str) -> list[str]:
        """The rules of table raw, ours and those of others."""
        with entered(find(self.netns)):
            text = iptables.saved_table(program, "raw") or ""
        return [line for line in text.splitlines() if line.startswith("-")]

    def with_second(self, text: str, act: Callable[[], None]) -> None:
        """Do something, while a script stands for the program that commits the rules of the second family."""
        self.write(self.second, text)
        with patch.object(iptables, "_SYSTEM_PATH", f"{self.programs}:{SBIN}"):
            act()

    @property
    def second(self) -> str:
        return f"{self.backend.replace('ip', 'ip6', 1)}-restore"

    def write(self, program: str, text: str) -> None:
        script = self.programs / program
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)

    def failing(self, program: str, number: int) -> str:
        """A script that does what a program does, but for one of its calls, from 1."""
        calls = self.programs / f"{program}.calls"
        fail = f"[ $(wc -l < {calls}) -eq {number} ] && {{ {FAIL}; }}"
        return f'echo >> {calls}\n{fail}\nexec {shutil.which(program, path=SBIN)} "$@"'

    def killed(self, act: Callable[[], None]) -> None:
        pid = os.fork()
        if not pid:
            try:
                self.with_second(KILL, act)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def settle(self) -> None:
        self.orch.teardown("nobody", self.netns)
        assert not self.orch.status().unsettled


@pytest.fixture(params=[Backend.IPTABLES_LEGACY, Backend.IPTABLES_NFT], ids=str)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    state = tmp_path / "state"
    with named_netns() as name:
        yield Place(Harness(kernel_system(state), state), name, request.param, tmp_path)


@pytest.mark.slow
def test_a_kill_between_two_families_is_settled(place: Place) -> None:
    place.killed(lambda: place.apply(ONE))
    assert "# ip\n" in place.listing(), "killed too early to be half-done"
    assert "# ip6\n" not in place.listing()
    place.settle()
    assert place.listing() == ""
    place.apply(ONE)
    one = place.listing()
    place.killed(lambda: place.apply(TWO))
    assert place.listing() not in ("", one)
    place.settle()
    assert place.listing() == one
    place.killed(place.teardown)
    assert place.listing() not in ("", one)
    place.settle()
    assert place.listing() == ""


def test_a_failure_between_two_families_leaves_what_was_before(place: Place) -> None:
    with pytest.raises(KernelError, match="cannot load rules"):
        place.with_second(FAIL, lambda: place.apply(ONE))
    assert place.listing() == ""
    place.apply(ONE)
    one = place.listing()
    with pytest.raises(KernelError, match="cannot load rules"):
        place.with_second(FAIL, lambda: place.apply(TWO))
    assert place.listing() == one
    assert not place.orch.status().unsettled


def test_what_could_not_be_put_back_at_once_is_undone_like_a_step_that_was_taken(place: Place) -> None:
    place.apply(ONE)
    one = place.listing()
    first = f"{place.backend}-restore"
    place.write(first, place.failing(first, 2))
    with pytest.raises(HalfDoneError, match="cannot load rules orch-half") as caught:
        place.with_second(place.failing(place.second, 1), lambda: place.apply(TWO))
    assert "could not be put back" in caught.value.cause
    assert place.listing() == one
    assert not place.orch.status().unsettled


def test_the_way_back_moves_no_jump(place: Place) -> None:
    """Behind a rule of others that accepts nothing would be attached any more, and nobody would tell."""
    place.apply(ONE)
    programs = [program for program in NEEDED if program == place.backend]
    programs += [program.replace("ip", "ip6", 1) for program in programs]
    for program in programs:
        place.foreign(program)
    before = [place.saved(program) for program in programs]
    with pytest.raises(KernelError, match="cannot load rules"):
        place.with_second(FAIL, lambda: place.apply(TWO))
    assert [place.saved(program) for program in programs] == before
    place.killed(lambda: place.apply(TWO))
    assert [place.saved(program) for program in programs] != before
    place.settle()
    assert [place.saved(program) for program in programs] == before
