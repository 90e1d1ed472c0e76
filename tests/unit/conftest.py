"""A kernel in memory, and orch on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.fake import FakeKernel
from tests.hosts import Harness


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def orch(kernel: FakeKernel, tmp_path: Path) -> Harness:
    return Harness(kernel.system(), tmp_path / "state")
