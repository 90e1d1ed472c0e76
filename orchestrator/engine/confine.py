"""Run a program of others with what it needs: `python -I -S confine.py NAME PROGRAM ARGUMENTS...`, as root.

It becomes a user of its own that has CAP_NET_ADMIN and nothing else, with limits, in an empty directory NAME.d of its
own below the runtime directory, where it begins, and executes PROGRAM there. An argument that is the name of a file of
the runtime directory, which root alone can read, is handed over open. The pid stays the same.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys

if __name__ == "__main__":  # -I and -S leave the standard library alone on the path; it stays first
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120

from typing import NoReturn

from orchestrator.engine import privileges

MEMORY_BYTES = 512 << 20
"""Far above what conntrackd uses: 8 MiB of it are its stack, and its helpers' buffers grow with the connections."""


def main(name: str, program: str, *arguments: str) -> NoReturn:
    """Become another user and execute the program. Raises OSError."""
    user = privileges.own_user(os.getcwd(), name)  # noqa: PTH109
    handed = [_handed(argument) for argument in arguments]
    home = f"{name}.d"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(home)  # what a predecessor left, which may have been anything
    os.mkdir(home, mode=0o700)  # noqa: PTH102 (pathlib is slow to import)
    os.chown(home, user.uid, user.gid)
    os.chdir(home)
    privileges.drop(user, mask=privileges.NET_ADMIN, is_inherited=True)
    privileges.limit(MEMORY_BYTES)
    privileges.start_no_more()
    os.execv(program, [program, *handed])


def _handed(argument: str) -> str:
    """An argument; for a file that lies here the path under which the program opens a copy of it."""
    if "/" in argument or not os.path.isfile(argument):  # noqa: PTH113
        return argument
    copy = os.memfd_create(argument, 0)  # which everybody may open who has it
    with open(argument, "rb") as file, open(copy, "wb", closefd=False) as memory:  # noqa: PTH123
        shutil.copyfileobj(file, memory)
    return f"/proc/self/fd/{copy}"


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error}")
