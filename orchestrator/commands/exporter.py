"""`orch exporter`: metrics for Prometheus, over HTTP, into a file of node_exporter, or once on standard output."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.errors import OrchError, UsageError
from orchestrator.session import (
    DEFAULT_STATE,
    Colour,
    ColourOption,
    ExitCode,
    QuietOption,
    Session,
    StateOption,
    VerboseOption,
    new_session,
    writing,
)

if TYPE_CHECKING:
    from orchestrator.exporter.scrape import Scraper

DEFAULT_LISTEN = "127.0.0.1:10932"
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exporter(
    listen: Annotated[
        str,
        typer.Option(
            "--listen", envvar="ORCH_LISTEN", metavar="[ADDRESS]:PORT", help="Serve there; no address: all of them."
        ),
    ] = DEFAULT_LISTEN,
    textfile: Annotated[
        Path | None,
        typer.Option("--textfile", envvar="ORCH_TEXTFILE", metavar="FILE", help="Write this file, once, and end."),
    ] = None,
    is_once: Annotated[
        bool, typer.Option("--once", envvar="ORCH_ONCE", help="Print the metrics on standard output, and end.")
    ] = False,
    drift_interval_s: Annotated[
        float,
        typer.Option(
            "--drift-interval", envvar="ORCH_DRIFT_INTERVAL", min=1, help="Seconds between two looks for drift."
        ),
    ] = 60.0,
    state_dir: StateOption = DEFAULT_STATE,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Serve metrics of all profiles and namespaces for Prometheus, until a signal ends it."""
    session = new_session("exporter", False, colour, verbose, is_quiet)
    address, port = parse_listen(listen)
    if textfile and is_once:
        raise UsageError("--textfile and --once exclude each other")
    scraper = _scraper(state_dir)
    scraper.look()  # what every scrape would meet is told now
    if textfile or is_once:
        return _once(scraper, textfile)
    return _serve(session, scraper, address=address, port=port, drift_interval_s=drift_interval_s)


def parse_listen(text: str) -> tuple[str, int]:
    """Address and port; no address: all of them, of both families where the kernel has both. Raises UsageError."""
    address, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise UsageError(f"--listen takes [ADDRESS]:PORT, not {text!r}")
    return address.strip("[]") or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0"), int(port)


def _scraper(state_dir: Path) -> Scraper:
    from orchestrator.app import boot_id, kernel_system
    from orchestrator.exporter.scrape import Scraper

    state_dir = state_dir.resolve()
    return Scraper(kernel_system(state_dir), state_dir, boot_id())


def _once(scraper: Scraper, textfile: Path | None) -> ExitCode:
    from prometheus_client import CollectorRegistry, generate_latest, write_to_textfile

    from orchestrator.exporter import survey
    from orchestrator.exporter.metrics import OrchCollector

    taken = survey.take(scraper.state_dir)
    registry = CollectorRegistry()
    registry.register(OrchCollector(scraper.look, lambda: taken))
    if textfile:
        try:
            write_to_textfile(str(textfile), registry)
        except OSError as error:  # which names a temporary file
            raise OrchError(f"cannot write the metrics: {error.strerror}", where=str(textfile)) from error
    else:
        with writing():
            sys.stdout.write(generate_latest(registry).decode())
    return ExitCode.OK


def _serve(session: Session, scraper: Scraper, *, address: str, port: int, drift_interval_s: float) -> ExitCode:
    from prometheus_client import CollectorRegistry, ProcessCollector

    from orchestrator.exporter.metrics import OrchCollector
    from orchestrator.exporter.server import serving
    from orchestrator.exporter.survey import Surveyor

    gc.enable()  # this command stays
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # before there are threads: all of them inherit it
    surveyor = Surveyor(scraper.state_dir, drift_interval_s)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(OrchCollector(scraper.look, lambda: surveyor.latest))
    with serving(registry, address, port) as url:
        surveyor.start()
        session.say(f"Serving {url}")
        signal.sigwait(_ENDS)
        surveyor.stop()
    return ExitCode.OK
