"""`orch run`: a profile for as long as the command runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

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

_OWN_NETNS = "/proc/self/ns/net"


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
    from orchestrator.app import local_processes
    from orchestrator.kernel import netns as namespaces
    from orchestrator.supervise import foreground, launcher, supervisor

    new_session("run", is_json=False, colour=Colour.NEVER, verbose=verbose, is_quiet=is_quiet)
    if profile == "-":
        raise UsageError("orch run takes a file", hint="it reads the profile again when it is to apply it again")
    state_dir = state_dir.resolve()
    desired = load(profile)
    there = namespaces.find(netns or desired.netns or "")
    namespaces.enter(there)
    # The commands run in this namespace, and name it so: its name may belong to another one by then.
    common = ["--netns", _OWN_NETNS, "--state-dir", str(state_dir), "--wait", f"{wait_s:g}", "--yes"]
    common += ["--templates", str(templates.resolve())] if templates else []
    common += ["-q"] * is_quiet + ["-v"] * verbose
    orch = [sys.executable, "-P", "-m", "orchestrator"]
    contract = {
        "profile": desired.profile,
        "directory": str(local_processes(state_dir).take_over(desired.profile, there)),
        "state_dir": str(state_dir),
        "apply": [*orch, "apply", str(Path(profile).resolve()), *common],
        "teardown": [*orch, "teardown", desired.profile, *common],
    }
    mark = {supervisor.MARK: launcher.supervisor_mark(state_dir, desired.profile)}
    argv = [sys.executable, "-I", "-S", foreground.__file__, json.dumps(contract)]
    os.execve(sys.executable, argv, os.environ | mark)
