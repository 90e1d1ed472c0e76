"""Builders for tests of native helper processes: what to launch, and who launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.host import KernelHost
from orchestrator.kernel.netns import entered
from orchestrator.model import HELPER_PROGRAM, Netns, ProcessSpec
from orchestrator.ports import Launch
from orchestrator.supervise.launcher import LocalProcesses

PROFILE = "unit"
NAME = "tftp"
QUEUE = 20000
DOCUMENT = f"""\
name = "{NAME}"
use = "tftp"
file = ""
sha256 = ""
queueing = "rules"
inspect = "payload"
names = ["tftp-us"]
queues = [{QUEUE}]
label = 70
user = "nobody"

[bounds]
ports = "1024-65535"
source = "peer"
destination = "master"
permanent = false
"""

OWN_HELPER = """
import os
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves

class Own(Helper):
    serves = (Serves(L4.UDP, (69,)),)
    policies = (Policy("own", 1, 30),)
    if os.geteuid() == 0 or os.access("/etc/shadow", os.R_OK):
        raise RuntimeError("has privileges")

    def inspect(self, payload, direction, flow, private):
        return NOTHING
"""


def launch(netns: Netns, text: str = DOCUMENT, *, profile: str = PROFILE) -> Launch:
    document = f"helper-{NAME}.toml"
    spec = ProcessSpec(NAME, (HELPER_PROGRAM, document), (document,), (QUEUE,), ())
    return Launch(profile, netns, spec, {document: text}, "digest")


def own_file(directory: Path, source: str = OWN_HELPER) -> tuple[Path, str]:
    """A helper file of somebody's own, and the document that names it."""
    file = directory / "own.py"
    file.write_text(source)
    digest = sha256(source.encode()).hexdigest()
    return file, DOCUMENT.replace('file = ""', f'file = "{file}"').replace('sha256 = ""', f'sha256 = "{digest}"')


@contextmanager
def local_processes(state_dir: Path) -> Iterator[LocalProcesses]:
    """The launcher of this machine; what it started is gone afterwards."""
    processes = LocalProcesses(
        state_dir=state_dir,
        clock=MonotonicClock(),
        encode_disable=lambda _key: b"",
        entered=entered,
        queues=KernelHost().queues,
    )
    try:
        yield processes
    finally:
        for process in processes.running():
            processes.stop(process)


def wait_for(processes: LocalProcesses, condition: Callable[[], bool], within_s: float = 30) -> None:
    deadline = processes.clock.monotonic() + within_s
    while not condition():
        assert processes.clock.monotonic() < deadline
        processes.clock.sleep(0.01)
