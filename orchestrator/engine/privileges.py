"""Give up what a helper process does not need: it becomes another user, for good.

Source of the rules: capabilities(7) and prctl(2); the numbers are those of linux/prctl.h and linux/capability.h.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
from dataclasses import dataclass

NET_ADMIN = 1 << 12
"""The capability to bind queues and to talk to conntrack, as a mask."""

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
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


def drop(user: User, *, mask: int) -> None:
    """Become `user` with the capabilities in `mask` (a bit each) and no other, no group but its own, no core dump.

    There is no way back: nothing that is executed later gets more. Files that are open stay open. Raises PrivilegeError
    with what failed, and then anything between root and `user` may be true. Needs root.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for capability in range(_CAPABILITY_MAX + 1):
        if _prctl("read the bounding set", _PR_CAPBSET_READ, capability, is_question=True) < 0:
            break  # above the last that this kernel knows
        _prctl("narrow the bounding set", _PR_CAPBSET_DROP, capability)
    _prctl("keep capabilities", _PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become user {user.name}: {error.strerror}") from error
    _capset(mask)
    _prctl("forget keeping capabilities", _PR_SET_KEEPCAPS, 0)
    _prctl("clear ambient capabilities", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl("refuse new privileges", _PR_SET_NO_NEW_PRIVS, 1)


def end_with_parent(signal_number: int) -> None:
    """Get this signal when the parent ends; `drop` undoes it, so it comes after. Raises PrivilegeError."""
    _prctl("be told of the parent's end", _PR_SET_PDEATHSIG, signal_number)


def _capset(mask: int) -> None:
    """Set permitted and effective to `mask`, inheritable to nothing; the kernel takes 64 bits in two halves."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    low = mask & 0xFFFFFFFF
    data = (_Data * 2)(_Data(low, low, 0), _Data(mask >> 32, mask >> 32, 0))
    if _libc.capset(ctypes.byref(header), data) < 0:
        _raise("set capabilities")


def _prctl(what: str, option: int, value: int, *, is_question: bool = False) -> int:
    # Arguments of a variadic function: without c_ulong they would be passed as int, the upper half undefined.
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero)
    if result < 0 and not is_question:
        _raise(what)
    return result


def _raise(what: str) -> None:
    raise PrivilegeError(f"cannot {what}: {os.strerror(ctypes.get_errno())}")
