"""Rules in iptables: two chains per profile and family in table raw, loaded by iptables-restore."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from orchestrator.engine.privileges import end_with_parent
from orchestrator.errors import HalfDoneError, KernelError, OrchError, PreflightError
from orchestrator.kernel.netns import entered, scratch
from orchestrator.kernel.nft import errno_in, nft_tables
from orchestrator.kernel.normalise import iptables_listing, own_lines
from orchestrator.model import Backend, L3Proto, Listing, Netns, Rules, is_profile_name

log = logging.getLogger(__name__)

_PROGRAMS = {
    (Backend.IPTABLES, L3Proto.IP): "iptables",
    (Backend.IPTABLES, L3Proto.IP6): "ip6tables",
    (Backend.IPTABLES_LEGACY, L3Proto.IP): "iptables-legacy",
    (Backend.IPTABLES_LEGACY, L3Proto.IP6): "ip6tables-legacy",
    (Backend.IPTABLES_NFT, L3Proto.IP): "iptables-nft",
    (Backend.IPTABLES_NFT, L3Proto.IP6): "ip6tables-nft",
}
_TABLE_NAMES = {L3Proto.IP: "ip_tables_names", L3Proto.IP6: "ip6_tables_names"}
_LOCK_WAIT_S = 5  # for /run/xtables.lock, which every legacy program takes
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_OWN_CHAIN = re.compile(r"^:orch-([a-z0-9-]+)-pre ", re.MULTILINE)
_FOREIGN_HELPER = re.compile(r'^-A (?!orch-)\S+ .*-j CT .*--helper "?([^\s"]+)', re.MULTILINE)
_REASONS = (
    ("No chain/target/match by that name", errno.ENOENT),
    ("you must be root", errno.EPERM),
    ("xtables lock", errno.EBUSY),
)
# What iptables-legacy-restore says of a rule that the kernel refused, without a reason: here, an unknown helper.
_REFUSED = re.compile(r"restore: line \d+ failed")


class IptablesRules:
    """ports.RuleBackend for one iptables variant. Two families are two commits; a failed second undoes the first.

    To load again, and to undo that, leaves our jumps where they are among the rules of others.
    A look where the program is not installed finds nothing; a load raises PreflightError.
    """

    def __init__(self, backend: Backend, note: Callable[[int], None] = lambda _pid: None) -> None:
        """`note` is told the pid of each program that is about to change rules."""
        self._backend = backend
        self._note = note

    def load(self, netns: Netns, rules: Rules) -> None:
        with entered(netns):
            self._load(rules)

    def listing(self, netns: Netns, profile: str) -> Listing | None:
        with entered(netns):
            return iptables_listing(self._backend, profile, self._saved())

    def profiles(self, netns: Netns) -> tuple[str, ...]:
        with entered(netns):
            names = {name for text in self._saved().values() for name in _OWN_CHAIN.findall(text)}
        return tuple(sorted(name for name in names if is_profile_name(name)))

    def flush(self, netns: Netns, profile: str) -> None:
        with entered(netns):
            for family, lines in self._own(profile).items():
                chains = [line for line in lines if line.startswith(":")]
                self._restore(family, profile, _table(chains), operation="flush rules")

    def remove(self, netns: Netns, profile: str) -> None:
        with entered(netns):
            self._remove(profile)

    def expected(self, rules: Rules) -> Listing:
        there = IptablesRules(self._backend)  # nobody listens
        with scratch():
            try:
                there._load(rules)
                listing = iptables_listing(self._backend, rules.profile, self._saved())
            finally:
                # A namespace ends some time after it is left; until then its rules would refer to the registrations.
                there._remove(rules.profile)
        if listing is None:
            raise KernelError("list rules", f"orch-{rules.profile}", errno.ENOENT)
        return listing

    def version(self) -> str:
        result = _run(_PROGRAMS[self._backend, L3Proto.IP], "--version")
        return result.stdout.strip() if result is not None else ""

    def foreign_references(self, netns: Netns) -> frozenset[str]:
        with entered(netns):
            return frozenset(name for text in self._saved().values() for name in _FOREIGN_HELPER.findall(text))

    def _load(self, rules: Rules) -> None:
        texts = {_family_of(d.name): d.text for d in rules.documents}
        before = self._own(rules.profile)
        begun: list[L3Proto] = []
        try:
            for family in sorted({*texts, *before}):
                lines = before.get(family, ())
                text = _replacement(texts.get(family, "").splitlines(), lines)
                self._restore(family, rules.profile, text, operation="load rules")
                begun.append(family)
        except (OrchError, OSError) as error:
            self._undo(rules.profile, {family: before.get(family, ()) for family in begun}, error)
            raise

    def _undo(self, profile: str, before: Mapping[L3Proto, tuple[str, ...]], cause: Exception) -> None:
        """Raises HalfDoneError."""
        try:
            now = self._own(profile)
            for family, lines in before.items():
                text = _replacement(lines, now.get(family, ()))
                self._restore(family, profile, text, operation="put back rules")
        except (KernelError, OSError) as error:
            detail = f"{cause}; and what was there could not be put back: {error}"
            raise HalfDoneError("load rules", f"orch-{profile}", error.errno or 0, detail=detail) from error

    def _remove(self, profile: str) -> None:
        for family, lines in self._own(profile).items():
            self._restore(family, profile, _replacement((), lines), operation="remove rules")

    def _own(self, profile: str) -> dict[L3Proto, tuple[str, ...]]:
        """Our lines by family; families without any are left out."""
        lines = {family: own_lines(text, profile) for family, text in self._saved().items()}
        return {family: own for family, own in lines.items() if own}

    def _saved(self) -> dict[L3Proto, str]:
        """Table raw of each family that has one; loads no kernel module.

        What cannot be read is no table without rules: raises KernelError.
        """
        found = {}
        for family in self._families("raw"):
            program = _PROGRAMS[self._backend, family]
            result = _run(f"{program}-save", "-t", "raw")
            if result is not None and result.returncode != 0:
                detail = _detail(result.stderr)
                raise KernelError("list rules", f"{program} raw", _errno_of(detail), detail=detail)
            if result is not None:
                found[family] = result.stdout
        return found

    def _families(self, table: str) -> tuple[L3Proto, ...]:
        variant = _variant_of(self._backend)
        return families_with(table, variant) if variant else ()

    def _restore(self, family: L3Proto, profile: str, text: str, *, operation: str) -> None:
        program = _PROGRAMS[self._backend, family]
        result = _run(f"{program}-restore", "--noflush", "-w", str(_LOCK_WAIT_S), given=text, note=self._note)
        if result is None:
            raise PreflightError(f"{program}-restore is not installed", hint="install the package iptables")
        if result.returncode != 0:
            detail = _detail(result.stderr)
            raise KernelError(operation, f"{program} raw orch-{profile}", _errno_of(detail), detail=detail)


def families_with(table: str, variant: str) -> tuple[L3Proto, ...]:
    """Families in which a table of an iptables variant exists in this namespace; loads no kernel module.

    Asking the legacy programs would create the table. Source: ip_tables.c, xt_find_table_lock; names in procfs.
    """
    if variant == "nft":
        tables = nft_tables()
        return tuple(family for family in L3Proto if (str(family), table) in tables)
    return tuple(family for family in L3Proto if table in _legacy_tables(family))


def saved_table(program: str, table: str) -> str | None:
    """What `PROGRAM-save -t TABLE` prints; None where the program is missing or cannot read the table."""
    result = _run(f"{program}-save", "-t", table)
    return result.stdout if result is not None and result.returncode == 0 else None


def variant() -> Backend:
    """Which variant the name `iptables` stands for on this host; the nft one where it is not installed."""
    return Backend.IPTABLES_LEGACY if _variant_of(Backend.IPTABLES) == "legacy" else Backend.IPTABLES_NFT


def _variant_of(backend: Backend) -> str:
    """`legacy` or `nft`; empty if not installed. The name `iptables` says neither, its version does."""
    if backend is Backend.IPTABLES_LEGACY:
        return "legacy"
    if backend is Backend.IPTABLES_NFT:
        return "nft"
    result = _run("iptables", "--version")
    if result is None:
        return ""
    return "nft" if "nf_tables" in result.stdout else "legacy"


def _legacy_tables(family: L3Proto) -> tuple[str, ...]:
    try:
        return tuple(Path("/proc/thread-self/net", _TABLE_NAMES[family]).read_text(encoding="ascii").split())
    except (FileNotFoundError, PermissionError):
        return ()


def _family_of(document: str) -> L3Proto:
    return L3Proto.IP6 if document.endswith(".ip6tables") else L3Proto.IP


def _table(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in ("*raw", *lines, "COMMIT"))


def _replacement(wanted: Iterable[str], current: Iterable[str]) -> str:
    """A document that makes of our lines in one family others, in one commit; declaring a chain of ours empties it.

    A jump that is there stays where it is among the rules of others, as long as both name it in the same words (those
    of iptables-save). What is missing comes last.
    """
    chains, rules, jumps = _parts(wanted)
    old_chains, _, old_jumps = _parts(current)
    gone = [chain for chain in old_chains if chain not in chains]
    changes = [_jump_changes(jumps.get(hook, []), old_jumps.get(hook, [])) for hook in sorted({*jumps, *old_jumps})]
    return _table(
        (
            *(f":{chain} - [0:0]" for chain in (*chains, *gone)),
            *(jump.replace("-A", "-D", 1) for surplus, _ in changes for jump in surplus),
            *rules,
            *(jump for _, missing in changes for jump in missing),
            *(f"-X {chain}" for chain in gone),
        )
    )


def _parts(lines: Iterable[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Our chains, the rules in them, and the jumps to them by the chain that they are in."""
    stripped = [line.strip() for line in lines]
    chains = [line.split()[0].removeprefix(":") for line in stripped if line.startswith(":")]
    rules: list[str] = []
    jumps: dict[str, list[str]] = {}
    for line in stripped:
        if line.startswith("-A "):
            chain = line.split()[1]
            (rules if chain in chains else jumps.setdefault(chain, [])).append(line)
    return chains, rules, jumps


