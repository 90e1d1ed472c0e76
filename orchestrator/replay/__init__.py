"""`orch replay`: run a helper over a capture. The work is done by worker.py, in a process without privilege."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import HelperProcessError, OrchError
from orchestrator.replay import report
from orchestrator.replay.report import Failure, PacketReport, Request, Summary
from orchestrator.supervise import filters

_PROGRAM = "import sys; sys.path[:] = {path!r}; from orchestrator.replay.worker import main; main(*sys.argv[1:])"
_WITHOUT_SOURCE = -1


def run(request: Request, capture: str) -> Generator[PacketReport | Summary, None, None]:
    """The packets that have something to say, and at last the summary; `capture` is a file, `-` standard input.

    Both files are opened here: whom the process runs as need not be able to. Raises OrchError if the capture or the
    helper cannot be read.
    """
    with ExitStack() as files:
        stream = sys.stdin.buffer if capture == "-" else files.enter_context(_opened(capture, "capture"))
        source = files.enter_context(_opened(request.name, "helper")).fileno() if request.kind == "file" else None
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-c", _PROGRAM.format(path=[entry for entry in sys.path if entry])),
                *(json.dumps(dataclasses.asdict(request)), str(_WITHOUT_SOURCE if source is None else source)),
                filters.loading().hex(),
            ],
            stdin=stream,
            stdout=subprocess.PIPE,
            pass_fds=() if source is None else (source,),
            encoding="ascii",
            errors="replace",  # the helper can write there, too
        )
        try:
            yield from _lines(process, capture)
            process.wait()
        finally:
            process.kill()
            process.communicate()


def _opened(file: str, role: str) -> BinaryIO:
    try:
        return Path(file).open("rb")
    except OSError as error:
        raise OrchError(f"cannot read the {role}: {error.strerror}", where=file) from error


def _lines(process: subprocess.Popen[str], capture: str) -> Iterator[PacketReport | Summary]:
    assert process.stdout is not None  # it is a pipe
    for text in process.stdout:
        try:
            line = report.decode(text)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HelperProcessError("the helper wrote into the answer of its process") from error
        if isinstance(line, Failure):
            process.wait()
            raise OrchError(line.what, where=capture if line.is_of_capture else "", hint=line.hint)
        yield line
        if isinstance(line, Summary):
            return
    raise HelperProcessError(
        "the process of the replay ended before the capture did", cause=f"exit status {process.wait()}"
    )
