"""The same wish twice: as a profile for orch, and as the files and commands that a person writes without it.

One FTP helper of conntrackd for `attachments` customers, each with a prefix and a port of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Command = Sequence[str]

_FIRST_PORT = 1024
_QUEUE = 0
# What attaches one: in nft a rule, or an element of the one map that orch writes; in iptables a rule.
_ATTACHED = {
    "nftables": re.compile(r'ct helper set "|: "[^"]+"(?=[,\s])'),
    "iptables": re.compile(r" --helper "),
}
_CONNTRACKD = """General {{
	LockFile {directory}/conntrackd.lock
	UNIX {{
		Path {directory}/conntrackd.ctl
	}}
	Syslog off
	LogFile off
}}
Helper {{
	Type ftp inet tcp {{
		QueueNum {queue}
		QueueLen 1024
		Policy ftp {{
			ExpectMax 1
			ExpectTimeout 300
		}}
	}}
}}
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Commands of one way to do it, by action, in the order in which they are measured; `undo` is not measured.

    `listing` prints the loaded rules, `attached` counts in that text what they attach.
    """

    who: str
    actions: tuple[tuple[str, tuple[Command, ...]], ...]
    undo: tuple[Command, ...]
    listing: Command
    attached: re.Pattern[str]


def by_orch(
    backend: str, attachments: int, *, orch: str, directory: Path, netns: str, engine: str = "conntrackd"
) -> Recipe:
    """What a user of orch types, with the profile written to `directory`."""
    profile = directory / "profile.yaml"
    profile.write_text(profile_text(backend, attachments, engine=engine))
    where = ("--netns", netns, "--state-dir", str(directory / "state"))
    apply = (orch, "apply", str(profile), *where)
    return Recipe(
        who="orch",
        actions=(
            ("apply", (apply,)),
            ("apply again", (apply,)),
            ("diff", ((orch, "diff", str(profile), *where),)),
            ("check", ((orch, "check", str(profile)),)),
        ),
        undo=((orch, "teardown", "-y", *where),),
        listing=_listing(backend, "orch-bench"),
        attached=_ATTACHED[backend],
    )


def by_hand(backend: str, attachments: int, *, directory: Path) -> Recipe:
    """What people type: one rule for each attachment, nfct for the registration, conntrackd as a daemon."""
    config, rules = directory / "conntrackd.conf", directory / "rules"
    config.write_text(_CONNTRACKD.format(directory=directory, queue=_QUEUE))
    is_nft = backend == "nftables"
    rules.write_text(nft_text(attachments) if is_nft else iptables_text(attachments))
    load = ("nft", "-f", str(rules)) if is_nft else ("iptables-restore", str(rules))
    listing = _listing(backend, "helpers")
    register = ("nfct", "helper", "add", "ftp", "inet", "tcp")
    remove = ("nft", "delete", "table", "inet", "helpers") if is_nft else ("iptables", "-t", "raw", "-F")
    return Recipe(
        who="by hand",
        actions=(
            ("apply", (register, load, ("conntrackd", "-d", "-C", str(config)))),
            ("apply again", (load,)),
            ("diff", (listing,)),
            ("check", (("nft", "-c", "-f", str(rules)) if is_nft else ("iptables-restore", "--test", str(rules)),)),
        ),
        undo=(remove, ("conntrackd", "-k", "-C", str(config)), ("nfct", "helper", "delete", "ftp", "inet", "tcp")),
        listing=listing,
        attached=_ATTACHED[backend],
    )


def profile_text(backend: str, attachments: int, *, engine: str) -> str:
    """A profile with one attach entry for each attachment."""
    entries = "".join(
        f"      - path: incoming\n        ports: {port}\n        saddr: {prefix}\n"
        for prefix, port in _customers(attachments)
    )
    head = f"profile: bench\nbackend: {backend}\nfamilies: ip\n"
    return f"{head}helpers:\n  ftp:\n    engine: {engine}\n    attach:\n{entries}"


def nft_text(attachments: int) -> str:
    """A table with one rule for each attachment, replaced as a whole when it is loaded again."""
    rules = "".join(
        f'\t\tct state new ip saddr {prefix} tcp dport {port} ct helper set "ftp-helper"\n'
        for prefix, port in _customers(attachments)
    )
    return (
        "table inet helpers\nflush table inet helpers\n"
        'table inet helpers {\n\tct helper ftp-helper {\n\t\ttype "ftp" protocol tcp\n\t\tl3proto ip\n\t}\n'
        "\tchain prerouting {\n\t\ttype filter hook prerouting priority mangle; policy accept;\n"
        f"{rules}\t}}\n}}\n"
    )


def iptables_text(attachments: int) -> str:
    """Table raw with one rule for each attachment."""
    rules = "".join(
        f"-A PREROUTING -s {prefix} -p tcp --dport {port} -j CT --helper ftp\n"
        for prefix, port in _customers(attachments)
    )
    return f"*raw\n{rules}COMMIT\n"


def _listing(backend: str, table: str) -> Command:
    if backend == "nftables":
        return ("nft", "list", "table", "inet", table)
    return ("iptables-save", "-t", "raw")


def _customers(count: int) -> tuple[tuple[str, int], ...]:
    """Prefix and port of each; no two are equal, none contains another."""
    return tuple((f"10.{i // 250}.{i % 250}.0/24", _FIRST_PORT + i) for i in range(count))
