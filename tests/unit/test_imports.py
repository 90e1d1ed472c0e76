"""What commands do not import: start-up is most of what a small profile costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_HEAVY = {"yaml", "pydantic", "jinja2", "pyroute2", "nftables", "sqlite3"}
_KERNEL = {"pyroute2", "nftables", "sqlite3", "orchestrator.app"}
_SCRIPT = """
import sys
from orchestrator import cli
code = cli.run(sys.argv[1:])
sys.stderr.write("\\n" + " ".join(sys.modules))
sys.exit(code)
"""
_PYROUTE_SCRIPT = """
import sys
import orchestrator.kernel.cthelper
import orchestrator.kernel.netns
sys.stderr.write(" ".join(sys.modules))
from pyroute2 import IPRoute
"""


def modules_after(script: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [("--help",), ("--version",)])
def test_what_answers_without_a_profile_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not modules_after(_SCRIPT, *arguments) & _HEAVY


def test_a_check_loads_nothing_of_the_kernel(tmp_path: Path) -> None:
    profile = tmp_path / "ftp.yaml"
    profile.write_text("profile: ftp\nfamilies: ip\nhelpers: {ftp: {}}\n")
    for arguments in (("check", str(profile)), ("render", str(profile))):
        assert not modules_after(_SCRIPT, *arguments) & _KERNEL


def test_the_codec_loads_three_parts_of_pyroute2_and_leaves_the_whole_importable() -> None:
    """The day `import pyroute2` costs no more than its parts, orchestrator/kernel/pyroute.py is three imports."""
    loaded = modules_after(_PYROUTE_SCRIPT)
    assert {"pyroute2.netlink", "pyroute2.netlink.nfnetlink", "pyroute2.netns"} <= loaded
    assert not {"pyroute2", "pyroute2.ndb", "pyroute2.iproute", "asyncio"} & loaded
