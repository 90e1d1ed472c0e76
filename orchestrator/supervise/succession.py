"""A process that takes over from one that runs under the same name, from its start until one of the two has ended.

It is in charge when it says that it is ready, and its predecessor has ended: that goes on if it is not taken over from.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from orchestrator.engine.names import NEXT, NOT_HANDED_OVER
from orchestrator.supervise import order, traces
from orchestrator.supervise.order import Order
from orchestrator.supervise.reactor import Reactor, Timer

_LOOK_S = 0.02


class Succession:
    """`over` is called once, with why the successor did not take over, or nothing if it did. `late` is called if it is
    ready in time, and its predecessor, who reads no more by then, has not ended.

    `is_alone`: the predecessor has ended, with `code`, None where only its parent is told. `is_refused`: it gave
    nothing to its successor. `then` is called at the end. `pidfd` is of the successor, and closed then unless somebody
    took it.
    """

    def __init__(
        self,
        reactor: Reactor,
        orders: Order,
        pid: int,
        *,
        says_ready: Callable[[], bool],
        late: Callable[[], None],
        over: Callable[[str], None],
    ) -> None:
        """Raises OSError if there is no such process, or no descriptor for it; then it is ended."""
        self.order = orders
        self.pid = pid
        self.is_alone = False
        self.code: int | None = None
        self.is_refused = False
        self.then: list[Callable[[], None]] = []
        self._reactor = reactor
        self._says_ready = says_ready
        self._tell_late = late
        self._over = over
        self._why = ""
        self.pidfd = _open(pid)
        self._look: Timer | None = None
        reactor.watch(self.pidfd, self._ended)
        self._deadline = reactor.at(time.monotonic() + orders.ready_within_s, self._late)

    def left_alone(self, code: int | None) -> None:
        """The predecessor has ended: because it was taken over from, or before that."""
        self.is_alone, self.code = True, code
        self._judge()

    def abandon(self, why: str) -> None:
        """End it."""
        self._why = self._why or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reaped(self, code: int) -> None:
        """It was a child of this process, and has ended."""
        self.is_refused = code == NOT_HANDED_OVER

    def _judge(self) -> None:
        """One that is alone has taken over, and says so in a moment, or finds nobody to take over from, and ends."""
        if not self._why and traces.born(self.pid) and self._says_ready():
            self._finish("")
        else:
            self._look = self._reactor.at(time.monotonic() + _LOOK_S, self._judge)

    def _late(self) -> None:
        if self._says_ready():
            if not self.is_alone:
                self._tell_late()
            return
        self.abandon(f"not ready within {self.order.ready_within_s} s")

    def _ended(self) -> None:
        with suppress(ChildProcessError):  # somebody else's, or reaped already
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end and end.si_code == os.CLD_EXITED:
                self.reaped(end.si_status)
        self._finish(self._why or ("its predecessor hands over nothing" if self.is_refused else "it ended"))

    def _finish(self, why: str) -> None:
        for timer in filter(None, (self._look, self._deadline)):
            timer.cancel()
        self._reactor.unwatch(self.pidfd)
        self._over(why)
        if self.pidfd >= 0:
            os.close(self.pidfd)


def _open(pid: int) -> int:
    """A descriptor of a successor; nobody would know what becomes of one that has none."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise


def argv(orders: Order) -> list[str]:
    """How a successor is started: it is told the document that lies beside that of its predecessor."""
    *before, document = orders.argv
    return [*before, f"{document}{NEXT}"]


def take_up_documents(orders: Order) -> None:
    """Those of the successor are in force: what starts from now on reads them. Raises OSError."""
    document = orders.argv[-1]
    for name in (f"{document.removesuffix('.toml')}.py", document, order.file_name(orders.name)):
        with suppress(FileNotFoundError):  # only a helper of somebody's own has code beside its document
            os.rename(f"{name}{NEXT}", name)  # noqa: PTH104 (a supervisor imports no pathlib)
