"""A process that takes over from one that runs under the same name, from its start until one of the two has ended.

It is in charge when it says that it is ready, and its predecessor has ended: that goes on if it is not taken over from.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from orchestrator.engine.names import NEXT
from orchestrator.supervise import order, traces
from orchestrator.supervise.order import Order
from orchestrator.supervise.reactor import Reactor, Timer

_LOOK_S = 0.02


class Succession:
    """`over` is called once, with why the successor did not take over, or nothing if it did. `late` is called if it is
    ready in time, and its predecessor, who reads no more by then, has not ended.

    `is_alone`: the predecessor has ended, with `code`, None where only its parent is told. `then` is called at the end.
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
        """Raises OSError if there is no such process."""
        self.order = orders
        self.pid = pid
        self.is_alone = False
        self.code: int | None = None
        self.then: list[Callable[[], None]] = []
        self._reactor = reactor
        self._says_ready = says_ready
        self._tell_late = late
        self._over = over
        self._why = ""
        self._pidfd = os.pidfd_open(pid)
        self._look: Timer | None = None
        reactor.watch(self._pidfd, self._ended)
        self._deadline = reactor.at(time.monotonic() + orders.ready_within_s, self._late)

    def left_alone(self, code: int | None) -> None:
        """The predecessor has ended: because it was taken over from, or before that."""
        self.is_alone, self.code = True, code
        self._judge()

    def abandon(self, why: str) -> None:
        """End it."""
        self._why = self._why or why
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

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
        self._finish(self._why or "it ended")

    def _finish(self, why: str) -> None:
        for timer in filter(None, (self._look, self._deadline)):
            timer.cancel()
        self._reactor.unwatch(self._pidfd)
        os.close(self._pidfd)
        self._over(why)


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
