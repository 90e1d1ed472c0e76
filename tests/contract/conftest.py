"""The same cases on fakes of two kernels and on the running kernel: `world` is one of them, with a fresh namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.app import kernel_system
from orchestrator.fake import FakeKernel
from orchestrator.model import L4Proto, Netns
from orchestrator.ports import System

_MODULES = {"nf_conntrack_ftp": (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()}


@dataclass(frozen=True, slots=True)
class World:
    """A system, an empty namespace in it, and whether it deletes helpers that rules still refer to (7.3 does)."""

    system: System
    netns: Netns
    deletes_referenced: bool


@pytest.fixture(params=["fake-6.1", "fake-7.3", pytest.param("kernel", marks=pytest.mark.kernel)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param != "kernel":
        is_new = request.param == "fake-7.3"
        fake = FakeKernel(delete_ignores_references=is_new, modules_available=_MODULES)
        yield World(fake.system(), fake.add_netns("contract"), is_new)
        return
    system = kernel_system(tmp_path)
    name = f"contract-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        release = tuple(int(part) for part in os.uname().release.split(".")[:1])
        yield World(system, system.host.find_netns(name), release >= (7,))
    finally:
        # A namespace ends some time after it was deleted: until then its rules would refer to the registrations.
        for adapter in system.rules.values():
            adapter.remove(system.host.find_netns(name), "ftp")
        subprocess.run(["ip", "netns", "del", name], check=True)
        for registration in system.registry.dump():
            system.registry.delete(registration.key)
