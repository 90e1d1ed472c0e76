"""Whether a process that carries a mark of ours was started by us: anybody can write anything into an environment.

The real user id tells, which nobody but root chooses. What we start is root, and stays that or becomes a user of its
own that nobody else is, or the user that its document names. A setuid program may become root (sudo does, before it
asks for a password) with an environment that anybody wrote: none of ours is one. Sources: proc_pid_status(5),
engine/privileges.py.
"""

from __future__ import annotations

import contextlib
import os
import stat

from orchestrator.engine import privileges
from orchestrator.engine.names import NEXT
from orchestrator.supervise.traces import GONE


def is_root(pid: int) -> bool:
    """Whether a process is root, or whoever this process is where that is not root; False if it is gone."""
    return _uid(pid) in (0, os.geteuid())


def is_helper(pid: int, directory: str, name: str) -> bool:
    """Whether a process can be the helper process of that name whose runtime directory is `directory`.

    A helper process could write itself the mark of another, whose user it is not.
    """
    uid = _uid(pid)
    if uid in (0, os.geteuid(), privileges.own_user(directory, name).uid):
        return True
    documents = (f"{directory}/helper-{name}.toml{suffix}" for suffix in ("", NEXT))
    return uid >= 0 and any(uid == _user_of(document) for document in documents)


def _uid(pid: int) -> int:
    """Its real user id; -1 if it is gone, or runs a setuid program.

    The owner of /proc/PID tells nothing: it is root for whoever is not dumpable.
    """
    with contextlib.suppress(*GONE, PermissionError), open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123 (no pathlib here)
        if os.stat(f"/proc/{pid}/exe").st_mode & stat.S_ISUID:  # noqa: PTH116
            return -1
        for line in file:
            if line.startswith(b"Uid:"):
                return int(line.split()[1])
    return -1


def _user_of(document: str) -> int:
    """The user that the document of a native helper names; -1 for none."""
    import tomllib  # few name one

    try:
        with open(document, "rb") as file:  # noqa: PTH123
            name = tomllib.load(file).get("user")
        return privileges.find_user(name).uid if isinstance(name, str) and name else -1
    except (OSError, ValueError):
        return -1
