"""The command line: arguments in, exit code out. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import __version__, complete
from orchestrator.commands import (
    completion,
    confirm,
    doctor,
    enable,
    events,
    explain,
    exporter,
    history,
    rollback,
    status,
    verify,
    watch,
)
from orchestrator.commands import run as runs
from orchestrator.errors import Interrupted, OrchError, OutputError, ProfileError, RollbackError, UsageError
from orchestrator.session import (
    DEFAULT_STATE,
    SIGNALS,
    AskOption,
    Colour,
    ColourOption,
    ExitCode,
    FullOption,
    JsonOption,
    NetnsOption,
    ProfileArgument,
    QuietOption,
    Session,
    StateOption,
    TemplatesOption,
    VerboseOption,
    WaitOption,
    YesOption,
    is_coloured,
    load,
    make_app,
    new_session,
    render_target,
    warn_all,
    writing,
)

if TYPE_CHECKING:
    from orchestrator.model import Desired, Target


EXIT_CODES = """
Exit codes: 0 done or nothing to do; 1 failed, the system is as before; 2 (diff, status) differs from the profile;
3 failed and something is left in between; 4 not confirmed; 64 wrong usage; 130, 143, 129 interrupted and undone.
"""

cli = typer.Typer(
    name="orch",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Apply connection tracking helpers from one profile: registrations, rules and processes.\n\n"
    "orch diff profiles/ftp.yaml\n\norch apply profiles/ftp.yaml --netns blue",
    epilog=EXIT_CODES,
)

_TRUE = ("1", "true", "t", "yes", "y", "on")  # what click takes for true in a variable


@cli.command(epilog="orch check profiles/ftp.yaml")
def check(
    profile: ProfileArgument,
    templates: TemplatesOption = None,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Parse and validate a profile; needs no privilege and no kernel."""
    session = new_session("check", is_json, colour, verbose, is_quiet)
    desired = load(profile)
    render_target(desired, templates)
    warn_all(session, desired)
    return session.result(ExitCode.OK, f"{profile}: ok\n", problems=[], warnings=list(desired.warnings))


