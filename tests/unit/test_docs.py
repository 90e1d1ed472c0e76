"""The documentation says what the program does: commands parse, profiles load, links lead somewhere, all is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator import catalogue, profile, profile_schema
from orchestrator.catalogue import CatalogueEntry, EngineEntry
from orchestrator.cli import cli
from orchestrator.model import Policy
from orchestrator.session import ExitCode

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# The beginning of a command line: at its start, or after a prompt; then words up to a redirection or another command.
_COMMAND = re.compile(r"(?:[#$] )?(?:[A-Z_]+=\S+ )*(?:\S*/)?orch (.+)")
_SHELL = re.compile(r"[|;&]+|[0-9]?[<>].*")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks of both kinds, and inline code; what is only the name of a command asks for its help."""
    for _, block in _FENCE.findall(text):
        yield from block.splitlines()
    prose = _FENCE.sub("", text)
    yield from (line.strip() for line in _INDENTED.findall(prose))
    yield from (f"{code} --help" if re.fullmatch(r"orch \w+", code) else code for code in _INLINE.findall(prose))


def orch_commands(text: str) -> list[list[str]]:
    """The arguments of every `orch ...` in code; `orch` alone is the program and no command."""
    found = (_COMMAND.match(line.strip()) for line in code_lines(text))
    return [list(_until_shell(shlex.split(match[1], comments=True))) for match in found if match]


def _until_shell(words: list[str]) -> Iterator[str]:
    for word in words:
        if _SHELL.fullmatch(word):
            return
        yield word.rstrip(";")
        if word.endswith(";"):
            return


@cache
def commands() -> dict[str, Any]:
    """Every command of orch by name, as click sees it."""
    group: Any = typer.main.get_command(cli)
    return dict(group.commands)


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} - {
        parameter.name for parameter in command.params
    }


def parse(argv: list[str]) -> None:
    """Raise what the command line would raise; nothing is run."""
    group: Any = typer.main.get_command(cli)
    if argv and argv[0] in ("--version", "--help", "-h"):
        assert len(argv) == 1
        return
    name, _, rest = group.resolve_command(group.make_context("orch", list(argv), resilient_parsing=True), list(argv))
    assert name is not None
    command = commands()[name]
    if any(word in ("--help", "-h") for word in rest):
        return
    command.make_context(name, list(rest))


def yaml_profiles(text: str) -> list[str]:
    return [block for kind, block in _FENCE.findall(text) if kind == "yaml" and re.search(r"^profile:", block, re.M)]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings: lower case, without punctuation, `-` for blanks."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("line", sorted({shlex.join(argv) for name in NAMES for argv in orch_commands(text_of(name))}))
def test_every_command_line_parses(line: str) -> None:
    parse(shlex.split(line))


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_loads(name: str) -> None:
    for block in yaml_profiles(text_of(name)):
        profile.load(block, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in _LINK.findall(_FENCE.sub("", text_of(name))):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name} links to {link}"


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_option_has_its_row_under_its_command(command: str) -> None:
    """A section of docs/commands.md per command; the options that several have are in a table of their own."""
    parts = re.split(r"^## (.+)\n", text_of("docs/commands.md"), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    own, common = _options_in(sections[f"orch {command}"]), _options_in(sections["Common options"])
    wanted = options_of(commands()[command])
    assert wanted - {"-h", "--help"} <= own | common
    assert own <= wanted


def _options_in(section: str) -> set[str]:
    return {word for row in re.findall(r"^\| (`-.*?) \|", section, re.M) for word in re.findall(r"`(-[\w-]+)", row)}


def test_common_options_name_the_commands_that_have_them() -> None:
    section = text_of("docs/commands.md").split("## Common options")[1].split("\n## ")[0]
    for names, where in re.findall(r"^\| (`-.*?) \| .*? \| .*? \| (.*?) \|$", section, re.M):
        for option in re.findall(r"`(--[\w-]+)", names):
            having = {name for name, command in commands().items() if option in options_of(command)}
            assert set(re.findall(r"`(\w+)`", where)) == having, option


def test_every_environment_variable_is_documented() -> None:
    text = text_of("docs/commands.md")
    variables = {str(p.envvar) for c in commands().values() for p in c.params if getattr(p, "envvar", None)}
    assert {v for v in variables if f"`{v}`" not in text} == set()
    assert set(re.findall(r"`(ORCH_\w+)`", text)) == variables


@pytest.mark.parametrize("name", ["README.md", "docs/commands.md"])
def test_every_exit_code_is_documented(name: str) -> None:
    rows = set(re.findall(r"^\| (\d+) \|", text_of(name), re.M))
    assert {str(int(code)) for code in ExitCode} <= rows


def test_every_key_of_a_profile_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", text_of("docs/profile.md"), re.M))
    documents = (
        profile_schema.ProfileDoc,
        profile_schema.HelperDoc,
        profile_schema.AttachDoc,
        profile_schema.PolicyDoc,
        profile_schema.GuardDoc,
        profile_schema.ProcessDoc,
    )
    assert {key for document in documents for key in document.model_fields} - rows == set()


@pytest.mark.parametrize("entry", catalogue.helpers().values(), ids=lambda entry: entry.name)
def test_the_tables_of_helpers_are_the_catalogue(entry: CatalogueEntry) -> None:
    lines = text_of("docs/profile.md").splitlines()
    assert catalogue_row(entry) in lines
    for engine in entry.engines:
        for policy in engine.policies:
            assert policy_row(entry, engine, policy) in lines


def catalogue_row(entry: CatalogueEntry) -> str:
    ports = ", ".join(f"{p.l4proto} {port}" for p in entry.protocols for port in p.ports)
    engines = ", ".join(f"{e.engine} ({', '.join(e.families)})" for e in entry.engines)
    return f"| `{entry.name}` | {ports} | {', '.join(entry.paths)} | {engines} |"


def policy_row(entry: CatalogueEntry, engine: EngineEntry, policy: Policy) -> str:
    private = max(engine.priv_data_len(protocol.l4proto) for protocol in entry.protocols)
    limits = f"{policy.expect_max} | {policy.expect_timeout_s} s | {private} bytes"
    return f"| `{entry.name}` | {engine.engine} | `{policy.name}` | {limits} |"


def test_there_is_something_to_test() -> None:
    """The patterns above find what they look for; else every test of this file would pass on anything."""
    text = "".join(map(text_of, NAMES))
    assert len(orch_commands(text)) > 40
    assert len(yaml_profiles(text)) > 5
    assert len(_LINK.findall(text)) > 10


@pytest.mark.parametrize("line", ["orch apply p.yaml --nets x", "orch aply p.yaml", "orch check", "orch diff a b"])
def test_a_wrong_command_line_is_found(line: str) -> None:
    (argv,) = orch_commands(f"Text.\n\n    {line}\n")
    with pytest.raises(Exception, match=r"."):
        parse(argv)
