"""Which system calls the code of a helper may make, as programs for the kernel (seccomp) made by libseccomp.

There are two: `loading` while its code is loaded, and `serving`, on top, from its first packet on. What neither lists
fails with EPERM.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import platform
import signal
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from orchestrator.engine import seccomp
from orchestrator.engine.seccomp import LOADING_FILTER, SERVING_FILTER
from orchestrator.errors import PreflightError

_ANY = (
    # memory
    *("brk", "madvise", "mremap", "munmap"),
    # threads, and what the C library asks by itself
    *("exit", "exit_group", "futex", "futex_time64", "get_robust_list", "getpid", "gettid", "membarrier"),
    *("restart_syscall", "rseq", "sched_yield", "set_robust_list"),
    *("getegid", "geteuid", "getgid", "getrandom", "getuid", "uname"),
    # signals
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigtimedwait_time64"),
    *("sigaltstack", "sigreturn"),
    # time
    *("clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64", "clock_nanosleep"),
    *("clock_nanosleep_time64", "gettimeofday", "nanosleep", "time"),
    # what is open
    *("close", "fstat", "fstat64", "lseek", "_llseek", "pread64", "pwrite64", "read", "readv", "write", "writev"),
    *("getsockopt", "recv", "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg", "send", "sendto", "setsockopt"),
    # handing it over: to whom root lets in, on the one socket that listens
    *("accept4", "sendmsg"),
)

_LOADING = (
    *("access", "faccessat", "faccessat2", "fstatat64", "lstat", "lstat64", "newfstatat", "stat", "stat64", "statx"),
    *("fstatfs", "fstatfs64", "getcwd", "getdents", "getdents64", "readlink", "readlinkat", "statfs", "statfs64"),
    *("dup", "dup2", "dup3", "fcntl", "fcntl64", "poll", "ppoll", "ppoll_time64", "mmap", "mmap2", "mprotect"),
    *("getpgrp", "getppid", "getresgid", "getresuid", "getrlimit", "getrusage", "sched_getaffinity", "sysinfo"),
    *("ugetrlimit", "seccomp"),
)

_FATAL = ("execve", "execveat", "pidfd_getfd", "process_vm_readv", "process_vm_writev", "ptrace")

_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x00010000
_CLONE_FLAGS_AT = 1 if platform.machine().startswith("s390") else 0  # clone(2), differences between architectures
_UNKNOWN = -1  # __NR_SCMP_ERROR; other negative numbers are system calls that only other architectures have


def write(directory: Path) -> None:
    """Write both filters for the helper processes that run in a directory. Raises OSError, PreflightError.

    They are replaced as a whole: a supervisor may start another process at the same time.
    """
    for name, program in ((LOADING_FILTER, loading()), (SERVING_FILTER, serving())):
        new = directory / f"{name}.new"
        new.write_bytes(program)
        new.replace(directory / name)


@cache
def loading() -> bytes:
    """The filter for code that is being loaded: files may be read, threads started; nothing changed, nothing executed.

    Raises PreflightError if libseccomp is not there.
    """
    library = _library()
    made = _Filter(library)
    made.allow(*_ANY, *_LOADING)
    for name, flags_at in (("open", 1), ("openat", 2)):
        made.allow_if(name, library.Arg(flags_at, library.MASKED_EQ, _CHANGES, 0))
    made.allow_if("clone", library.Arg(_CLONE_FLAGS_AT, library.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD))
    made.rule(library.ERRNO(errno.ENOSYS), "clone3")  # its flags are in memory: the C library tries clone then
    made.allow("setrlimit")
    made.allow_if("prlimit64", library.Arg(0, library.EQ, 0))  # of this process
    made.allow_if("prctl", library.Arg(0, library.EQ, seccomp.PR_SET_NO_NEW_PRIVS))
    return made.program()


@cache
def serving() -> bytes:
    """The filter for code that serves: it answers packets on what is open, and whoever tries to leave is killed.

    Raises PreflightError if libseccomp is not there.
    """
    library = _library()
    made = _Filter(library)
    made.allow(*_ANY)
    for name in ("mmap", "mmap2", "mprotect"):
        made.allow_if(name, library.Arg(2, library.MASKED_EQ, mmap.PROT_EXEC, 0))
    for name in _FATAL:
        made.rule(library.KILL_PROCESS, name)
    return made.program()


class _Filter:
    """A filter that is being made; the binding of libseccomp has no types."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self._filter: Any = library.SyscallFilter(library.ERRNO(errno.EPERM))
        self._filter.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
        # abort() is a signal to oneself: a process that hangs tells where it was
        self.allow_if("tgkill", library.Arg(2, library.EQ, int(signal.SIGABRT)))

    def allow(self, *names: str) -> None:
        for name in names:
            self.rule(self._library.ALLOW, name)

    def allow_if(self, name: str, *conditions: object) -> None:
        self.rule(self._library.ALLOW, name, *conditions)

    def rule(self, action: int, name: str, *conditions: object) -> None:
        """What becomes of a system call; one that this architecture or libseccomp does not know is left out."""
        number = self._library.resolve_syscall(self._library.Arch.NATIVE, name)
        if number != _UNKNOWN:
            self._filter.add_rule(action, number, *conditions)

    def program(self) -> bytes:
        with tempfile.TemporaryFile() as file:
            self._filter.export_bpf(file)
            file.seek(0)
            instructions = file.read()
        return seccomp.encode(self._library.resolve_syscall(self._library.Arch.NATIVE, "seccomp"), instructions)


def _library() -> ModuleType:
    """The binding of libseccomp: that of its own project (Debian: python3-seccomp), or pyseccomp."""
    for name in ("seccomp", "pyseccomp"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (OSError, RuntimeError, ImportError) as error:
            raise PreflightError(f"cannot filter system calls: {error}", hint="install libseccomp2") from error
    raise PreflightError("cannot filter system calls: no binding of libseccomp", hint="pip install pyseccomp")
