"""What `orch verify` leaves when it is killed: found by the lock that nobody holds any more."""

from __future__ import annotations

import errno
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from orchestrator.errors import KernelError
from orchestrator.fake import FakeKernel
from orchestrator.journal import Ledger
from orchestrator.kernel.clock import MonotonicClock
from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, Registration, Status
from orchestrator.verify import trials

HOLDING = """
import sys
from pathlib import Path
from orchestrator.verify import trials
trials.RUNTIME = Path(sys.argv[1])
with trials.place(Path(sys.argv[2])) as place:
    print(place.prefix, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setattr(trials, "RUNTIME", path)
    return path


@pytest.fixture
def host(tmp_path: Path) -> Path:
    return tmp_path / "state"


def key(name: str) -> HelperKey:
    return HelperKey(name, L3Proto.IP, L4Proto.TCP)


def test_one_that_lives_is_let_be_and_leaves_nothing(runtime: Path, host: Path) -> None:
    with trials.place(host) as place:
        registered = key(f"{place.prefix}-0")
        assert trials.is_of_trial(registered)
        assert [path.name for path in runtime.iterdir()] == [place.state_dir.name]
        assert trials.abandoned([registered]) == {}
    assert not list(runtime.iterdir())
    assert trials.abandoned([registered]) == {place.state_dir.name: (registered,)}


def test_one_that_was_killed_is_found(runtime: Path, host: Path) -> None:
    argv = [sys.executable, "-c", HOLDING, str(runtime), str(host)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        prefix = child.stdout.readline().strip()
        assert trials.abandoned([key(f"{prefix}-0")]) == {}
        child.kill()
    others = [key(name) for name in ("ftp-us", "v1-2", f"{prefix}-x", f"x{prefix}-1")]
    mine = (key(f"{prefix}-0"), key(f"{prefix}-1"))
    assert trials.abandoned([*others, *mine]) == {f"orch-verify-{prefix[1:]}": mine}
    assert not any(map(trials.is_of_trial, others))


def opened(state_dir: Path) -> Ledger:
    return Ledger.open(state_dir, boot_id="boot", create=True)


def test_nobody_else_changes_registrations_while_one_is_at_work(runtime: Path, host: Path) -> None:
    everybody = opened(host)
    with closing(everybody), trials.place(host) as place, closing(opened(place.state_dir)) as ledger:
        with ledger.locked("apply", wait_s=0, clock=MonotonicClock()):
            assert everybody.is_locked()
        assert not everybody.is_locked()
    assert host.is_dir()


def registration(name: str) -> Registration:
    policy = Policy("p", expect_max=1, expect_timeout_s=1)
    return Registration(key(name), 7, Status.DISABLED, (policy,), 0)


def test_what_resists_keeps_nobody_from_anything_and_is_tried_again(runtime: Path) -> None:
    """Rules of somebody else may name it: the kernel would not let it go."""
    busy, idle = (key(f"v{number:08x}-0") for number in (1, 2))
    kernel = FakeKernel(registrations={each: registration(each.name) for each in (busy, idle)})
    directories = [runtime / f"orch-verify-{each.name[1:9]}" for each in (busy, idle)]
    for directory in directories:
        directory.mkdir()

    def refuse(operation: str, name: str) -> None:
        if name == str(busy):
            raise KernelError(operation, name, errno.EBUSY)

    kernel.on_modify = refuse
    reasons = trials.remove_abandoned(nullcontext(), lambda _: kernel.system())
    assert list(reasons.values()) == [f"cannot unregister helper {busy}: rules still refer to it", ""]
    assert (list(kernel.registrations), [d.exists() for d in directories]) == ([busy], [True, False])
    kernel.on_modify = None
    assert list(trials.remove_abandoned(nullcontext(), lambda _: kernel.system()).values()) == [""]
    assert (kernel.registrations, list(runtime.iterdir())) == ({}, [])
