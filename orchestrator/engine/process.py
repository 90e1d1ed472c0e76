"""Entry point of a helper process: `python -I -S process.py helper-NAME.toml`, as root, in its network namespace.

It opens what root must open, becomes a user with one capability, and only then runs what others wrote, with the system
calls that are left. It ends with 0 after SIGTERM, and with 1 and one line on standard error otherwise.

Told of `helper-NAME.toml.next` it is the successor of the process that serves under that name: handover.py. It ends
with NOT_HANDED_OVER if that gives it nothing.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # -I and -S leave the standard library alone on the path; it stays first
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

import errno
import faulthandler
import signal

from orchestrator.engine import attempts, handover, loading, netlink, privileges, seccomp
from orchestrator.engine.api import Helper
from orchestrator.engine.counters import Page, State
from orchestrator.engine.ctnetlink import Client
from orchestrator.engine.inspector import Duty, Inspector
from orchestrator.engine.lane import Lanes
from orchestrator.engine.loop import RECEIVE_BUFFER, Answers, Loop, stop_on
from orchestrator.engine.names import NEXT, NOT_HANDED_OVER, handover_socket
from orchestrator.engine.seccomp import LOADING_FILTER, SERVING_FILTER
from orchestrator.engine.settings import Settings, parse

_STOPS = (signal.SIGTERM,)


def main(document: str) -> int:
    try:
        _serve(document)
    except (OSError, ValueError, loading.LoadError) as error:
        print(f"{document}: {' '.join(str(error).split())}", file=sys.stderr)
        return NOT_HANDED_OVER if isinstance(error, handover.HandoverError) else 1
    return 0


def _serve(document: str) -> None:
    faulthandler.enable()  # it crashes, or hangs and gets SIGABRT: its log says where
    with open(document, encoding="utf-8") as file:  # noqa: PTH123 (pathlib would be a tenth of the start-up time)
        settings = parse(file.read())
    user = _user(settings)
    filters = {name: _read(name) for name in (LOADING_FILTER, SERVING_FILTER)}
    source = _read_source(_beside(document), settings.sha256) if settings.file else b""
    helper = _own_helper(settings)
    predecessor = handover.Peer(handover_socket(settings.name)) if document.endswith(NEXT) else None
    page = Page("" if predecessor else f"{settings.name}.stats")
    listener = None if predecessor else handover.listen(settings.name)
    queue_socket = netlink.open_queue_socket(RECEIVE_BUFFER)
    answers = Answers(queue_socket, Client(netlink.open_control_socket()), page.counters)
    os.chdir("/")
    privileges.drop(user, mask=privileges.NET_ADMIN)
    privileges.limit(settings.memory_bytes)
    seccomp.load(filters[LOADING_FILTER])
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # now: threads of others inherit it, and would end all at once
    if helper is None:  # from here on code of others runs
        helper = loading.from_source(source, settings.file) if settings.file else loading.installed(settings.use)
    inspector = Inspector(_made(helper), _duty(settings), answers)
    lanes = Lanes(inspector, page.counters)
    loop = Loop(queue_socket, answers, inspector, page, accept_verdict=inspector.plain_verdict, shortcut=lanes)
    stop_on(loop, _STOPS)
    door = handover.Door(loop, inspector, page, queue_socket)
    privileges.start_no_more()
    if predecessor:
        listener = handover.take_over(
            predecessor, settings.queues, queue_socket=queue_socket, page=page, loop=loop, inspector=inspector
        )
    seccomp.load(filters[SERVING_FILTER])
    attempts.refuse(page.denied, exempt_thread=door.thread_id)
    for number in settings.queues:
        _bind(loop, number, is_fail_open=number == settings.queues[0])
    page.state = State.READY
    page.beat()
    if predecessor:
        predecessor.done()
    if listener:
        door.open(listener)
    loop.run()
    if loop.has_left:
        return
    page.state = State.STOPPING
    page.beat()


def _beside(document: str) -> str:
    """The name of the code that lies beside a document."""
    name, _, rest = document.rpartition(".toml")
    return f"{name}.py{rest}"


def _user(settings: Settings) -> privileges.User:
    """Whom to become; a user of its own depends on the runtime directory, which is where this process begins."""
    if settings.user:
        return privileges.find_user(settings.user)
    return privileges.own_user(os.getcwd(), settings.name)  # noqa: PTH109


def _read(file: str) -> bytes:
    with open(file, "rb") as opened:  # noqa: PTH123
        return opened.read()


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
        loop.bind(queue_num, is_fail_open=is_fail_open)
    except OSError as error:
        reason = {
            errno.EPERM: "it is held by another process",
            errno.EOPNOTSUPP: "the kernel has no conntrack attributes for it (nf_conntrack_netlink)",
        }.get(error.errno or 0, str(error))
        raise OSError(f"cannot listen on queue {queue_num}: {reason}") from error


def _read_source(file: str, sha256: str) -> bytes:
    """The code of a user's own helper, as orch described it: its copy lies beside the document.

    Raises OSError, and ValueError if it is another.
    """
    import hashlib

    source = _read(file)
    if hashlib.sha256(source).hexdigest() != sha256:
        raise ValueError(f"{file} is not what was applied: apply the profile again")
    return source


if __name__ == "__main__":
    loading.end_after(lambda: main(sys.argv[1]))
