"""Requests on the socket of a supervisor: taken up one message each, answered when they are done; see control.py."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from orchestrator.supervise import control
from orchestrator.supervise.order import VersionError
from orchestrator.supervise.process import Answer
from orchestrator.supervise.reactor import Reactor

EXHAUSTED_PAUSE_S = 0.5
"""Until something is tried again for which there was no descriptor, or no memory."""

_FIRST_WITHIN_S = 30.0

Take = Callable[[Mapping[str, Any], Answer], None]


class Requests:
    """`take` gets each with what to call with its answer, and raises VersionError, or OSError, ValueError, LookupError
    or TypeError for one that it cannot do. `idle` is called when one is over, and if none comes in time.

    `pending`: how many have no answer yet. `is_first_to_come`: there has been none.
    """

    def __init__(self, reactor: Reactor, listener: socket.socket, take: Take, idle: Callable[[], None]) -> None:
        self.pending = 0
        self._reactor = reactor
        self._listener = listener
        self._take = take
        self._idle = idle
        self._patience = reactor.at(time.monotonic() + _FIRST_WITHIN_S, idle)
        listener.settimeout(0)
        self._listen()

    @property
    def is_first_to_come(self) -> bool:
        return not self._patience.is_cancelled

    def _listen(self) -> None:
        self._reactor.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in control.EXHAUSTED:
                raise
            self._reactor.unwatch(self._listener.fileno())  # whoever asks waits a little longer
            self._reactor.at(time.monotonic() + EXHAUSTED_PAUSE_S, self._listen)
            return
        self._patience.cancel()
        self.pending += 1
        self._reactor.watch(channel.fileno(), partial(self._hear, channel))

    def _hear(self, channel: socket.socket) -> None:
        self._reactor.unwatch(channel.fileno())
        try:
            request = control.decode(channel.recv(control.MESSAGE_MAX))
            channel.send(control.encode(control.TAKEN))
        except OSError:  # nobody waits for it any more
            request = None
        if request is None:
            self._close(channel)
            return
        answer = partial(self._reply, channel)
        try:
            self._take(request, answer)
        except VersionError as error:
            answer({"error": str(error), "is_outdated": True})
        except (OSError, ValueError, LookupError, TypeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})

    def _reply(self, channel: socket.socket, answer: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who asked may have been killed
            channel.send(control.encode(answer))
        self._close(channel)

    def _close(self, channel: socket.socket) -> None:
        channel.close()
        self.pending -= 1
        self._idle()
