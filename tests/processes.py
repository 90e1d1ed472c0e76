"""Builders for tests of native helper processes: what to launch, and who launches it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from subprocess import Popen

from orchestrator.kernel.clock import MonotonicClock
from orchestrator.kernel.netns import entered
from orchestrator.model import HELPER_PROGRAM, Netns, ProcessSpec, Restart
from orchestrator.ports import Launch
from orchestrator.supervise.launcher import LocalProcesses
from orchestrator.supervise.traces import is_stopped
from tests.waiting import until

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
user = ""
memory_bytes = 134217728

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


def launch(netns: Netns, text: str = DOCUMENT, *, profile: str = PROFILE, source: str = "") -> Launch:
    """A helper process that is told `text`, beside `source` if that is a helper of somebody's own."""
    document = f"helper-{NAME}.toml"
    files = {document: text} | ({f"helper-{NAME}.py": source} if source else {})
    spec = ProcessSpec(NAME, (HELPER_PROGRAM, document), tuple(files), (QUEUE,), (), restart=Restart.NEVER)
    return Launch(profile, netns, spec, files, "digest")


def own_document(source: str = OWN_HELPER) -> str:
    """The document of a helper of somebody's own."""
    digest = sha256(source.encode()).hexdigest()
    return DOCUMENT.replace('file = ""', 'file = "/own.py"').replace('sha256 = ""', f'sha256 = "{digest}"')


@contextmanager
def local_processes(state_dir: Path) -> Iterator[LocalProcesses]:
    """The launcher of this machine; what it started is gone afterwards."""
    processes = LocalProcesses(
        state_dir=state_dir,
        clock=MonotonicClock(),
        encode_disable=lambda _key: b"",
        encode_enable=lambda _key: b"",
        entered=entered,
    )
    try:
        yield processes
    finally:
        for process in processes.running():
            processes.stop(process)


@contextmanager
def unsupervised(processes: LocalProcesses, profile: str, netns: Netns) -> Iterator[None]:
    """The supervisor of a profile sees nothing until the block ends: a process may be stopped for as long."""
    pids = processes.supervisors(profile, netns.identity)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: all(map(is_stopped, pids)), "its supervisor is stopped")
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def begun(child: Popen[bytes]) -> Popen[bytes]:
    """A process that has its environment: Popen comes back a moment before."""
    environment = Path(f"/proc/{child.pid}/environ")
    until(lambda: environment.read_bytes() != b"", "it has its environment")
    return child


def wait_for(processes: LocalProcesses, condition: Callable[[], bool], within_s: float = 30) -> None:
    deadline = processes.clock.monotonic() + within_s
    while not condition():
        assert processes.clock.monotonic() < deadline
        processes.clock.sleep(0.01)
