"""Leave this process only the system calls that a filter lets through: seccomp(2), for every thread and for good.

The filters are made by orch (supervise/filters.py), as a helper process has the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
from struct import Struct

LOADING_FILTER = "loading.bpf"
"""In the runtime directory: what is in force while the code of a helper is loaded."""

SERVING_FILTER = "serving.bpf"
"""In the runtime directory: what is in force, on top of that, as long as it serves."""

PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1
_INSTRUCTION_LEN = 8  # struct sock_filter
_INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS
_NUMBER = Struct("=I")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class FilterError(OSError):
    """A filter that is not in force; whoever gets this must end."""


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def encode(number: int, instructions: bytes) -> bytes:
    """A filter as `load` takes it: `number` is that of the system call seccomp on this machine."""
    return _NUMBER.pack(number) + instructions


def load(program: bytes) -> None:
    """Put a filter in force; those that are there already stay. Raises FilterError: then it is not in force."""
    instructions = program[_NUMBER.size :]
    count, rest = divmod(len(instructions), _INSTRUCTION_LEN)
    if rest or not 0 < count <= _INSTRUCTIONS_MAX:
        raise FilterError(f"not a filter of system calls: {len(program)} bytes")
    (number,) = _NUMBER.unpack_from(program)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if _libc.prctl(PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) < 0:
        raise FilterError(f"cannot refuse new privileges: {os.strerror(ctypes.get_errno())}")
    wanted = _Program(count, instructions)
    done = _libc.syscall(
        ctypes.c_long(number), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(_FLAG_TSYNC), ctypes.byref(wanted)
    )
    if done < 0:
        raise FilterError(f"cannot filter system calls: {os.strerror(ctypes.get_errno())}")
    if done > 0:
        raise FilterError(f"cannot filter system calls: thread {done} has filters of its own")
