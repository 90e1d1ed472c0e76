"""`orch explain`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.errors import UsageError
from orchestrator.session import (
    DEFAULT_STATE,
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    NetnsOption,
    QuietOption,
    StateOption,
    VerboseOption,
    make_app,
    new_session,
)

if TYPE_CHECKING:
    from orchestrator.app import App
    from orchestrator.explain import Question, Sight
    from orchestrator.model import Netns
    from orchestrator.ports import Ends

_HINT = "10.0.0.1:40000, 10.0.0.1, [fd00::1]:40000 or fd00::1; the destination needs a port"

SourceArgument = Annotated[str, typer.Argument(metavar="SRC[:SPORT]", help="Who opens the connection.")]
DestinationArgument = Annotated[str, typer.Argument(metavar="DST:DPORT", help="Where to, as the client sends it.")]
ProtocolArgument = Annotated[str, typer.Argument(metavar="[tcp|udp]", help="Default: tcp.")]
InputOption = Annotated[
    str, typer.Option("--iif", envvar="ORCH_IIF", metavar="NAME", help="It comes in by this interface.")
]
OutputOption = Annotated[
    str, typer.Option("--oif", envvar="ORCH_OIF", metavar="NAME", help="This host opens it, by this interface.")
]


def explain(
    source: SourceArgument,
    destination: DestinationArgument,
    l4proto: ProtocolArgument = "tcp",
    iif: InputOption = "",
    oif: OutputOption = "",
    netns: NetnsOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Say whether a connection gets a helper that works, by which rule, what it expects, and if not, why."""
    from orchestrator import explain as explaining
    from orchestrator.views import explain as view

    session = new_session("explain", is_json, colour, verbose, is_quiet)
    ends = parse_ends(source, destination)
    app = make_app(session, netns=netns, state_dir=state_dir)
    where = app.system.host.find_netns(netns or "")
    question = _question(app, where, l4proto=l4proto, ends=ends, iif=iif, oif=oif)
    explanation = explaining.explain(question, _sight(app, where, question))
    code = ExitCode.OK if explanation.is_helped else ExitCode.DIFFERS
    text = view.text(explanation, session.paint(sys.stdout))
    return session.result(code, text, explanation=view.value(explanation))


def parse_ends(source: str, destination: str) -> Ends:
    """The two ends as they were typed; raises UsageError."""
    from orchestrator.ports import Ends

    saddr, sport = _end(source)
    daddr, dport = _end(destination)
    if dport == 0:
        raise UsageError(f"{destination} has no port", hint=_HINT)
    if (":" in saddr) != (":" in daddr):
        raise UsageError(f"{source} and {destination} are of different families")
    return Ends(saddr, sport, daddr, dport)


def _end(text: str) -> tuple[str, int]:
    import ipaddress

    address, _, port = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", "0")
    try:
        found = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise UsageError(f"{text!r} is not an end of a connection", hint=_HINT) from None
    if not (port.isascii() and port.isdigit()):
        raise UsageError(f"{port!r} is not a port", hint=_HINT)
    if int(port) > 0xFFFF:
        raise UsageError(f"port {port} is out of range", hint="ports are 1 to 65535")
    return str(found), int(port)


def _question(app: App, netns: Netns, *, l4proto: str, ends: Ends, iif: str, oif: str) -> Question:
    from orchestrator import explain as explaining
    from orchestrator.model import L4Proto, Path

    if l4proto not in set(L4Proto):
        raise UsageError(f"{l4proto!r} is neither tcp nor udp")
    if iif and oif:
        raise UsageError("--iif is for what comes in, --oif for what this host opens: give one of them")
    if iif or oif:
        there = app.system.host.interfaces(netns)
        if (iif or oif) not in there:
            raise UsageError(f"there is no interface {iif or oif!r} in netns {netns}", hint=", ".join(sorted(there)))
        way = explaining.Way(Path.INCOMING, iif) if iif else explaining.Way(Path.OUTGOING, oif)
        return explaining.Question(L4Proto(l4proto), ends, (way,), "as the options say")
    host = app.system.host
    ways, judged = explaining.ways(host.route(netns, ends.saddr), host.route(netns, ends.daddr))
    return explaining.Question(L4Proto(l4proto), ends, ways, judged)


def _sight(app: App, netns: Netns, question: Question) -> Sight:
    from orchestrator import explain as explaining
    from orchestrator.journal import Ledger

    host = app.system.host
    with closing(Ledger.open(app.state_dir, boot_id=app.boot_id, create=False)) as ledger:
        applied = {a.owner: a for a in ledger.applied() if a.owner.netns.identity == netns.identity}
    profiles = [(applied[p.owner], p) for p in app.status().profiles if p.owner in applied]
    return explaining.Sight(
        netns=netns,
        profiles=tuple(profiles),
        foreign_rules=tuple(rule for rule in host.helper_rules(netns) if not rule.is_ours),
        earlier_rules=host.earlier_rules(netns),
        connections=host.live_connections(netns, question.l3proto, question.l4proto),
        expectations=host.live_expectations(netns, question.l3proto),
        state_dir=app.state_dir,
    )
