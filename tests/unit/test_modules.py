"""Presence of kernel modules, as files show it."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from orchestrator.errors import PreflightError
from orchestrator.kernel import modules

BUILTIN = "kernel/net/netfilter/nf_tables.ko\nkernel/fs/nls/nls-base.ko\n\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/module, /lib/modules and /proc of a kernel that can load modules."""
    (tmp_path / "sys").mkdir()
    (tmp_path / "proc_modules").touch()
    monkeypatch.setattr(modules, "_SYS_MODULE", tmp_path / "sys")
    monkeypatch.setattr(modules, "_PROC_MODULES", tmp_path / "proc_modules")
    monkeypatch.setattr(modules, "_LIB_MODULES", tmp_path / "lib")
    return tmp_path


def test_nothing_is_present_where_no_file_says_so(system: Path) -> None:
    assert system.exists()
    assert not modules.module_present("nf_tables")


def test_a_loaded_module_is_present(system: Path) -> None:
    (system / "sys" / "nfnetlink_cthelper").mkdir()
    assert modules.module_present("nfnetlink_cthelper")


def test_a_built_in_module_is_present(system: Path) -> None:
    directory = system / "lib" / os.uname().release
    directory.mkdir(parents=True)
    (directory / "modules.builtin").write_text(BUILTIN)
    assert modules.module_present("nf_tables")
    assert modules.module_present("nls_base")
    assert not modules.module_present("nf_table")


def test_ports_that_a_module_was_told(system: Path) -> None:
    assert modules.ports("nf_conntrack_ftp") == ()
    file = system / "sys" / "nf_conntrack_ftp" / "parameters" / "ports"
    file.parent.mkdir(parents=True)
    file.write_text("21,2121\n")
    assert modules.ports("nf_conntrack_ftp") == (21, 2121)


def test_a_kernel_without_modules_is_asked_for_its_subsystems(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc_modules").unlink()

    def refuse(request: bytes) -> Generator[bytes, None, None]:
        raise OSError(errno.EINVAL if request[5] == 9 else errno.EPERM, "")
        yield request

    monkeypatch.setattr(modules, "exchange", refuse)
    assert not modules.module_present("nfnetlink_cthelper")
    assert modules.module_present("nf_conntrack_netlink")
    assert modules.module_present("nf_nat_ftp")


@pytest.mark.usefixtures("system")
def test_what_nobody_has_is_not_available_and_cannot_be_loaded() -> None:
    assert modules.available(("orch_no_such_module",)) == frozenset()
    with pytest.raises(PreflightError, match=r"orch_no_such_module|modprobe is not installed"):
        modules.KernelModules().load("orch_no_such_module")
