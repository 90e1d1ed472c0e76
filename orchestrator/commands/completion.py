"""`orch completion SHELL`: the script that makes a shell complete the words of orch."""

from __future__ import annotations

import enum
import sys
from typing import Annotated

import typer

from orchestrator.session import ExitCode, writing

VARIABLE = "_ORCH_COMPLETE"
"""What the scripts set when they ask; source: typer, _completion_shared.py."""


class Shell(enum.StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def script(shell: Shell) -> str:
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # re-exported without saying so

    return get_completion_script(prog_name="orch", complete_var=VARIABLE, shell=shell) + "\n"


def completion(shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> ExitCode:
    """Print the completion script of a shell; packages install it, and `source <(...)` tries it."""
    with writing():
        sys.stdout.write(script(shell))
    return ExitCode.OK
