"""`orch enable` and `orch disable`: a profile at every boot, as units of systemd."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator import complete
from orchestrator.errors import OrchError, PreflightError, RefusedError, UsageError
from orchestrator.session import (
    Colour,
    ColourOption,
    ExitCode,
    JsonOption,
    NetnsOption,
    ProfileArgument,
    QuietOption,
    TemplatesOption,
    VerboseOption,
    load,
    new_session,
    warn_all,
)

if TYPE_CHECKING:
    from orchestrator.model import Desired

UnitDirOption = Annotated[
    Path, typer.Option("--unit-dir", envvar="ORCH_UNIT_DIR", help="Where systemd reads the units of this host.")
]
_UNIT_DIR = Path("/etc/systemd/system")


def enable(
    profile: ProfileArgument,
    netns: NetnsOption = None,
    is_now: Annotated[bool, typer.Option("--now", envvar="ORCH_NOW", help="Start it, too.")] = False,
    is_dry_run: Annotated[
        bool, typer.Option("--dry-run", envvar="ORCH_DRY_RUN", help="Print the units, and change nothing.")
    ] = False,
    templates: TemplatesOption = None,
    unit_dir: UnitDirOption = _UNIT_DIR,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Apply a profile at every boot: write and enable units of systemd."""
    from orchestrator import boot

    session = new_session("enable", is_json, colour, verbose, is_quiet)
    if profile == "-":
        raise UsageError("orch enable takes a file", hint="it is read at every boot")
    desired = load(profile)
    warn_all(session, desired)
    file = Path(profile).resolve()
    options = ["--netns", netns] if netns else []
    options += ["--templates", str(templates.resolve())] if templates else []
    service = boot.service(
        desired.profile,
        argv=[*_program(), "run", str(file), *options],
        netns=netns or desired.netns,
        is_named=bool(netns),
    )
    units = boot.documents(service)
    content = {unit.name: unit.text for unit in units}
    _refuse_unseen(desired, file)
    if is_dry_run:
        return session.result(ExitCode.OK, _listing(content, unit_dir), units=content)
    _need_systemd(shlex.join(["orch", "apply", str(file), *options, "--confirm-within", "0"]))
    changed = boot.enable(units, unit_dir, is_now=is_now)
    words = "is enabled" if changed else "was enabled already"
    return session.result(ExitCode.OK, f"{service.service} {words}.\n", units=content, changed=list(changed))


def disable(
    profile: Annotated[
        str,
        typer.Argument(
            metavar="PROFILE", help="A profile's file or its name.", autocompletion=complete.applied_or_files
        ),
    ],
    netns: NetnsOption = None,
    is_now: Annotated[bool, typer.Option("--now", envvar="ORCH_NOW", help="Stop it, too: it is torn down.")] = False,
    unit_dir: UnitDirOption = _UNIT_DIR,
    is_json: JsonOption = False,
    colour: ColourOption = Colour.AUTO,
    verbose: VerboseOption = 0,
    is_quiet: QuietOption = False,
) -> ExitCode:
    """Take away the units that `orch enable` wrote, and nothing else."""
    from orchestrator import boot
    from orchestrator.model import is_profile_name

    session = new_session("disable", is_json, colour, verbose, is_quiet)
    desired = load(profile) if Path(profile).is_file() else None
    if desired is None and not is_profile_name(profile):
        raise OrchError(
            "cannot read the profile: no such file",
            where=profile,
            hint="give its name: systemctl list-unit-files 'orch-*' lists the units",
        )
    name = desired.profile if desired else profile
    where = netns or (desired.netns if desired else None)
    names = boot.names(name, Path(netns or "").name)
    if any((unit_dir / unit).exists() for unit in names):
        _need_systemd("")
    path = None if where is None else boot.path_of(where)
    removed = boot.disable(names, unit_dir, is_now=is_now, netns_path=path)
    for other in [] if removed or netns else sorted(unit_dir.glob(f"orch-{name}@*.service")):
        session.warn(f"{other.name} is enabled: give its namespace with --netns")
    words = "is disabled" if removed else "was not enabled"
    return session.result(ExitCode.OK, f"{names[0]} {words}.\n", removed=list(removed))


def _program() -> list[str]:
    """This orch, as it is called from anywhere."""
    script = Path(sys.executable).with_name("orch")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "orchestrator"]


def _refuse_unseen(desired: Desired, file: Path) -> None:
    """Raises RefusedError where a file of the profile lies where a service cannot read it."""
    from orchestrator import boot

    for needed in (file, *(Path(native.file) for native in desired.natives if native.file)):
        if any(needed.is_relative_to(directory) for directory in boot.UNSEEN):
            raise RefusedError(f"a service does not see {needed}", hint="put it into /etc/orch")


def _need_systemd(command: str) -> None:
    """Raises PreflightError, with what to do instead."""
    from orchestrator.kernel.machine import has_systemd

    if not has_systemd():
        hint = f"put this into the boot scripts, after the namespaces and the firewall: {command}" if command else ""
        raise PreflightError("this host does not run systemd", hint=hint)


def _listing(units: dict[str, str], unit_dir: Path) -> str:
    return "\n".join(f"# {unit_dir / name}\n{text}" for name, text in units.items())
