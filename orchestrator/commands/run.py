"""`orch run`: a profile for as long as the command runs."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UsageError
from orchestrator.session import (
    DEFAULT_STATE,
    Colour,
    ExitCode,
    NetnsOption,
    ProfileArgument,
    QuietOption,
    StateOption,
    TemplatesOption,
    VerboseOption,
    WaitOption,
    load,
    new_session,
)

if TYPE_CHECKING:
    from orchestrator.model import Netns


def run(
    profile: ProfileArgument,
    netns: NetnsOption = None,
    wait_s: WaitOption = 10.0,
    templates: TemplatesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Apply a profile, keep its processes running in the foreground, and tear it down at the end."""
    from orchestrator.kernel import netns as namespaces
    from orchestrator.supervise import errands, foreground, launcher, place, supervisor

    new_session("run", is_json=False, colour=Colour.NEVER, verbose=verbose, is_quiet=is_quiet)
    if profile == "-":
        raise UsageError("orch run takes a file", hint="it reads the profile again when it is to apply it again")
    state_dir = state_dir.resolve()
    desired = load(profile)
    there = namespaces.find(netns or desired.netns or "")
    namespaces.enter(there)
    common = ["--wait", f"{wait_s:g}", "--yes"]
    common += ["--templates", str(templates.resolve())] if templates else []
    common += ["-q"] * is_quiet + ["-v"] * verbose
    contract = {
        "profile": desired.profile,
        "directory": str(_take_over(state_dir, desired.profile, there, wait_s)),
        "state_dir": str(state_dir),
        "apply": errands.orch(
            "apply", str(Path(profile).resolve()), "--confirm-within", "0", *common, state_dir=str(state_dir)
        ),
        "teardown": errands.orch("teardown", desired.profile, *common, state_dir=str(state_dir)),
    }
    mark = {supervisor.MARK: launcher.supervisor_mark(state_dir, desired.profile), place.VARIABLE: there.path}
    argv = [sys.executable, "-I", "-S", foreground.__file__, json.dumps(contract)]
    os.execve(sys.executable, argv, os.environ | mark)


def _take_over(state_dir: Path, profile: str, netns: Netns, wait_s: float) -> Path:
    """The runtime directory; standard input is the socket of the supervisor from now on. The lock is free again."""
    from orchestrator.app import boot_id, local_processes
    from orchestrator.journal import Ledger

    processes = local_processes(state_dir)
    with (
        closing(Ledger.open(state_dir, boot_id=boot_id(), create=True)) as ledger,
        ledger.locked(f"run {profile}", wait_s=wait_s, clock=processes.clock),
    ):
        directory, listener = processes.take_over(profile, netns)
    os.dup2(listener.fileno(), 0)
    return directory
