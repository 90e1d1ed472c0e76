"""What a host has, read without changing anything: versions, capabilities, security modules."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import OrchError
from orchestrator.kernel.nft import NftSession, nft_is_present
from orchestrator.kernel.procfs import read_text
from orchestrator.ports import Machine

_PROGRAMS = ("iptables", "conntrackd", "modprobe")
_CAP_NET_ADMIN = 12
_INITIAL_USERNS = 0xEFFFFFFD  # inode of the first user namespace. Source: proc_ns.h, PROC_USER_INIT_INO
_WITHIN_S = 10
UNKNOWN = "installed, of a version that it did not tell"


def machine(find: Callable[[str], str | None]) -> Machine:
    """`find` is where a program is, None if it is not installed."""
    has_net_admin = bool(_effective_capabilities() >> _CAP_NET_ADMIN & 1)
    # iptables-nft asks the kernel before it reads its arguments, which loads nfnetlink.
    silent = () if nft_is_present() else ("iptables",)
    return Machine(
        release=os.uname().release,
        python=(sys.version_info.major, sys.version_info.minor),
        has_net_admin=has_net_admin,
        is_initial_userns=Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USERNS,
        modules_dir=Path("/lib/modules", os.uname().release, "modules.dep").exists(),
        is_loading_allowed=read_text("/proc/sys/kernel/modules_disabled") in ("", "0"),
        libnftables=_libnftables(may_ask=has_net_admin and nft_is_present()),
        programs={name: _version(find(name), may_run=name not in silent) for name in _PROGRAMS},
        has_seccomp=_has_library("libseccomp.so.2"),
        lsm=tuple(name for name in read_text("/sys/kernel/security/lsm").split(",") if name),
        has_systemd=has_systemd(),
    )


def has_systemd() -> bool:
    """Whether systemd manages this host. Source: sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()


def _effective_capabilities() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def _libnftables(*, may_ask: bool) -> str:
    """Version of libnftables, empty if it is not installed; it tells only where it may list what nf_tables has."""
    if not _has_library("libnftables.so.1"):
        return ""
    if not may_ask:
        return UNKNOWN
    try:
        return str(NftSession().objects("list chains", "metainfo")[0]["version"])
    except OrchError:
        return UNKNOWN


def _version(path: str | None, *, may_run: bool) -> str:
    """The first line that a program says of its version; empty if it is not installed."""
    if path is None:
        return ""
    if not may_run:
        return UNKNOWN
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_WITHIN_S,
            check=False,
        )
        return next((line.strip() for line in done.stdout.splitlines() if line.strip()), UNKNOWN)
    return UNKNOWN


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
