"""Network namespaces: found by name or path, entered and left again."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from struct import Struct

from orchestrator.errors import PreflightError
from orchestrator.kernel.pyroute import setns
from orchestrator.model import Netns

_NAMED = (Path("/run/netns"), Path("/var/run/netns"))
_OWN = "/proc/thread-self/ns/net"  # not /proc/self: a thread may be somewhere else than the process
_INIT = "/proc/1/ns/net"
_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71
_COOKIE = Struct("=q")
_MAKING = "make a network namespace"
# The host is short of something, or broken: that says nothing of a namespace, and least that it is gone.
_UNTELLING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def find(name: str) -> Netns:
    """Resolve a name of `ip netns`, a path, or "" for the caller's own; raises PreflightError if there is none."""
    if not name:
        return own()
    path = Path(os.path.abspath(name)) if "/" in name else _named_path(name)  # noqa: PTH100 (keeps symbolic links)
    identity = _identity_of(path)
    if not identity:
        raise _missing(name, path)
    if identity == _own_identity():
        return own()
    return Netns(label=_label(identity, default=name), path=str(path), identity=identity)


def own() -> Netns:
    """The namespace that orch runs in: labelled with its name, else `host` if it is that of process 1, else `self`.

    Its path leads there from elsewhere too, and is empty only for one that has no name and is not that of process 1.
    """
    identity = _own_identity()
    init = _INIT if identity == _identity_of(Path(_INIT)) else ""
    path = str(_named().get(identity, init))
    return Netns(label=_label(identity, default="self"), path=path, identity=identity)


def known() -> tuple[Netns, ...]:
    """The namespaces of the caller and of process 1, and all named ones, each once; other files are left out."""
    here = own()
    found = {identity: Netns(path.name, str(path), identity) for identity, path in _named().items()}
    if init := _identity_of(Path(_INIT)):
        found.setdefault(init, Netns("host", _INIT, init))
    found.pop(here.identity, None)
    return (here, *sorted(found.values(), key=lambda netns: netns.label))


def inhabited_path(identity: str) -> str:
    """The path of a namespace by a process that lives in it, whoever's; empty if none can be seen."""
    paths = (Path(f"/proc/{pid}/ns/net") for pid in os.listdir("/proc") if pid.isdigit())  # noqa: PTH208
    return next((str(path) for path in paths if _identity_of(path) == identity), "")


@contextmanager
def entered(netns: Netns) -> Iterator[None]:
    """Run a block with this thread inside a namespace, and come back whatever happens; sockets stay where they opened.

    Raises PreflightError if the namespace is gone, was replaced since it was found, or may not be entered, and OSError
    if the host cannot tell now.
    """
    if netns.identity == _own_identity():
        yield
        return
    there, what = _open(netns), _entering(netns)
    try:
        with _away(what, partial(_go, there, what)):
            yield
    finally:
        os.close(there)


def enter(netns: Netns) -> None:
    """Move this thread into a namespace, to stay there. Raises PreflightError as `entered` does."""
    if netns.identity == _own_identity():
        return
    there = _open(netns)
    try:
        _go(there, _entering(netns))
    finally:
        os.close(there)


def cookie(netns: Netns) -> int:
    """A number that no other namespace has between two boots, while an inode is given to another one.

    Raises PreflightError as `entered` does. Source: net/core/net_namespace.c, setup_net; SO_NETNS_COOKIE.
    """
    with entered(netns), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        (number,) = _COOKIE.unpack(there.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, _COOKIE.size))
        return int(number)


@contextmanager
def scratch() -> Iterator[None]:
    """Run a block in a namespace made for it, which nobody else sees and which ends with it (and its sockets)."""
    with _away(_MAKING, _unshare):
        yield


@contextmanager
def _away(what: str, go: Callable[[], None]) -> Iterator[None]:
    """Run a block where `go` takes this thread, and bring it back. PreflightError, of `what`, where it could not be."""
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _go(home, what)  # root of a user namespace may go where it may not return from
        go()
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # pyroute2 makes named namespaces only; os.unshare came with Python 3.12
    if libc.unshare(_CLONE_NEWNET) != 0:
        cause = f"{errno.errorcode[ctypes.get_errno()]}, unshare"
        raise PreflightError(f"cannot {_MAKING}", hint="run as root", cause=cause)


def _open(netns: Netns) -> int:
    try:
        descriptor = os.open(netns.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _UNTELLING:
            raise
        raise _missing(netns.label, Path(netns.path)) from error
    if _identity(os.fstat(descriptor)) != netns.identity:
        os.close(descriptor)
        raise PreflightError(f"network namespace {netns} was replaced by another of that name", where=netns.path)
    return descriptor


def _entering(netns: Netns) -> str:
    return f"enter network namespace {netns}"


def _go(descriptor: int, what: str) -> None:
    """By descriptor: given a path, pyroute2 makes a namespace where there is none."""
    try:
        setns(descriptor)
    except OSError as error:
        if error.errno in _UNTELLING:
            raise
        number = error.errno or 0
        hint = "it is a namespace of another kind" if number == errno.EINVAL else "run as root"
        cause = f"{errno.errorcode.get(number, number)}, setns"
        raise PreflightError(f"cannot {what}", hint=hint, cause=cause) from error


def _missing(name: str, path: Path) -> PreflightError:
    if path.exists():
        return PreflightError(f"{path} is not a network namespace", hint="a stale file goes with: ip netns delete")
    return PreflightError(f"there is no network namespace {name}", where=str(path), hint="ip netns list shows them")


def _label(identity: str, *, default: str) -> str:
    path = _named().get(identity)
    if path is not None:
        return path.name
    return "host" if identity == _identity_of(Path(_INIT)) else default


def _named() -> dict[str, Path]:
    """The named namespaces by identity; of several names for one, that which sorts first."""
    paths = [path for directory in _NAMED if directory.is_dir() for path in sorted(directory.iterdir())]
    return {identity: path for path in reversed(paths) if (identity := _identity_of(path))}


def _named_path(name: str) -> Path:
    paths = [directory / name for directory in _NAMED]
    return next((path for path in paths if path.exists()), paths[0])


def _own_identity() -> str:
    return _identity(Path(_OWN).stat())


def _identity_of(path: Path) -> str:
    """Identity of the namespace a file stands for; empty if there is no such file or it is not a namespace.

    All namespaces of all kinds are inodes of one file system, and nothing else is. Source: fs/nsfs.c.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in _UNTELLING:
            raise
        return ""
    return _identity(status) if status.st_dev == Path(_OWN).stat().st_dev else ""


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"
