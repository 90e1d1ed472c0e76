"""What a process is after it gave up its privileges, as the kernel tells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine import privileges

ROOT = Path(__file__).parents[2]
_SCRIPT = """
import ctypes, json, os, sys
sys.path.append(sys.argv[1])
from orchestrator.engine import privileges
libc = ctypes.CDLL(None)
kept = open("/etc/shadow", "rb")
privileges.drop(privileges.find_user("nobody"), mask=privileges.NET_ADMIN)
def can(action):
    try:
        action()
    except OSError:
        return False
    return True
with open("/proc/self/status") as file:
    status = {line.partition(":")[0]: line.partition(":")[2].strip() for line in file}
with open("/proc/self/limits") as file:
    core = next(line for line in file if line.startswith("Max core"))
print(json.dumps({
    "status": status,
    "core": core.split()[4:6],
    "umask": os.umask(0),
    "reads_what_was_open": bool(kept.read(1)),
    "opens_shadow": can(lambda: open("/etc/shadow")),
    "becomes_root": can(lambda: os.setuid(0)),
    "keeps_capabilities": libc.prctl(7, 0, 0, 0, 0),
}))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: who is not root has nothing to give up")
def test_a_process_keeps_one_capability_and_cannot_get_more() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SCRIPT, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert not done.stderr
    seen = json.loads(done.stdout)
    status = seen.pop("status")
    nobody = privileges.find_user("nobody")
    assert status["Uid"].split() == [str(nobody.uid)] * 4
    assert status["Gid"].split() == [str(nobody.gid)] * 4
    assert not status["Groups"].split()
    assert status["NoNewPrivs"] == "1"
    only = privileges.NET_ADMIN
    assert [int(status[f"Cap{kind}"], 16) for kind in ("Prm", "Eff", "Inh", "Amb", "Bnd")] == [only, only, 0, 0, 0]
    assert seen == {
        "core": ["0", "0"],
        "umask": 0o077,
        "reads_what_was_open": True,
        "opens_shadow": False,
        "becomes_root": False,
        "keeps_capabilities": 0,
    }


@pytest.mark.parametrize("name, said", [("no-such-user", "there is no user"), ("root", "is root")])
def test_nobody_becomes_root_or_a_user_that_is_not_there(name: str, said: str) -> None:
    with pytest.raises(privileges.PrivilegeError, match=said):
        privileges.find_user(name)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to begin as somebody who may nothing")
def test_what_could_not_be_given_up_is_named() -> None:
    """As nobody without capabilities: the bounding set cannot be narrowed, and that must not pass in silence."""
    script = _SCRIPT.replace('kept = open("/etc/shadow", "rb")', "os.setgid(65534); os.setuid(65534)")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert "PrivilegeError: cannot narrow the bounding set: Operation not permitted" in done.stderr


@given(st.text(), st.text())
def test_a_user_of_ones_own_is_always_the_same_and_nobody_that_there_is(directory: str, name: str) -> None:
    user = privileges.own_user(directory, name)
    assert user == privileges.own_user(directory, name)
    assert user.uid == user.gid == int(user.name)
    assert 0x70000000 <= user.uid <= 0x7FFFFFFF


def test_processes_of_a_profile_have_different_users() -> None:
    names = [f"{directory}/{name}" for directory in ("/run/orch/a@4-1", "/run/orch/a@4-2") for name in ("ftp", "tftp")]
    assert len({privileges.own_user(*name.rsplit("/", 1)).uid for name in names}) == len(names)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make a user namespace that has some users")
def test_a_user_namespace_without_that_user_is_told_what_it_lacks() -> None:
    script = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000), flush=True); input()"
    script += _SCRIPT.replace('privileges.find_user("nobody")', 'privileges.own_user("/run/orch", "ftp")')
    argv = [sys.executable, "-I", "-S", "-c", script, str(ROOT)]
    with subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        for kind in ("uid", "gid"):
            Path(f"/proc/{process.pid}/{kind}_map").write_text("0 0 65536")
        _, said = process.communicate("\n")
    assert "PrivilegeError: cannot become user " in said
    assert "this user namespace has no such user; let /proc/self/uid_map have it, or set process: {user: " in said


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to begin with privileges")
def test_what_is_executed_has_what_is_passed_on_and_nothing_else() -> None:
    script = (
        "import os, sys; sys.path.append(sys.argv[1]); from orchestrator.engine import privileges as p;"
        "p.drop(p.own_user('/run/orch', 'conntrackd'), mask=p.NET_ADMIN, is_inherited=True);"
        "os.execv('/bin/cat', ['cat', '/proc/self/status'])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True, check=True
    )
    status = dict(line.partition(":\t")[::2] for line in done.stdout.splitlines())
    assert [int(status[f"Cap{kind}"], 16) for kind in ("Eff", "Prm", "Inh", "Bnd", "Amb")] == [privileges.NET_ADMIN] * 5
    assert status["Uid"].split() == [privileges.own_user("/run/orch", "conntrackd").name] * 4
    assert status["NoNewPrivs"] == "1"
