"""Give up what a helper process does not need: it becomes another user with limits, for good.

Source of the rules: capabilities(7), user_namespaces(7) and prctl(2); the numbers are those of linux/prctl.h and
linux/capability.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import resource
import signal
from dataclasses import dataclass
from zlib import crc32

from orchestrator.engine import seccomp

NET_ADMIN = 1 << 12
"""The capability to bind queues and to talk to conntrack, as a mask."""

MEMORY_BYTES = 128 << 20
"""What a process may have of memory, unless told otherwise: address space, and data of its own."""

TRIAL_MEMORY_BYTES = 1 << 30
"""What code has that is only tried: a helper that is described, or replayed with a whole capture in memory."""

FILE_BYTES = 1 << 20
"""What a process may write into any file; its log is one."""

_OPEN_FILES = 64
_OWN_USERS = 0x70000000  # up to 0x7fffffff: nobody gives these out, says systemd's list of users and groups (UIDS-GIDS)
_OWN_USERS_MASK = 0x0FFFFFFF

_M_ARENA_MAX = -8  # malloc.h

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_MAX = 63


class PrivilegeError(OSError):
    """A privilege that could not be given up; whoever gets this must end."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class User:
    """Whom a process becomes."""

    name: str
    uid: int
    gid: int


def find_user(name: str) -> User:
    """The user of a name. Raises PrivilegeError if there is none, or if it is root."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise PrivilegeError(f"there is no user {name!r}") from None
    if entry.pw_uid == 0:
        raise PrivilegeError(f"user {name!r} is root")
    return User(name, entry.pw_uid, entry.pw_gid)


def own_user(directory: str, name: str) -> User:
    """A user for one process alone, always the same one: it has no entry in passwd, no file, and nobody else is it."""
    number = _OWN_USERS | crc32(os.fsencode(directory) + b"\0" + os.fsencode(name)) & _OWN_USERS_MASK
    return User(str(number), number, number)


def confine_trial(program: bytes) -> None:
    """Let this process try code of others: no privilege, limits, and the system calls of a filter, for good.

    Root becomes a user of its own, or nobody in a user namespace that has few users. In one that has no other, root is
    who made it, and loses its capabilities. Ended with its parent, for the code may never come back. Raises
    PrivilegeError, FilterError.
    """
    if os.geteuid() == 0:
        own = own_user("", str(os.getpid()))
        user = own if _is_mapped(own.uid) else find_user("nobody")
        if _is_mapped(user.uid):
            drop(user, mask=0)
        else:
            _capset(0, inheritable=0)
    end_with_parent(signal.SIGKILL)
    limit(TRIAL_MEMORY_BYTES)
    seccomp.load(program)


def drop(user: User, *, mask: int, is_inherited: bool = False) -> None:
    """Become `user` with the capabilities in `mask` (a bit each) and no other, no group but its own, no core dump.

    There is no way back: nothing that is executed later gets more, and gets those in `mask` only if `is_inherited`.
    Files that are open stay open. Raises PrivilegeError with what failed, and then anything between root and `user` may
    be true. Needs root.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for capability in range(_CAPABILITY_MAX + 1):
        if _prctl("read the bounding set", _PR_CAPBSET_READ, capability, is_question=True) < 0:
            break  # above the last that this kernel knows
        if not (is_inherited and mask >> capability & 1):  # nothing is inherited that is not in this set
            _prctl("narrow the bounding set", _PR_CAPBSET_DROP, capability)
    _prctl("keep capabilities", _PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become user {user.name}: {_told(error)}") from error
    _capset(mask, inheritable=mask if is_inherited else 0)
    _prctl("forget keeping capabilities", _PR_SET_KEEPCAPS, 0)
    _prctl("clear ambient capabilities", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if is_inherited:
        for capability in range(_CAPABILITY_MAX + 1):
            if mask >> capability & 1:
                _prctl("pass a capability on", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)
    _prctl("refuse new privileges", seccomp.PR_SET_NO_NEW_PRIVS, 1)


def limit(memory_bytes: int = MEMORY_BYTES, *, file_bytes: int = FILE_BYTES) -> None:
    """Limit memory, the size of files that are written, and the number of those that are open. Raises PrivilegeError.

    Shared memory counts as address space alone, hence both. Python ignores SIGXFSZ: writing more fails with EFBIG.
    """
    _libc.mallopt(_M_ARENA_MAX, 1)  # a second one for a thread would reserve 64 MiB of address space
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_DATA, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def start_no_more() -> None:
    """From now on this user starts neither thread nor process here. Raises PrivilegeError."""
    _limit(resource.RLIMIT_NPROC, 0)


def _limit(which: int, most: int) -> None:
    """Set a limit, or keep a lower one that is there already."""
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(which, (most, most))
    except (OSError, ValueError) as error:
        raise PrivilegeError(f"cannot set a limit: {error}") from error


def _told(error: OSError) -> str:
    if error.errno != errno.EINVAL:
        return str(error.strerror)
    return "this user namespace has no such user; let /proc/self/uid_map have it, or set process: {user: ...}"


def _is_mapped(uid: int) -> bool:
    """Whether this user namespace has a user of that number."""
    with open("/proc/self/uid_map", encoding="ascii") as file:  # noqa: PTH123 (a helper process imports no pathlib)
        return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, file))


def end_with_parent(signal_number: int) -> None:
    """Get this signal when the parent ends; `drop` undoes it, so it comes after. Raises PrivilegeError."""
    _prctl("be told of the parent's end", _PR_SET_PDEATHSIG, signal_number)


def _capset(mask: int, *, inheritable: int) -> None:
    """Set permitted and effective to `mask`; the kernel takes 64 bits in two halves."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (_Data * 2)(_Data(low, low, inheritable & 0xFFFFFFFF), _Data(high, high, inheritable >> 32))
    if _libc.capset(ctypes.byref(header), data) < 0:
        _raise("set capabilities")


def _prctl(what: str, option: int, value: int, further: int = 0, *, is_question: bool = False) -> int:
    # Arguments of a variadic function: without c_ulong they would be passed as int, the upper half undefined.
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(further), zero, zero)
    if result < 0 and not is_question:
        _raise(what)
    return result


def _raise(what: str) -> None:
    raise PrivilegeError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")
