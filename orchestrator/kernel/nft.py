"""Rules in nftables, through libnftables: one table per profile, replaced in place."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import nftables

from orchestrator.errors import KernelError, PreflightError
from orchestrator.kernel.modules import module_present
from orchestrator.kernel.netlink import HEADER_BYTES, dump, dump_request
from orchestrator.kernel.netns import entered, scratch
from orchestrator.kernel.normalise import nft_listing
from orchestrator.model import Listing, Netns, Rules, is_profile_name

log = logging.getLogger(__name__)

_TABLES = dump_request(subsystem=10, command=1)  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*
_OWN_PREFIX = "orch-"
_LIBRARY = "libnftables.so.1"
# A chain, set, object... in the text of a table, as nft lists it and as a template may write it.
_LISTED = re.compile(r"^\t((?:ct )?[a-z]+) (\S+) \{", re.MULTILINE)
_WRITTEN = re.compile(r"^\s*((?:ct )?[a-z]+) (\S+) \{", re.MULTILINE)
_FIXED = ("ct helper",)
_DELETE_FIRST = ("map", "set")  # they can refer to chains and objects
_ERRNO_BY_TEXT = {os.strerror(number): number for number in errno.errorcode}


class NftRules:
    """ports.RuleBackend for nftables. Errors are KernelError with the errno that nft's message names."""

    def load(self, netns: Netns, rules: Rules) -> None:
        with entered(netns):
            _replace(NftSession(), rules)

    def listing(self, netns: Netns, profile: str) -> Listing | None:
        with entered(netns):
            return _listing(NftSession(), profile) if nft_is_present() else None

    def profiles(self, netns: Netns) -> tuple[str, ...]:
        with entered(netns):
            names = [name for family, name in nft_tables() if is_own_table(family, name)]
        return tuple(sorted(p for n in names if is_profile_name(p := n.removeprefix(_OWN_PREFIX))))

    def flush(self, netns: Netns, profile: str) -> None:
        with entered(netns):
            if nft_is_present():
                _on_table("flush", NftSession(), profile)

    def remove(self, netns: Netns, profile: str) -> None:
        with entered(netns):
            if nft_is_present():
                _on_table("delete", NftSession(), profile)

    def expected(self, rules: Rules) -> Listing:
        with scratch():
            session = NftSession()
            try:
                _replace(session, rules)
                listing = _listing(session, rules.profile)
            finally:
                # A namespace ends some time after it is left; until then its rules would refer to the registrations.
                _on_table("delete", session, rules.profile)
        if listing is None:
            raise KernelError("list rules", _table(rules.profile), errno.ENOENT)
        return listing

    def version(self) -> str:
        # Listing chains is cheap; for any other list nft 1.0.6 first reads the contents of every table.
        return f"nftables {NftSession().objects('list chains', 'metainfo')[0]['version']}"

    def foreign_references(self, netns: Netns) -> frozenset[str]:
        with entered(netns):
            foreign = [table for table in nft_tables() if not is_own_table(*table)]
            session = NftSession()
            return frozenset(str(o["type"]) for table in foreign for o in _helper_objects(session, *table))


class NftSession:
    """libnftables in the network namespace of the calling thread, which must stay there: text in, text or JSON out."""

    def __init__(self) -> None:
        try:
            ctypes.cdll.LoadLibrary(_LIBRARY)  # first: a context that was not made complains when it is deleted
            self._context = nftables.Nftables(_LIBRARY)
        except OSError as error:
            raise PreflightError("libnftables is not installed", hint="install the package libnftables1") from error
        self._context.set_stateless_output(True)

    def text(self, command: str, *, operation: str, key: str) -> str:
        """Run one batch; raises KernelError."""
        log.debug("nft, %d bytes: %.200s", len(command), command)
        self._context.set_json_output(False)
        code, output, error = self._context.cmd(command)
        if code != 0:
            raise _kernel_error(error, operation=operation, key=key)
        return str(output)

    def objects(self, command: str, kind: str) -> tuple[Mapping[str, Any], ...]:
        """Everything of one kind that a list command says; raises KernelError."""
        return tuple(item[kind] for item in self.listed(command) if kind in item)

    def listed(self, command: str) -> tuple[Mapping[str, Any], ...]:
        """The items of a list command, each a mapping of its kind to itself; raises KernelError."""
        self._context.set_json_output(True)
        code, output, error = self._context.cmd(command)
        if code != 0:
            raise _kernel_error(error, operation="list rules", key=command.removeprefix("list "))
        return tuple(json.loads(output)["nftables"]) if output else ()


