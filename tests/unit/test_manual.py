"""Manual pages and completion: written from the code, complete, and up to date."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lab import manual
from orchestrator import cli, complete
from orchestrator.profile import schema

ORCH = Path(__file__).parents[2] / ".venv" / "bin" / "orch"
SCRIPT = Path(__file__).parents[2] / "contrib" / "completion" / "orch.bash"
DOCUMENTS = manual.documents()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_written_is_what_the_code_says(path: Path) -> None:
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        manual.write()
    assert path.read_text() == DOCUMENTS[path], "make manual"


def test_every_option_of_the_help_is_in_the_page_and_has_the_variable_that_it_promises() -> None:
    group: Any = typer.main.get_command(cli.cli)
    page = manual.command_page().replace("\\", "")
    for name, command in group.commands.items():
        assert f"## **orch {name}**" in page
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(f"**{option}**" in page for option in parameter.opts)
                assert parameter.envvar == "ORCH_" + parameter.opts[0].strip("-").upper().replace("-", "_")


def test_every_key_of_a_profile_is_described() -> None:
    page = manual.profile_page().replace("\\", "")
    definitions = schema()["$defs"].values()
    keys = {key for part in (schema(), *definitions) for key in part.get("properties", {})}
    described = {line.partition("**:")[0].rpartition(".")[2].strip("*") for line in page.splitlines() if "**:" in line}
    assert described == keys
    assert "\n: \n" not in page


@pytest.mark.skipif(shutil.which("lowdown") is None, reason="needs lowdown: python3 -m lab.fetch sysroot")
def test_man_reads_the_pages(tmp_path: Path) -> None:
    manual.roff(tmp_path)
    page = (tmp_path / "orch.1").read_text()
    assert '.TH "ORCH" "1"' in page
    assert "\\fB--state-dir\\fR" in page
    assert '.TH "ORCH-PROFILE" "5"' in (tmp_path / "orch-profile.5").read_text()


def bash_offers(line: str, directory: Path) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = " ".join(word or "''" for word in line.split(" "))
    asked = f"source {SCRIPT}; COMP_WORDS=({words}); COMP_CWORD={line.count(' ')}; _orch_completion {ORCH}; "
    run = subprocess.run(
        ["bash", "-c", asked + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        stdout=subprocess.PIPE,
        cwd=directory,
        env={"PATH": os.environ["PATH"], "ORCH_STATE_DIR": str(directory)},
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_bash_completes_commands_options_profiles_and_applied_profiles(tmp_path: Path) -> None:
    for name in ("edge.yaml", "edge.txt", ".hidden.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "edges").mkdir()
    (tmp_path / "edge-1@4-26531840").mkdir()
    assert bash_offers("orch tear", tmp_path) == ["teardown"]
    assert bash_offers("orch apply --dry", tmp_path) == ["--dry-run"]
    assert bash_offers("orch apply edge.", tmp_path) == ["edge.yaml"]
    assert bash_offers("orch status ed", tmp_path) == ["edge-1"]


def test_profile_files_are_offered_with_directories_and_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yml", "c.txt", ".d.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.yaml").touch()
    assert complete.profile_files(f"{tmp_path}/") == [f"{tmp_path}/{name}" for name in ("a.yaml", "b.yml", "more/")]
    assert complete.profile_files(f"{tmp_path}/more/") == [f"{tmp_path}/more/e.yaml"]
    assert complete.profile_files(f"{tmp_path}/missing/") == []