def _jump_changes(wanted: list[str], current: list[str]) -> tuple[list[str], list[str]]:
    """Jumps of one chain to delete, and then to append, so that as few as possible move.

    By their text, of which the first that is equal goes: a number would be that of another rule if somebody inserts
    one meanwhile.
    """
    kept = next(n for n in range(len(wanted), -1, -1) if _last_of(current, wanted[:n]) == wanted[:n])
    return list((Counter(current) - Counter(wanted[:kept])).elements()), wanted[kept:]


def _last_of(lines: list[str], kept: list[str]) -> list[str]:
    """What is left, in order, if of equal lines only the last ones stay, as many as there are in `kept`."""
    places = {text: [i for i, line in enumerate(lines) if line == text] for text in {*kept}}
    counts = Counter(kept)
    return [lines[i] for i in sorted(i for text, found in places.items() for i in found[-counts[text] :])]


def _detail(stderr: str) -> str:
    """The lines of an error text that say something, in one."""
    lines = (line.strip() for line in stderr.splitlines())
    return "; ".join(line for line in lines if line and not line.startswith(("#", "Try `", "Warning")))


def _errno_of(detail: str) -> int:
    for reason, number in _REASONS:
        if reason in detail:
            return number
    return errno.ENOENT if _REFUSED.search(detail) else errno_in(detail)


def _run(
    program: str, *arguments: str, given: str = "", note: Callable[[int], None] = lambda _pid: None
) -> subprocess.CompletedProcess[str] | None:
    """Run a program in this thread's namespace; None if it is not installed. It is noted before it reads.

    One that is given rules ends with this process: else it could load them after the next orch has undone all.
    """
    path = shutil.which(program, path=_SYSTEM_PATH)
    if path is None:
        return None
    log.debug("%s %s", path, " ".join(arguments))
    with subprocess.Popen(
        [path, *arguments],
        env={"PATH": _SYSTEM_PATH, "LANG": "C"},
        start_new_session=True,  # Ctrl-C is for orch, which lets the running step end
        preexec_fn=partial(_end_with, os.getpid()) if given else None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        note(child.pid)
        out, err = child.communicate(given)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def _end_with(parent: int) -> None:
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
