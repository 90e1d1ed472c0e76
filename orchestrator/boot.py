"""A profile at every boot: the units of systemd that `orch enable` writes, and `orch disable` takes away.

The first line of a unit that we wrote has the digest of the others: what somebody has changed is neither overwritten
nor removed. Changes belong into drop-ins (systemctl edit), which are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import OrchError, RefusedError, UsageError
from orchestrator.model import Document
from orchestrator.render import builtin_templates

UNIT_DIR = Path("/etc/systemd/system")
LOADERS = ("nftables.service", "firewalld.service", "netfilter-persistent.service")
"""Those that load a whole ruleset, and flush what there was."""

UNSEEN = tuple(map(Path, ("/home", "/root", "/run/user", "/tmp", "/var/tmp")))
"""What the unit does not see (ProtectHome=, PrivateTmp=)."""

_EXPORTER = "orch-exporter.service"
_NAMES = Path("/run/netns")
_MARK = re.compile(r"# Written by orch enable, to be changed by systemctl edit alone; digest ([0-9a-f]{16})\n")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+,=-]+")
_OF_A_UNIT_NAME = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass(frozen=True, slots=True)
class Service:
    """A profile as units of systemd, and what they say.

    `service` is the name of the one that runs `command`, `again` of the one that has the profile applied again, `path`
    of the one that waits for the namespace at `netns_path`; both are empty where the profile is for the host's.
    """

    title: str
    command: str
    service: str
    again: str
    path: str = ""
    netns_path: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.service, self.again, self.path)))


SHIPPED = Service(
    title="%i",
    command="/usr/bin/orch run /etc/orch/%i.yaml",
    service="orch@%i.service",
    again="orch_again@%i.service",
)
"""What contrib/systemd has: any profile of /etc/orch."""


def names(profile: str, netns: str) -> tuple[str, str, str]:
    """How the units of a profile are called: `service`, `again` and `path`; with a namespace if that was named."""
    at = f"@{netns}" if netns else ""
    return f"orch-{profile}{at}.service", f"orch-{profile}_again{at}.service", f"orch-{profile}{at}.path"


def service(profile: str, *, argv: Sequence[str], netns: str, is_named: bool) -> Service:
    """The service of a profile in a namespace, by name or path; `is_named` has it in the names of the units too.

    Raises UsageError for a namespace that no boot will bring back under that name, and for a name that is taken.
    """
    path = path_of(netns)
    label = Path(path).name
    if path.startswith("/proc/"):
        raise UsageError(f"{netns} is gone after a boot", hint="give the namespace a name: ip netns attach")
    if label and not _OF_A_UNIT_NAME.fullmatch(label):
        raise UsageError(f"namespace {label!r} cannot be part of a unit's name", hint="letters, digits and _.:- can")
    runs, again, waits = names(profile, label if is_named else "")
    if runs == _EXPORTER:
        raise UsageError(f"{runs} is that of orch exporter", hint="rename the profile")
    return Service(
        title=f"{profile}, netns {label}" if label else profile,
        command=" ".join(map(_word, argv)),
        service=runs,
        again=again,
        path=waits if path else "",
        netns_path=path.replace("%", "%%"),
    )


def path_of(netns: str) -> str:
    """The path of a namespace that was given by name or path; empty for the host's."""
    return str(_NAMES / netns) if netns and "/" not in netns else netns


def documents(unit: Service) -> tuple[Document, ...]:
    """The files of a service, by name; the first is the service itself."""
    templates = ("orch.service", "orch_again.service", "orch.path")
    texts = (render(template, unit) for template in templates[: len(unit.names)])
    return tuple(Document(name, _marked(text)) for name, text in zip(unit.names, texts, strict=True))


