"""Errors that a person meets: what failed, where, and what to do about it."""

from __future__ import annotations

import errno as errno_module
from dataclasses import dataclass


class OrchError(Exception):
    """One failure. `what` is a sentence without a full stop; `cause` names the errno; all but `what` may be empty."""

    def __init__(self, what: str, *, where: str = "", hint: str = "", cause: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a profile; line and column count from 1, 0 means that the place is the whole file."""

    source: str
    line: int
    column: int
    message: str
    hint: str = ""

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class ProfileError(OrchError):
    """A profile that cannot be used; holds every problem found, in order of place."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.source, p.line, p.column, p.message)))
        first = self.problems[0]
        super().__init__(first.message, where=first.place, hint=first.hint)


class PreflightError(OrchError):
    """The host is not in a state in which the plan could work; nothing was changed."""


class RefusedError(OrchError):
    """What is asked would break something that is not this profile's; nothing was changed."""


class LedgerVersionError(OrchError):
    """A newer orch wrote the ledger: this one neither understands it nor empties it; nothing was changed."""


class StalePlanError(OrchError):
    """The system changed between plan and execution; nothing was changed."""


class UsageError(OrchError):
    """The command was called wrongly, or needs an answer that nobody is there to give; exit code 64."""


class HelperProcessError(OrchError):
    """A helper process did not start, did not become ready, or did not stop."""


class NoHandoverError(HelperProcessError):
    """A process gives its queues to no successor, and goes on as it was; it can be restarted instead."""


class VerifyError(OrchError):
    """Everything was executed, and the system is still not as declared."""


class Interrupted(OrchError):  # noqa: N818 (a signal is not an error of anybody)
    """A signal asked the command to stop; exit code 128 + signal number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number


class RollbackError(OrchError):
    """A step failed and the way back failed too; `leftovers` lists what is left in between."""

    def __init__(self, cause: Exception, leftovers: tuple[str, ...]) -> None:
        super().__init__(
            str(cause),
            where=cause.where if isinstance(cause, OrchError) else "",
            hint="orch status lists what is left; orch teardown takes it away",
            cause=cause.cause if isinstance(cause, OrchError) else "",
        )
        self.leftovers = leftovers


class OutputError(OrchError, OSError):
    """Standard output cannot be written; `exit_code` is that of work that was done nevertheless, else 1."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"cannot write the result: {error.strerror or error}",
            where="standard output",
            cause=f"{errno_name(error.errno)}, write" if error.errno else "",
        )
        self.exit_code = 1


class DecodeError(ValueError):
    """Bytes that are not the message they should be."""


class KernelError(OrchError):
    """The kernel refused an operation. `operation` is what was asked, `key` the object, `errno` the answer."""

    def __init__(self, operation: str, key: str, errno: int, *, detail: str = "", hint: str = "") -> None:
        reason, default_hint = explain(operation, errno)
        name = errno_name(errno)
        super().__init__(
            f"cannot {operation} {key}: {reason or name}".rstrip(": "),
            hint=hint or default_hint,
            cause=f"{name}, {operation}" + (f": {detail}" if detail else ""),
        )
        self.operation = operation
        self.key = key
        self.errno = errno


class HalfDoneError(KernelError):
    """The kernel refused a part of an operation, and then to take back what was done of it."""


def errno_name(number: int) -> str:
    """The symbolic name of an errno, `E?(N)` where Python does not know it."""
    return errno_module.errorcode.get(number, f"E?({number})")


_NOT_ADMIN = (
    "CAP_NET_ADMIN of the host is needed",
    "run as root on the host; root of a user namespace is not enough, the helper registry is host-wide",
)
_NO_SUBSYSTEM = (
    "the kernel lacks nfnetlink_cthelper",
    "load or build nfnetlink_cthelper (CONFIG_NF_CT_NETLINK_HELPER), or use engine: kernel",
)

# (operation, errno) -> (reason, hint). Operations are the words the adapters use.
_ERRNO_TABLE: dict[tuple[str, int], tuple[str, str]] = {
    ("list helpers", errno_module.EPERM): _NOT_ADMIN,
    ("list helpers", errno_module.EINVAL): _NO_SUBSYSTEM,
    ("register helper", errno_module.EPERM): _NOT_ADMIN,
    ("register helper", errno_module.EINVAL): _NO_SUBSYSTEM,
    ("register helper", errno_module.EBUSY): (
        "an in-kernel helper of that name is loaded, or an entry for all families overlaps it",
        "unload the kernel module (lsmod | grep nf_conntrack), or give the helper another name",
    ),
    ("register helper", errno_module.EEXIST): (
        "somebody registered it already",
        "orch status shows who uses it; give the helper another name",
    ),
    ("register helper", errno_module.ENOMEM): ("priv_data_len is above the kernel's limit of 32 bytes", ""),
    ("update helper", errno_module.EPERM): _NOT_ADMIN,
    ("update helper", errno_module.ENOENT): ("it is not registered", ""),
    ("update helper", errno_module.EBUSY): (
        "private data length and policy names cannot be changed in place",
        "tear the profile down and apply it again",
    ),
    ("unregister helper", errno_module.EPERM): _NOT_ADMIN,
    ("unregister helper", errno_module.EBUSY): (
        "rules still refer to it",
        "some namespace attaches it: nft list ruleset | grep -A1 'ct helper', iptables-save -t raw",
    ),
    ("unregister helper", errno_module.ENOENT): ("it is not registered", ""),
    ("load rules", errno_module.ENOENT): (
        "a helper they name is not registered for this family and protocol",
        "orch status shows the registrations",
    ),
    ("list connections", errno_module.EPERM): ("CAP_NET_ADMIN in the network namespace is needed", "run as root"),
    ("list expectations", errno_module.EPERM): ("CAP_NET_ADMIN in the network namespace is needed", "run as root"),
    ("list tables", errno_module.EPERM): ("CAP_NET_ADMIN in the network namespace is needed", "run as root"),
    ("list rules", errno_module.EPERM): ("CAP_NET_ADMIN in the network namespace is needed", "run as root"),
    ("load rules", errno_module.EPERM): ("CAP_NET_ADMIN in the network namespace is needed", "run as root"),
}


def explain(operation: str, errno: int) -> tuple[str, str]:
    """What an errno means for an operation: (reason, hint), both empty where it is not in the table."""
    return _ERRNO_TABLE.get((operation, errno), ("", ""))
