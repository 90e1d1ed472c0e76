"""Entry point of a helper process: `python -I -S process.py helper-NAME.toml`, as root, in its network namespace.

It opens what root must open, becomes a user with one capability, and only then runs what others wrote. It ends with 0
after SIGTERM, and with 1 and one line on standard error otherwise.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # -I and -S leave the standard library alone on the path; it stays first
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

import errno
import signal
import stat

from orchestrator.engine import loading, netlink, privileges
from orchestrator.engine.api import Helper
from orchestrator.engine.counters import Page, State
from orchestrator.engine.ctnetlink import Client
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.lane import Lanes
from orchestrator.engine.loop import RECEIVE_BUFFER, Answers, Loop, stop_on
from orchestrator.engine.settings import Settings, parse

QUEUE_LENGTH = 128
"""Packets that may wait in a queue: all of them stand still for as long as a process hangs."""


def main(document: str) -> int:
    try:
        _serve(document)
    except (OSError, ValueError, loading.LoadError) as error:
        print(f"{document}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _serve(document: str) -> None:
    with open(document, encoding="utf-8") as file:  # noqa: PTH123 (pathlib would be a tenth of the start-up time)
        settings = parse(file.read())
    user = privileges.find_user(settings.user)
    source = read_source(settings.file, settings.sha256) if settings.file else b""
    helper = _own_helper(settings)
    page = Page(f"{settings.name}.stats")
    queue_socket = netlink.open_queue_socket(RECEIVE_BUFFER)
    answers = Answers(queue_socket, Client(netlink.open_control_socket()), page.counters)
    os.chdir("/")
    privileges.drop(user, mask=privileges.NET_ADMIN)
    if helper is None:  # from here on code of others runs
        helper = loading.from_source(source, settings.file) if settings.file else loading.installed(settings.use)
    inspector = Inspector(_made(helper), _duty(settings), answers)
    lanes = Lanes(inspector, page.counters)
    loop = Loop(queue_socket, answers, inspector, page, accept_verdict=inspector.plain_verdict, shortcut=lanes)
    stop_on(loop, [signal.SIGTERM])
    for number in settings.queues:
        _bind(loop, number, is_fail_open=number == settings.queues[0])
    page.state = State.READY
    page.beat()
    loop.run()
    page.state = State.STOPPING
    page.beat()


def _own_helper(settings: Settings) -> type[Helper] | None:
    """The helper, if it is one of ours: those are read as root, who may have installed orch for nobody else."""
    if settings.file:
        return None
    try:
        return loading.builtin(settings.use)
    except loading.LoadError:
        return None


def _made(helper: type[Helper]) -> Helper:
    try:
        return helper()
    except (Exception, SystemExit) as error:
        raise loading.LoadError(f"{type(error).__name__}: {error}") from error


def _duty(settings: Settings) -> Duty:
    return Duty(
        names=frozenset(name.encode() for name in settings.names),
        bounds=settings.bounds,
        by_rules=settings.is_by_rules,
        by_triggers=settings.inspect == "triggers",
        label=settings.label,
    )


def _bind(loop: Loop, queue_num: int, *, is_fail_open: bool) -> None:
    """Only the first queue may let packets pass when it is full: settings.py tells who is in the second."""
    try:
        loop.bind(queue_num, is_fail_open=is_fail_open, max_len=QUEUE_LENGTH)
    except OSError as error:
        reason = {
            errno.EPERM: "it is held by another process",
            errno.EOPNOTSUPP: "the kernel has no conntrack attributes for it (nf_conntrack_netlink)",
        }.get(error.errno or 0, str(error))
        raise OSError(f"cannot listen on queue {queue_num}: {reason}") from error


def read_source(file: str, sha256: str) -> bytes:
    """The code in a file of the user's own, exactly what orch described when the profile was applied.

    Raises OSError, and ValueError if it has changed, or if somebody other than root could change it.
    """
    import hashlib

    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
            raise ValueError(f"{file} must be a file of root that nobody else can write")
        source = opened.read()
    if hashlib.sha256(source).hexdigest() != sha256:
        raise ValueError(f"{file} is not what it was when the profile was applied: apply it again")
    return source


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
