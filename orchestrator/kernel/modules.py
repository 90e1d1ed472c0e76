"""Kernel modules: looked for without loading one, and loaded by modprobe."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from orchestrator.errors import PreflightError
from orchestrator.kernel.netlink import dump_request, exchange

_SYS_MODULE = Path("/sys/module")
_PROC_MODULES = Path("/proc/modules")
_LIB_MODULES = Path("/lib/modules")
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_GET = 1  # the command of that meaning in each of these subsystems
_SUBSYSTEMS = {"nf_conntrack_netlink": 1, "nfnetlink_cthelper": 9, "nf_tables": 10}

log = logging.getLogger(__name__)


class KernelModules:
    """ports.Modules by modprobe."""

    def load(self, name: str) -> None:
        """Load a module and what it depends on; nothing to do if it is there. Raises PreflightError."""
        if module_present(name):
            return
        result = _modprobe("--", name)
        if result.returncode != 0:
            raise PreflightError(
                f"cannot load the kernel module {name}",
                hint="install the package with all modules of the running kernel; "
                "after an update of the kernel, reboot; in a container, load it on the host",
                cause=result.stderr.strip() or f"modprobe exit code {result.returncode}",
            )
        log.info("loaded kernel module %s", name)


def module_present(name: str) -> bool:
    """True if a module is loaded or built in. Looks at files and loads nothing.

    /sys/module shows what is loaded, and a part of what is built in; modules.builtin lists the rest, and where that
    file is missing (a container) such a module is not seen. A kernel without loadable modules has neither list; it
    cannot load anything, so its subsystems are asked, and what is none is taken to be there: using it will tell.
    """
    if (_SYS_MODULE / name).is_dir() or name in builtin_modules(_LIB_MODULES / os.uname().release):
        return True
    if _PROC_MODULES.exists():
        return False
    return name not in _SUBSYSTEMS or _answers(_SUBSYSTEMS[name])


def available(names: tuple[str, ...]) -> frozenset[str]:
    """Those of `names` that are present or that modprobe would find; loads nothing."""
    return frozenset(name for name in names if module_present(name) or _loadable(name))


def ports(name: str) -> tuple[int, ...]:
    """What a loaded helper module was told as `ports=`; empty if nothing, or if it takes none."""
    try:
        text = (_SYS_MODULE / name / "parameters" / "ports").read_text(encoding="ascii")
    except OSError:
        return ()
    return tuple(int(part) for part in text.strip().split(",") if part.isdecimal())


@lru_cache(maxsize=4)
def builtin_modules(directory: Path) -> frozenset[str]:
    """Names in modules.builtin of a kernel's module directory, with `_` for `-`; empty if there is no such file."""
    try:
        lines = (directory / "modules.builtin").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(Path(line).name.partition(".")[0].replace("-", "_") for line in lines)


@lru_cache
def _answers(subsystem: int) -> bool:
    """True if a netfilter netlink subsystem is there; only for a kernel that cannot load it on being asked.

    Such an answer never changes, and a kernel that tries to load it all the same takes milliseconds to say no.
    """
    try:
        with closing(exchange(dump_request(subsystem=subsystem, command=_GET))) as messages:
            next(messages, None)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _loadable(name: str) -> bool:
    return shutil.which("modprobe", path=_SYSTEM_PATH) is not None and not _modprobe("--dry-run", "--", name).returncode


def _modprobe(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("modprobe", path=_SYSTEM_PATH)
    if program is None:
        raise PreflightError("modprobe is not installed", hint="install the package kmod")
    return subprocess.run(
        [program, *arguments],
        env={"PATH": _SYSTEM_PATH, "LANG": "C"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for orch, which lets the running step end
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