def render(template: str, unit: Service) -> str:
    """One unit, without the mark of ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(builtin_templates()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(f"{template}.j2").render(unit=unit, loaders=" ".join(LOADERS))


def is_ours(text: str) -> bool:
    """Whether a unit is as we wrote it, by this version or another."""
    mark = _MARK.match(text)
    return mark is not None and mark[1] == _digest(text[mark.end() :])


def enable(units: Iterable[Document], directory: Path, *, is_now: bool) -> tuple[str, ...]:
    """Write the units, enable them, and start them with `is_now`; the names of those that are new or other than before.

    A failure leaves all as it was. Raises RefusedError for a file that is not as we wrote it, or a service that is for
    another namespace, and OrchError.
    """
    wanted = {directory / unit.name: unit.text for unit in units}
    before = _contents(wanted)
    for path, text in before.items():
        if text is not None and (there := _place(text)) != _place(wanted[path]):
            raise RefusedError(
                f"{path.name} is for {_said(there)} already",
                hint="--netns gives another namespace units of its own, or orch disable takes those away",
            )
    changed = tuple(path.name for path, text in wanted.items() if before[path] != text)
    names = [path.name for path in wanted]
    try:
        if changed:
            _write(wanted)
            systemctl("daemon-reload")
        systemctl("enable", *names)
        if is_now:
            systemctl("start", *names)
    except OrchError:
        _take_back(before)
        raise
    return changed


def disable(names: Iterable[str], directory: Path, *, is_now: bool, netns_path: str | None = None) -> tuple[str, ...]:
    """Disable units, stop them first with `is_now`, and remove their files; the names of those that were there.

    Raises RefusedError for a file that is not as we wrote it, or a service that is for another namespace than that at
    `netns_path` (empty for the host's, None for any), and OrchError.
    """
    there = {path: text for path, text in _contents(directory / name for name in names).items() if text is not None}
    if not there:
        return ()
    for path, text in there.items():
        if netns_path is not None and (place := _place(text)) not in (None, netns_path):
            named = f" and --netns {place}" if "@" in path.name else ""
            raise RefusedError(
                f"{path.name} is for {_said(place)}",
                hint=f"orch disable with the name of the profile{named} takes it away",
            )
    found = tuple(path.name for path in there)
    if is_now:
        systemctl("stop", *sorted(found, key=lambda name: not name.endswith(".path")))  # it would start the service
    systemctl("disable", *found)
    _write(dict.fromkeys(there))
    systemctl("daemon-reload")
    return found


def systemctl(*words: str) -> None:
    """Raises OrchError with what it said."""
    try:
        done = subprocess.run(
            ["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise OrchError(f"cannot run systemctl: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise OrchError(
            f"systemctl {words[0]} failed: {said[0] if said else f'exit code {done.returncode}'}",
            where=" ".join(words[1:]),
            hint="journalctl -u has what it said" if words[0] == "start" else "",
        )


def _contents(paths: Iterable[Path]) -> dict[Path, str | None]:
    """What is in our files now, None for none. Raises RefusedError for one that is not as we wrote it."""
    texts = {path: path.read_text(errors="replace") if path.exists() else None for path in paths}
    for path, text in texts.items():
        if text is not None and not is_ours(text):
            raise RefusedError(
                f"{path} is not as orch wrote it",
                hint="move the changes into a drop-in (systemctl edit), and remove the file",
            )
    return texts


def _place(text: str) -> str | None:
    """The path of the namespace that a service is for, empty for the host's; None for what is no such service."""
    if not re.search(r"^ExecStart=.* run ", text, re.MULTILINE):
        return None
    found = re.search(r"^ConditionPathExists=(.*)$", text, re.MULTILINE)
    return found[1].replace("%%", "%") if found else ""


def _said(netns_path: str | None) -> str:
    return f"netns {netns_path}" if netns_path else "the namespace of the host"


def _write(texts: Mapping[Path, str | None]) -> None:
    """Raises OrchError."""
    for path, text in texts.items():
        try:
            if text is None:
                path.unlink(missing_ok=True)
            else:
                _write_whole(path, text)
        except OSError as error:
            hint = "run as root" if isinstance(error, PermissionError) else ""
            raise OrchError(f"cannot write {path}: {error.strerror}", hint=hint) from error


def _write_whole(path: Path, text: str) -> None:
    """All of it, or nothing: nobody sees half a file. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _take_back(before: Mapping[Path, str | None]) -> None:
    new = [path.name for path, text in before.items() if text is None]
    with contextlib.suppress(OrchError):
        if new:
            systemctl("disable", "--now", *new)
            systemctl("reset-failed", *new)
    with contextlib.suppress(OrchError):
        _write(before)
        systemctl("daemon-reload")


def _marked(text: str) -> str:
    return f"# Written by orch enable, to be changed by systemctl edit alone; digest {_digest(text)}\n{text}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _word(text: str) -> str:
    """One word of a command line, as systemd.service(5) and systemd.syntax(7) want it."""
    escaped = text.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(text):
        return escaped
    quoted = escaped.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{quoted}"'