class _Part(NamedTuple):
    """A chain, set or object of a table, which survives `flush table`.

    `content` is that of a helper object and empty for the rest: declared again with another type, an object of that
    name stays what it was, and the kernel reports success.
    """

    kind: str
    name: str
    content: str


def _helper_objects(session: NftSession, family: str, table: str) -> tuple[Mapping[str, Any], ...]:
    """Those of a table; none where it has gone meanwhile."""
    try:
        return session.objects(f"list ct helpers table {family} {table}", "ct helper")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return ()


def nft_is_present() -> bool:
    """True if nf_tables can be asked without loading it."""
    return module_present("nf_tables")


def nft_tables() -> tuple[tuple[str, str], ...]:
    """Family and name of all tables of the calling thread's namespace; loads no kernel module. Raises KernelError.

    Asked without libnftables, which reads the contents of every table to list their names (1.0.6).
    """
    if not nft_is_present():
        return ()
    try:
        return dump(_TABLES, lambda messages: tuple(_table_of(message) for message in messages))
    except OSError as error:
        raise KernelError("list tables", "of nftables", error.errno or 0, detail=error.strerror or "") from error


def is_own_table(family: str, name: str) -> bool:
    return family == "inet" and name.startswith(_OWN_PREFIX)


def errno_in(text: str) -> int:
    """The errno whose message a tool's error text quotes, the last one in it; EINVAL if there is none."""
    places = {text.rfind(message): number for message, number in _ERRNO_BY_TEXT.items() if message in text}
    return places[max(places)] if places else errno.EINVAL


def _table_of(message: bytes) -> tuple[str, str]:
    """Family and name in an NFT_MSG_NEWTABLE. The name is the first attribute: nf_tables_api.c, fill_table_info."""
    family = _FAMILIES.get(message[HEADER_BYTES - 4], "unspec")
    (length,) = struct.unpack_from("=H", message, HEADER_BYTES)
    return family, message[HEADER_BYTES + 4 : HEADER_BYTES + length].rstrip(b"\0").decode(errors="backslashreplace")


def _table(profile: str) -> str:
    return f"inet {_OWN_PREFIX}{profile}"


def _replace(session: NftSession, rules: Rules) -> None:
    """Load the document, and delete in the same batch whatever else is in the table.

    The table itself stays: deleting it, or a base chain, drops the packets that wait in a queue of this namespace.
    """
    table = _table(rules.profile)
    (document,) = rules.documents
    current = _on_table("list", session, rules.profile) or ""
    if "\tflags dormant\n" in current:
        session.text(f"table {table}\n", operation="load rules", key=table)  # not in one batch with deleting chains
    present = _parts(current, _LISTED)
    try:
        _load(session, table, present - _parts(document.text, _WRITTEN), document.text)
    except KernelError as error:
        if error.errno not in (errno.EEXIST, errno.EOPNOTSUPP):
            raise
        # Somebody put a chain of our name on another hook or priority, which cannot be changed in place.
        _load(session, table, present, document.text)


def _load(session: NftSession, table: str, surplus: set[_Part], text: str) -> None:
    ordered = sorted(surplus, key=lambda part: (part.kind not in _DELETE_FIRST, part))
    deletions = "".join(f"delete {part.kind} {table} {part.name}\n" for part in ordered)
    session.text(f"table {table}\nflush table {table}\n{deletions}{text}", operation="load rules", key=table)


def _parts(text: str, pattern: re.Pattern[str]) -> set[_Part]:
    """All that a pattern finds in the text of a table."""
    return {
        _Part(m[1], m[2], _words(text[m.end() : text.index("}", m.end())]) if m[1] in _FIXED else "")
        for m in pattern.finditer(text)
    }


def _words(text: str) -> str:
    return " ".join(text.replace(";", " ").split())


def _listing(session: NftSession, profile: str) -> Listing | None:
    text = _on_table("list", session, profile)
    return None if text is None else nft_listing(text)


def _on_table(verb: str, session: NftSession, profile: str) -> str | None:
    """List, flush or delete the table of a profile; None if there is no such table."""
    table = _table(profile)
    try:
        return session.text(f"{verb} table {table}", operation=f"{verb} rules", key=table)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _kernel_error(text: str, *, operation: str, key: str) -> KernelError:
    """nft 1.0.6 quotes the first line of a batch whichever line was wrong, so only its words are kept."""
    message = next((line for line in text.splitlines() if line.startswith("Error: ")), text.strip())
    return KernelError(operation, key, errno_in(message), detail=message.removeprefix("Error: "))
