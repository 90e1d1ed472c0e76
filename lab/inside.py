"""Run a command with the sysroot visible: python3 -m lab.inside -- COMMAND. Needs root; no virtual machine.

In a mount namespace of its own, the sysroot lies over /usr and /etc, read-only: compiled-in paths such as conntrackd's
plugin directory are right, and nobody else on the host sees any of it. In a guest of lab.vm it just runs the command.
"""

import argparse
import os
import subprocess
import sys

from lab.layout import INSIDE_VARIABLE, SYSROOT, SYSROOT_PACKAGES_FILE, LabError

COVERED = ("usr", "etc")


def enter_sysroot() -> None:
    """Make the sysroot visible to this process and its children. Raises LabError."""
    if INSIDE_VARIABLE in os.environ:
        return
    if not SYSROOT_PACKAGES_FILE.exists():
        raise LabError("the sysroot is not here; run: python3 -m lab.fetch sysroot")
    if os.geteuid() != 0:
        raise LabError("mounting the sysroot needs root")
    # The program itself lies below /usr, so it mounts first and only then starts anything from there.
    for name in COVERED:
        mount("-t", "overlay", "-o", f"ro,lowerdir={SYSROOT}/{name}:/{name}", "lab", f"/{name}")
    os.environ[INSIDE_VARIABLE] = "host"


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")


def in_own_namespace(argv: list[str]) -> list[str]:
    """The command that runs this module again in a private mount namespace, where it may mount."""
    namespace = ["unshare", "--mount", "--propagation", "private"]
    return [*namespace, sys.executable, "-m", "lab.inside", "--mounted", "--", *argv]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.inside", description=__doc__)
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("argv", nargs="+", metavar="ARGV", help="command and arguments, after --")
    arguments = parser.parse_args()
    argv: list[str] = arguments.argv
    try:
        if INSIDE_VARIABLE not in os.environ and not arguments.mounted:
            argv = in_own_namespace(argv)
        else:
            enter_sysroot()
        os.execvp(argv[0], argv)
    except (LabError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
