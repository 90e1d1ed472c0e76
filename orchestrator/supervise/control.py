"""How others speak with a supervisor: a socket in its directory, one request and its answer at a time, in JSON.

A request is taken up at once, and answered when it is done, so that a supervisor at work can be told from one that
hangs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

SOCKET = "supervisor.sock"
TAKEN = {"taken": True}
MESSAGE_MAX = 65536

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say that this process, or the host, can open nothing more."""

_BACKLOG = 16


class SilentError(OSError):
    """There is no supervisor, or it does not answer."""


class EndedError(SilentError):
    """It ended over a request, or began anew."""


def listen(directory: str) -> socket.socket:
    """The socket of a supervisor that is about to start; that of its predecessor is no longer found. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with addressed(directory) as address:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)  # noqa: PTH108 (a supervisor imports no pathlib)
        listener.bind(address)
    listener.listen(_BACKLOG)
    return listener


def inherited() -> socket.socket:
    """The listening socket that a supervisor was given as its standard input, which is empty from then on."""
    listener = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return listener


def ask(directory: str, request: Mapping[str, Any], *, taken_within_s: float, done_within_s: float) -> dict[str, Any]:
    """The answer to a request. Raises SilentError, and another OSError if nothing more can be opened here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        try:
            channel.settimeout(taken_within_s)
            with addressed(directory) as address:
                channel.connect(address)
            channel.send(encode(request))
            if decode(channel.recv(MESSAGE_MAX)) != TAKEN:
                raise EndedError("its supervisor ends")
            channel.settimeout(done_within_s)
            answer = decode(channel.recv(MESSAGE_MAX))
        except EndedError:
            raise
        except (ConnectionResetError, BrokenPipeError) as error:
            raise EndedError("its supervisor ended before it took it up") from error
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            raise SilentError(f"its supervisor does not answer: {error}") from error
    if answer is None:
        raise EndedError("its supervisor ended over it")
    return answer


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode()


def decode(data: bytes) -> dict[str, Any] | None:
    """None for what is no message, or the end."""
    try:
        message = json.loads(data)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


@contextlib.contextmanager
def addressed(directory: str) -> Iterator[str]:
    """An address may have 107 bytes, and a directory has any length."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
