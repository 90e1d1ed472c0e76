"""Where trials live, and what is left of those that were killed.

The directory of a trial is locked as long as it lives, and its registrations have the name of the directory in theirs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

from orchestrator.app import boot_id, kernel_system
from orchestrator.errors import KernelError, OrchError
from orchestrator.journal import Ledger
from orchestrator.model import HelperKey
from orchestrator.observe import Observer
from orchestrator.ports import System
from orchestrator.release import stays_for

RUNTIME = Path("/run")  # sockets are made in it, whose path may have 107 bytes: $TMPDIR can be longer
_NAME = "orch-verify-"
_REGISTERED = re.compile(r"v([0-9a-f]{8})-\d+")
_REMOVER = "orch verify"
_RELEASED_WITHIN_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """The state directory of a trial, and how the names of its registrations begin."""

    state_dir: Path
    prefix: str


@contextlib.contextmanager
def place(host: Path) -> Iterator[Place]:
    """A new one; the directory is gone after the block, unless something is registered still of which it knows.

    Its lock is that of `host`, the state directory of all others: registrations are the host's.
    """
    token = secrets.token_hex(4)
    path = RUNTIME / f"{_NAME}{token}"
    hidden = RUNTIME / f".{path.name}"  # until it is locked nobody must take it for one that was left behind
    hidden.mkdir(mode=0o700)
    host.mkdir(mode=0o755, parents=True, exist_ok=True)
    (hidden / "lock").symlink_to(host / "lock")
    try:
        with _locked(hidden):
            hidden.rename(path)
            yield Place(path, f"v{token}")
    finally:
        if not _knows_of_something(path):
            shutil.rmtree(path, ignore_errors=True)


def _knows_of_something(path: Path) -> bool:
    try:
        with closing(Ledger.open(path, boot_id=boot_id(), create=False)) as ledger:
            return bool(ledger.recorded())
    except OrchError:
        return False


def abandoned(registered: Iterable[HelperKey]) -> dict[str, tuple[HelperKey, ...]]:
    """Trials that were killed, by the name of their directory, with those of the registrations that are theirs."""
    found: dict[str, tuple[HelperKey, ...]] = {path.name: () for path in RUNTIME.glob(f"{_NAME}*")}
    for key in registered:
        if match := _REGISTERED.fullmatch(key.name):
            name = f"{_NAME}{match[1]}"
            found[name] = (*found.get(name, ()), key)
    return {name: keys for name, keys in sorted(found.items()) if not _is_alive(RUNTIME / name)}


def is_of_trial(key: HelperKey) -> bool:
    """Whether a registration is one of a trial, to judge by its name."""
    return _REGISTERED.fullmatch(key.name) is not None


def remove_abandoned(
    alone: AbstractContextManager[object], system_of: Callable[[Path], System] = kernel_system
) -> Mapping[str, str]:
    """Take away what killed trials left: why something of each stays, empty if nothing does, by the trial's name.

    What stays is in nobody's way, and is tried again the next time. `alone` is entered if there is anything to do, and
    keeps others from work; `system_of` gives the adapters for a state directory. Raises OrchError if the host cannot be
    looked at.
    """
    reasons: dict[str, str] = {}
    found = abandoned(registration.key for registration in system_of(RUNTIME).registry.dump())
    with alone if found else contextlib.nullcontext():
        for name, keys in found.items():
            with _locked(RUNTIME / name) as is_mine:
                if is_mine:
                    reasons[name] = _try_to_remove(system_of(RUNTIME / name), RUNTIME / name, keys)
    return reasons


def _try_to_remove(system: System, state_dir: Path, keys: tuple[HelperKey, ...]) -> str:
    try:
        return "; ".join(_remove(system, state_dir, keys))
    except (OrchError, OSError) as error:
        return str(error)


def _remove(system: System, state_dir: Path, keys: tuple[HelperKey, ...]) -> tuple[str, ...]:
    """Its processes first: the namespaces, and the rules in them, are there for as long as those are.

    Why registrations stay; the ledger that knows of them does so, too.
    """
    with closing(Ledger.open(state_dir, boot_id=boot_id(), create=False)) as ledger:
        owners, recorded = ledger.owners(), ledger.recorded()
        for process in system.processes.running():
            system.processes.stop(process)
        for owner in owners:
            system.processes.cleanup(owner.profile, owner.netns)
        deadline = system.clock.monotonic() + _RELEASED_WITHIN_S
        mine = [r.key for r in system.registry.dump() if r.key in {*keys, *recorded}]
        # Those that rules may attach come first: after one that is not let go of, others would make its rules idle.
        mine.sort(key=lambda key: (not is_of_trial(key), key))
        places = Observer(system, ledger).would_idle(*owners) if mine else ()
        reasons = [stays_for(mine[0], places, until=_REMOVER)] if places else []
        while mine and not reasons:
            reasons += filter(None, [_delete(system, mine.pop(0), deadline)])
    if not reasons:
        shutil.rmtree(state_dir, ignore_errors=True)
    return tuple(reasons)


def _delete(system: System, key: HelperKey, deadline: float) -> str:
    """Why it stays, if it does.

    The kernel takes a namespace apart, and with it rules that refer, some time after its last process has ended.
    """
    while True:
        try:
            system.registry.delete(key)
        except KernelError as error:
            if error.errno == errno.ENOENT:  # its supervisor was faster
                return ""
            if error.errno != errno.EBUSY or system.clock.monotonic() > deadline:
                return str(error)
            system.clock.sleep(_POLL_S)
        else:
            return ""


def _is_alive(path: Path) -> bool:
    if not path.exists():
        return False
    with _locked(path) as is_mine:
        return not is_mine


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a directory; false if another process does. One that is not there is nobody's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)
