"""The wheel carries everything: built, unpacked elsewhere, and used from outside the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    wheel = next(tmp_path.glob("orch-*.whl"))
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)

    def python(*argv: str) -> str:
        return subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def orch(*argv: str) -> str:
        return python("-m", "orchestrator", *argv)

    profile = target / "orchestrator/data/profiles/ftp.yaml"
    assert orch("check", str(profile)) == f"{profile}: ok\n"
    assert "table inet orch-ftp" in orch("render", str(profile), "--document", "ruleset.nft")
    assert "dhcpv6" in orch("helpers")
    assert python("-c", "import orchestrator; print(orchestrator.__file__)").startswith(str(target))