@cli.command(epilog="orch render profiles/ftp.yaml --document ruleset.nft")
def render(
    profile: ProfileArgument,
    document: Annotated[
        str | None, typer.Option("--document", envvar="ORCH_DOCUMENT", metavar="NAME", help="Print only this one.")
    ] = None,
    templates: TemplatesOption = None,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Print the documents that apply would use, byte for byte."""
    session = new_session("render", is_json, colour, verbose, is_quiet)
    desired = load(profile)
    documents = render_target(desired, templates).documents
    names = ", ".join(d.name for d in documents)
    chosen = [d for d in documents if document in (None, d.name)]
    if not chosen:
        raise UsageError(f"there is no document {document!r}", hint=f"this profile has {names}")
    warn_all(session, desired)
    text = chosen[0].text if document else "".join(f"# ---- {d.name} ----\n{d.text}" for d in chosen)
    session.is_quiet = False  # the text is what was asked for
    return session.result(ExitCode.OK, text, documents={d.name: d.text for d in chosen})


@cli.command(epilog="orch schema > profile.schema.json")
def schema() -> ExitCode:
    """Print the JSON Schema of profiles, for editors."""
    import json

    from orchestrator import profile as profiles

    with writing():
        sys.stdout.write(json.dumps(profiles.schema(), indent=2) + "\n")
    return ExitCode.OK


@cli.command(epilog="orch diff profiles/ftp.yaml --netns blue")
def diff(
    profile: ProfileArgument,
    netns: NetnsOption = None,
    is_full: FullOption = False,
    templates: TemplatesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Read the system and print what apply would do; changes nothing."""
    session = new_session("diff", is_json, colour, verbose, is_quiet)
    return _diff(session, profile, netns=netns, is_full=is_full, templates=templates, state_dir=state_dir)


def _diff(
    session: Session, profile: str, *, netns: str | None, is_full: bool, templates: Path | None, state_dir: Path
) -> ExitCode:
    from orchestrator.reports import PlanRefusedError
    from orchestrator.views import human, machine

    desired = load(profile)
    target = render_target(desired, templates)
    warn_all(session, desired)
    difference = make_app(session, netns=netns, state_dir=state_dir).diff(desired, target)
    text = human.difference_text(difference, session.paint(sys.stdout), is_full=is_full)
    code = ExitCode.OK if difference.plan.is_empty else ExitCode.DIFFERS
    if difference.plan.refusals:
        code = ExitCode.FAILED
        sys.stderr.write(human.error_text(PlanRefusedError(difference.plan.refusals), session.paint()))
    return session.result(code, text, plan=machine.difference_value(difference))


@cli.command(epilog="orch apply profiles/ftp.yaml --netns blue")
def apply(
    profile: ProfileArgument,
    netns: NetnsOption = None,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", envvar="ORCH_DRY_RUN", help="The same as diff, output and exit code.")
    ] = False,
    is_full: FullOption = False,
    ask: AskOption = False,
    confirm_within_s: Annotated[
        float | None,
        typer.Option(
            "--confirm-within",
            envvar="ORCH_CONFIRM_WITHIN",
            min=0,
            metavar="SECONDS",
            help="Undo it after so many seconds, unless it is confirmed; 0 keeps it. Default: the profile's.",
        ),
    ] = None,
    accepts_loss: Annotated[
        bool,
        typer.Option(
            "--accept-connection-loss",
            envvar="ORCH_ACCEPT_CONNECTION_LOSS",
            help="Live connections may lose their helper, although that cannot be undone.",
        ),
    ] = False,
    is_yes: YesOption = False,
    wait_s: WaitOption = 10.0,
    templates: TemplatesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Make the system as the profile says, or leave it as it was."""
    session = new_session("apply", is_json, colour, verbose, is_quiet)
    if is_dry_run:
        return _diff(session, profile, netns=netns, is_full=is_full, templates=templates, state_dir=state_dir)
    from orchestrator.views import human, machine

    session.is_yes, session.is_full = is_yes or (accepts_loss and not ask), is_full
    desired = load(profile)
    target = render_target(desired, templates)
    warn_all(session, desired)
    app = make_app(session, netns=netns, state_dir=state_dir, wait_s=wait_s)
    within_s = desired.confirm_within_s if confirm_within_s is None else confirm_within_s
    trial = confirm.new_trial(app, within_s, accepts_loss=accepts_loss) if within_s else None
    with session.catching_signals():
        report = app.apply(desired, target, ask=ask, trial=trial)
        for note in report.notes:
            session.warn(note)
        if report.pending:
            return confirm.ask(session, app, report, report.pending, is_asked=not is_yes)
    if report.declined:
        return session.result(ExitCode.DECLINED, "Nothing was changed.\n", report=machine.report_value(report))
    return session.result(ExitCode.OK, human.applied_text(report, desired.source), report=machine.report_value(report))


@cli.command(epilog="orch teardown ftp --netns blue; orch teardown --all")
def teardown(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="[PROFILE]",
            help="A profile's file or its name; default: all.",
            autocompletion=complete.applied_or_files,
        ),
    ] = "",
    netns: NetnsOption = None,
    is_all: Annotated[bool, typer.Option("--all", envvar="ORCH_ALL", help="In every namespace.")] = False,
    is_yes: YesOption = False,
    wait_s: WaitOption = 10.0,
    templates: TemplatesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Remove what orch applied in the namespace, and only that."""
    from orchestrator.views import human, machine

    session = new_session("teardown", is_json, colour, verbose, is_quiet)
    if is_all and netns:
        raise UsageError("--all and --netns exclude each other")
    session.is_yes = is_yes
    name, desired, target = _what_to_remove(profile, templates)
    with session.catching_signals():
        app = make_app(session, netns=netns, state_dir=state_dir, wait_s=wait_s)
        report = app.teardown(name, every_netns=is_all, desired=desired, target=target)
    leftovers = [sentence for one in report.reports for sentence in one.leftovers]
    for sentence in leftovers:
        session.warn(f"left: {sentence}")
    code = ExitCode.MIXED if leftovers else ExitCode.OK
    if any(one.declined for one in report.reports):
        code = ExitCode.DECLINED
    return session.result(code, human.teardown_text(report, every_netns=is_all), report=machine.teardown_value(report))


def _what_to_remove(profile: str, templates: Path | None) -> tuple[str, Desired | None, Target | None]:
    """A name, or what a file says; a file that is broken by now cannot say it, its profile's name still can."""
    from orchestrator.model import is_profile_name

    if profile == "" or (is_profile_name(profile) and not Path(profile).is_file()):
        return profile, None, None
    try:
        desired = load(profile)
        return desired.profile, desired, render_target(desired, templates)
    except ProfileError as error:
        raise OrchError(
            f"cannot read the profile: {error.what}",
            where=error.where,
            hint="tear it down by its name: orch status lists the names",
        ) from error


cli.command(epilog="orch confirm; orch confirm ftp --netns blue")(confirm.confirm)
cli.command(epilog="orch rollback; orch rollback ftp --netns blue --to 3")(rollback.rollback)
cli.command(epilog="orch history; orch history ftp --netns blue")(history.history)
cli.command(epilog="orch status; orch status ftp --watch --interval 5")(status.status)
cli.command(epilog="orch events; orch events ftp --json --count 10")(events.events)


@cli.command(epilog="orch helpers --json")
def helpers(
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """List the helpers that orch knows, and which of their engines this host can run."""
    from orchestrator.kernel.host import KernelHost
    from orchestrator.supervise.describe import installed
    from orchestrator.views import helpers as view

    session = new_session("helpers", is_json, colour, verbose, is_quiet)
    rows = view.rows(KernelHost(), installed(session.warn))
    return session.result(ExitCode.OK, view.text(rows), helpers=view.value(rows))


@cli.command(epilog="orch replay ftp capture.pcap; orch replay ./steam.py capture.pcapng -v")
def replay(
    helper: Annotated[
        str,
        typer.Argument(metavar="HELPER", help="A helper of ours, an installed one, or the path of your own file."),
    ],
    capture: Annotated[str, typer.Argument(metavar="CAPTURE", help="pcap or pcapng file; - reads standard input.")],
    ports: Annotated[
        list[int] | None,
        typer.Option("--port", envvar="ORCH_PORT", min=1, max=65535, help="Port of the server; repeat for more."),
    ] = None,
    snat: Annotated[
        str, typer.Option("--snat", envvar="ORCH_SNAT", metavar="ADDRESS", help="What the server sees as the client.")
    ] = "",
    dnat: Annotated[
        str, typer.Option("--dnat", envvar="ORCH_DNAT", metavar="ADDRESS", help="What the client sees as the server.")
    ] = "",
    guard_ports: Annotated[
        str,
        typer.Option("--guard-ports", envvar="ORCH_GUARD_PORTS", metavar="A-B", help="Ports that may be expected."),
    ] = "",
    is_any_source: Annotated[
        bool, typer.Option("--any-source", envvar="ORCH_ANY_SOURCE", help="Anybody may open what is expected.")
    ] = False,
    is_any_destination: Annotated[
        bool, typer.Option("--any-destination", envvar="ORCH_ANY_DESTINATION", help="It may lead to any host.")
    ] = False,
    is_permanent: Annotated[
        bool, typer.Option("--permanent", envvar="ORCH_PERMANENT", help="It may stay after it was used.")
    ] = False,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Run a helper over a capture and print what it expects; needs no privilege and no kernel."""
    from orchestrator import replay as replays
    from orchestrator.replay.report import PacketReport, Request
    from orchestrator.views import replay as view

    session = new_session("replay", is_json, colour, verbose, is_quiet)
    request = Request(
        kind="file" if "/" in helper else "named",
        name=helper,
        ports=tuple(ports or ()),
        snat=_address("--snat", snat),
        dnat=_address("--dnat", dnat),
        ports_expected=_ports("--guard-ports", guard_ports),
        is_any_source=is_any_source,
        is_any_destination=is_any_destination,
        is_permanent=is_permanent,
        is_verbose=verbose > 0,
    )
    code = ExitCode.FAILED
    paint = session.paint(sys.stdout)
    with contextlib.closing(replays.run(request, capture)) as lines:
        for line in lines:
            if not isinstance(line, PacketReport):
                for warning in line.warnings:
                    session.warn(warning)
                code = session.result(ExitCode.OK, view.summary_text(line), summary=view.value(line))
            elif is_json:
                session.write(view.packet_line(line))
            elif not is_quiet:
                session.write(view.packet_text(line, paint))
    return code


cli.command(epilog="orch doctor; orch doctor --probe -v")(doctor.doctor)
cli.command(epilog="orch explain 10.0.0.2 192.0.2.1:21; orch explain [fd00::2]:40000 [fd00::1]:69 udp")(explain.explain)
cli.command(epilog="orch exporter; orch exporter --textfile /var/lib/node_exporter/orch.prom")(exporter.exporter)
cli.command(epilog="orch run profiles/ftp.yaml --netns blue")(runs.run)
cli.command(epilog="orch watch; orch watch ftp --netns blue --dry-run")(watch.watch)
cli.command(epilog="orch enable /etc/orch/ftp.yaml --now; orch enable profiles/ftp.yaml --dry-run")(enable.enable)
cli.command(epilog="orch disable ftp --now")(enable.disable)
cli.command(epilog="orch verify profiles/ftp.yaml")(verify.verify)
cli.command(epilog="orch completion bash > /etc/bash_completion.d/orch")(completion.completion)


def _address(option: str, text: str) -> str:
    import ipaddress

    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        raise UsageError(f"{option} takes an address, not {text!r}") from None


def _ports(option: str, text: str) -> tuple[int, int] | None:
    from orchestrator.model import PortRange

    first, _, last = text.partition("-")
    try:
        wanted = PortRange(int(first), int(last or first)) if text else None
    except ValueError:
        raise UsageError(f"{option} takes a range such as 1024-65535, not {text!r}") from None
    return (wanted.first, wanted.last) if wanted else None


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        with writing():
            sys.stdout.write(f"orch {__version__}\n")
        raise typer.Exit


@cli.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def run(argv: list[str]) -> int:
    """Run one command in a process that goes on; returns its exit code and never raises what a person could meet."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        return _run(argv)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(argv: list[str]) -> int:
    """As `run`, and signals are ignored once the work was done: until the process ends, they would belie its result."""
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    if completion.VARIABLE in os.environ:
        _prepare_completion()
    try:
        code = int(cli(args=argv, prog_name="orch", standalone_mode=False) or 0)
        with contextlib.suppress(BrokenPipeError), writing():
            sys.stdout.flush()
        return code
    except usage_error as error:
        return _usage(argv, error)
    except UsageError as error:
        return _fail(argv, error, ExitCode.USAGE)
    except Interrupted as error:
        return _fail(argv, error, 128 + error.signal_number)
    except RollbackError as error:
        return _fail(argv, error, ExitCode.MIXED)
    except OutputError as error:
        return _fail(argv, error, error.exit_code)
    except OrchError as error:
        return _fail(argv, error, ExitCode.FAILED)
    except BrokenPipeError:
        return ExitCode.OK
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # one with an errno ends Typer with 1
            raise
        return ExitCode.OK
    except OSError as error:
        return _fail(argv, _system_error(error), ExitCode.FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT


def _system_error(error: OSError) -> OrchError:
    return OrchError(error.strerror or str(error), where=str(error.filename or ""), cause="from the system")


def _prepare_completion() -> None:
    """Typer answers shells only where it may also install itself into their configuration; we want the first alone."""
    from typer.completion import completion_init  # type: ignore[attr-defined]  # re-exported without saying so

    completion_init()


def _usage(argv: list[str], error: Exception) -> int:
    context = getattr(error, "ctx", None)
    message = str(getattr(error, "format_message", lambda: str(error))())
    if not message or (context and message == context.get_help()):  # no command at all: older Typers show it themselves
        sys.stderr.write(f"{message}\n" if message else "")
        return ExitCode.USAGE
    return _fail(argv, UsageError(message), ExitCode.USAGE, usage=context.get_usage() + "\n" if context else "")


def _fail(argv: list[str], error: OrchError, code: int, *, usage: str = "") -> int:
    """Tell an error on stderr and, with --json, in the result line; streams that are gone are no reason to crash."""
    from orchestrator.views import human, machine

    is_json = "--json" in argv or os.environ.get("ORCH_JSON", "").lower() in _TRUE
    command = next((word for word in argv if not word.startswith("-")), "")
    with contextlib.suppress(OSError):
        paint = human.Paint(is_on=is_coloured(_asked_colour(argv), sys.stderr))
        sys.stderr.write(usage + human.error_text(error, paint))
    with contextlib.suppress(OSError):
        if is_json:
            sys.stdout.write(machine.result_line(command, code, error=machine.error_value(error)) + "\n")
    return int(code)


def _asked_colour(argv: list[str]) -> Colour:
    """What --color or ORCH_COLOR say, for errors that come before or instead of a parsed command line."""
    words = " ".join(argv).replace("--color ", "--color=").split(" ")
    asked = [word.partition("=")[2] for word in words if word.startswith("--color=")]
    wanted = (asked or [os.environ.get("ORCH_COLOR", "")])[-1]
    return Colour(wanted) if wanted in set(Colour) else Colour.AUTO


def _open_missing_streams() -> None:
    """What whoever started us closed leads nowhere; the next file that is opened would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def main() -> None:
    _open_missing_streams()
    gc.disable()  # a command ends before its garbage matters; looking for it takes a quarter of a large apply
    code = _run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # which was told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)
