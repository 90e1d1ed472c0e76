"""A program of others runs as its own user, in a directory of its own, and can read the files that it is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.engine import confine, privileges

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")

SHOW = """
import os, sys
print(os.getuid(), os.getpid(), os.getcwd())
print(open(sys.argv[1]).read(), sys.argv[2:])
open("its-own", "w").close()
for path in ("../secret", "../its-own"):
    try:
        open(path, "a")
    except OSError as error:
        print(error.strerror)
"""


def confined(directory: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", confine.__file__, "conntrackd", *argv]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_it_is_somebody_else_in_a_directory_of_its_own(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "conf").write_text("a configuration")
    (tmp_path / "conf").chmod(0o600)
    home = tmp_path / "conntrackd.d"
    home.mkdir()
    (home / "lock").symlink_to(tmp_path / "secret")
    done = confined(tmp_path, "/usr/bin/python3", "-c", SHOW, "conf", "-C", "no-file")
    assert not done.stderr
    who, what, *denied = done.stdout.splitlines()
    user = privileges.own_user(str(tmp_path), "conntrackd")
    assert who.split()[0] == user.name
    assert who.split()[2] == str(home)
    assert what == "a configuration ['-C', 'no-file']"
    assert denied == ["Permission denied"] * 2
    assert [(entry.name, entry.stat().st_uid) for entry in home.iterdir()] == [("its-own", user.uid)]
    assert (tmp_path / "secret").read_text() == "a secret"


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = confined(tmp_path, "/no/such/program")
    assert done.returncode == 1
    assert done.stderr.startswith("cannot run /no/such/program: ")
