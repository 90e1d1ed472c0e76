"""When a watchdog undoes what nobody confirms, on the fake kernel; what it does then is in test_confirm.py."""

from __future__ import annotations

import errno
import math

from orchestrator import confirm
from orchestrator.app import App
from orchestrator.errors import KernelError
from orchestrator.fake import FakeKernel
from orchestrator.reports import Trial
from orchestrator.watchdog import Watchdog
from tests.hosts import FTP, Harness, both

OTHER = "profile: other\nhelpers:\n  tftp: {engine: conntrackd}\n"


class Dog(Watchdog):
    """One that writes down when it would undo something, and sleeps in no time; at `until_s` all is confirmed."""

    def __init__(self, app: App, kernel: FakeKernel, until_s: float) -> None:
        super().__init__(app)
        self.kernel = kernel
        self.until_s = until_s
        self.tries: list[float] = []

    def _undo(self) -> None:
        self.tries.append(self.kernel.now)

    def _sleep(self, *, until_s: float) -> None:
        self.kernel.now = until_s
        if until_s >= self.until_s:
            for pending in self._pending():
                confirm.keep(self._app, pending)

    def _be_backed(self, now_s: float) -> float:
        del now_s
        return math.inf


def try_out(orch: Harness, kernel: FakeKernel, text: str, *, until_s: float) -> None:
    desired, target = both(text)
    orch.app().apply(desired, target, ask=False, trial=Trial(until_s - kernel.now, lambda: None))


def refuse_removal(operation: str, key: str) -> None:
    if (operation, key) == ("remove rules", "ftp"):
        raise KernelError(operation, key, errno.EBUSY)


def test_what_cannot_be_undone_puts_off_no_other_deadline(orch: Harness, kernel: FakeKernel) -> None:
    try_out(orch, kernel, FTP, until_s=100.0)
    kernel.now = 110.0
    kernel.on_modify = refuse_removal
    try_out(orch, kernel, OTHER, until_s=145.0)
    dog = Dog(orch.app(), kernel, until_s=200.0)
    dog.run(lambda: None)
    assert [round(at) for at in dog.tries] == [110, 140, 145, 175]


def test_what_could_not_be_undone_is_tried_again_now_and_then(orch: Harness, kernel: FakeKernel) -> None:
    try_out(orch, kernel, FTP, until_s=1000.0)
    with orch.app().settled("test") as ledger:
        (pending,) = ledger.pending()
        ledger.reject(pending)
    kernel.now = 110.0
    dog = Dog(orch.app(), kernel, until_s=200.0)
    dog.run(lambda: None)
    assert [round(at) for at in dog.tries] == [110, 140, 170]
