"""The registrations of a process: disabled and marked when it ends, enabled again when it listens again."""

from __future__ import annotations

import contextlib
import time
from functools import partial

from orchestrator.engine import netlink
from orchestrator.supervise.deafness import Marks
from orchestrator.supervise.lifecycle import State
from orchestrator.supervise.process import Process
from orchestrator.supervise.reactor import Reactor
from orchestrator.supervise.records import ERROR, Say

_ENABLE_AGAIN_S = 0.25
_ANSWER_MAX = 65536


class Registrations:
    """`marks` are those of the profile; `say` gets what cannot be done."""

    def __init__(self, reactor: Reactor, marks: Marks, say: Say) -> None:
        """Raises OSError."""
        self._reactor = reactor
        self._marks = marks
        self._say = say
        # Opened now: whoever is out of descriptors or memory when a process dies can still disable.
        self._netlink = netlink.open_control_socket()
        self._netlink.bind((0, 0))

    def disable(self, process: Process) -> None:
        with contextlib.suppress(OSError):  # a full disk: it is disabled all the same
            self._marks.set(process.order.keys)
        self._send(process.order.disable)

    def unmark(self, process: Process) -> None:
        """It listens, or its end was wanted."""
        self._marks.clear(process.order.keys)

    def enable(self, process: Process) -> None:
        self._send(process.order.keep_disabled)
        self._enable_heard(process)

    def _enable_heard(self, process: Process) -> None:
        """Enable what nobody is deaf to, as soon as no orch is at work, if it is still ready then."""
        if not process.order.enable or process.life.state is not State.RUNNING:
            return
        try:
            with self._marks.locked() as is_mine:
                if not is_mine:
                    self._reactor.at(time.monotonic() + _ENABLE_AGAIN_S, partial(self._enable_heard, process))
                    return
                for key, message in process.order.enable.items():
                    if not self._marks.is_deaf(key):
                        self._send([message])
        except OSError as error:
            self._say(f"{process.order.name}: its registrations stay disabled: {error}", ERROR)
            return
        if any(map(self._marks.is_deaf, process.order.keys)):
            self._send(process.order.disable)

    def _send(self, messages: list[str]) -> None:
        for message in messages:
            with contextlib.suppress(OSError):  # one registration that is gone must not keep us from the next
                self._netlink.send(bytes.fromhex(message))
                self._netlink.recv(_ANSWER_MAX)
