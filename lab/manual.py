"""The manual pages and the completion scripts, written from the code: `python3 -m lab.manual`.

docs/man holds the pages as Markdown, contrib/completion the scripts; a test finds the ones that are out of date.
`python3 -m lab.manual --roff DIRECTORY` turns the pages into what man(1) reads, with lowdown of the sysroot.
"""

import argparse
import enum
import inspect
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lab.layout import REPOSITORY
from orchestrator import __version__, cli, profile
from orchestrator.commands.completion import Shell, script
from orchestrator.session import Colour

PAGES_DIR = REPOSITORY / "docs" / "man"
SCRIPTS = {Shell.BASH: "orch.bash", Shell.ZSH: "_orch", Shell.FISH: "orch.fish"}
"""The names that the shells' directories of completions expect."""

_LOWDOWN = ("lowdown", "-s", "--out-no-smarty", "-tman")
_SHARED_BY = 3  # an option that so many commands have is described once

_FILES = {
    "/run/orch/ledger.sqlite": "What is applied in which namespace, who uses which registration, and what was begun.",
    "/run/orch/lock": "The lock of this host; it names its holder.",
    "/run/orch/watchdog.log": "What was undone because nobody confirmed it.",
    "/run/orch/*PROFILE*@*NAMESPACE*": "Runtime files of a profile: what helper processes were told, logs, counters.",
}
_ENVIRONMENT = """Every option has a variable: ORCH\\_ and its long name in capitals, as **ORCH\\_STATE\\_DIR** for
**\\-\\-state\\-dir**. The option goes before it. **NO\\_COLOR** and **FORCE\\_COLOR** count where neither speaks.

"""
_EXAMPLE = """    profile: office-edge
    netns: blue
    helpers:
      ftp:
        attach:
          - {path: incoming, ports: [21, 2121-2125], iif: lan0}
      tftp: {}
"""


def documents() -> dict[Path, str]:
    """Everything that this module writes, by path."""
    pages = {PAGES_DIR / "orch.1.md": command_page(), PAGES_DIR / "orch-profile.5.md": profile_page()}
    return pages | {REPOSITORY / "contrib" / "completion" / name: script(shell) for shell, name in SCRIPTS.items()}


# -- orch(1) -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    """An option, or an argument, which has no names. `value` is what it takes, empty for a flag."""

    names: tuple[str, ...]
    value: str
    text: str
    default: str


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    text: str
    examples: tuple[str, ...]
    arguments: tuple[Parameter, ...]
    options: tuple[Parameter, ...]


def commands() -> list[Command]:
    """Every command, from the signatures of the functions behind them."""
    found = []
    for registered in cli.cli.registered_commands:
        function: Any = registered.callback
        hints = get_type_hints(function, include_extras=True)
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        parameters = [_parameter(hints[name], default) for name, default in defaults.items()]
        found.append(
            Command(
                name=registered.name or function.__name__,
                text=function.__doc__,
                examples=tuple(example.strip() for example in (registered.epilog or "").split(";")),
                arguments=tuple(p for p in parameters if not p.names),
                options=tuple(p for p in parameters if p.names),
            )
        )
    return found


def _parameter(hint: Any, default: Any) -> Parameter:
    annotation, info = get_args(hint)
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    kind = kinds[0]
    is_flag = kind is bool or bool(getattr(info, "count", False))
    choices = [str(member.value) for member in kind] if isinstance(kind, type) and issubclass(kind, enum.Enum) else []
    shown = getattr(default, "value", default)
    is_optional = default is not inspect.Parameter.empty and shown not in (None, "", False)
    return Parameter(
        # In an annotation typer takes the first name for the default, and puts it right only later.
        names=tuple(n for n in (info.default, *(getattr(info, "param_decls", None) or ())) if str(n).startswith("-")),
        value="" if is_flag else info.metavar or _VALUES.get(kind, "VALUE"),
        text=(info.help or "") + (f" One of {', '.join(choices)}." if choices else ""),
        default=str(shown) if is_optional and not is_flag else "",
    )


_VALUES: Mapping[Any, str] = {str: "NAME", int: "NUMBER", float: "SECONDS", Path: "PATH", Colour: "WHEN"}


def command_page() -> str:
    everything = commands()
    counts = Counter(option.names for command in everything for option in command.options)
    shared = {o.names: o for command in everything for o in command.options if counts[o.names] >= _SHARED_BY}
    text = _head("ORCH", 1)
    text += "# NAME\n\norch - orchestrator for user-space connection tracking helpers\n\n"
    text += "# SYNOPSIS\n\n**orch** *COMMAND* \\[*OPTION*...\\] \\[*ARGUMENT*...\\]\n\n"
    text += f"# DESCRIPTION\n\n{str(cli.cli.info.help).partition(chr(10))[0]}\n\n"
    text += "The profile is described in **orch-profile**(5).\n\n# COMMANDS\n\n"
    text += "".join(_command(command, shared.keys()) for command in everything)
    text += "# OPTIONS\n\nAn option has one meaning in all commands that take it.\n\n"
    text += "".join(_option(option) for _, option in sorted(shared.items()))
    text += f"# EXIT STATUS\n\n{''.join(_exit_codes())}# ENVIRONMENT\n\n{_ENVIRONMENT}"
    text += "# FILES\n\n" + "".join(_item(f"*{_plain(name)}*", what) for name, what in _FILES.items())
    examples = "".join(f"    {example}\n" for command in everything for example in command.examples if example)
    return f"{text}# EXAMPLES\n\n{examples}\n# SEE ALSO\n\n**orch-profile**(5), **nft**(8), **conntrack**(8)\n"


def _command(command: Command, shared: Collection[tuple[str, ...]]) -> str:
    values = " ".join(_value(argument) for argument in command.arguments)
    also = ", ".join(f"**{_dashes(option.names[0])}**" for option in command.options if option.names in shared)
    return (
        f"## **orch {command.name}** \\[*OPTION*...\\] {values}".rstrip()
        + f"\n\n{_sentences(command.text)}\n\n"
        + "".join(_item(_value(argument), argument.text) for argument in command.arguments)
        + "".join(_option(option) for option in command.options if option.names not in shared)
        + (f"Also: {also}.\n\n" if also else "")
    )


def _option(option: Parameter) -> str:
    names = ", ".join(f"**{_dashes(name)}**" for name in option.names)
    default = f" Default: {option.default}." if option.default else ""
    return _item(f"{names} {_value(option)}".strip(), option.text + default)


def _value(parameter: Parameter) -> str:
    return f"*{_plain(parameter.value)}*" if parameter.value else ""


def _exit_codes() -> Iterator[str]:
    for entry in " ".join(cli.EXIT_CODES.split()).partition(": ")[2].rstrip(".").split("; "):
        codes, _, meaning = entry.partition(" ")
        while codes.endswith(","):
            more, _, meaning = meaning.partition(" ")
            codes = f"{codes} {more}"
        yield _item(f"**{codes}**", f"{meaning[:1].upper()}{meaning[1:]}.")


# -- orch-profile(5) ---------------------------------------------------------------------------------------------------


def profile_page() -> str:
    schema = profile.schema()
    text = _head("ORCH-PROFILE", 5)
    text += "# NAME\n\norch-profile - which connection tracking helpers serve which traffic\n\n"
    text += "# DESCRIPTION\n\nA profile is a YAML file. Unknown keys are errors. **orch check** reads it and says what "
    text += "is wrong, each with its line; **orch schema** prints a JSON Schema for editors.\n\n# KEYS\n\n"
    text += "".join(_keys(schema, schema["$defs"], ""))
    text += f"# EXAMPLES\n\n{_EXAMPLE}\n# SEE ALSO\n\n**orch**(1)\n"
    return text


def _keys(part: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Every key below a part of the schema, a dotted path each."""
    for key, value in part.get("properties", {}).items():
        inner = _inner(value, definitions)
        description = value.get("description") or (inner or {}).get("description") or ""
        term = f"**{_plain(prefix + key)}**: {_plain(_type(value, definitions))}"
        yield _item(term, f"{_sentences(description)} {_default(value)}")
        if inner is not None:
            yield from _keys(inner, definitions, f"{prefix}{key}.{_wildcard(value)}")


def _wildcard(value: Mapping[str, Any]) -> str:
    return "NAME." if "additionalProperties" in value else ""


def _inner(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The mapping that a key leads to, if it does: itself, an item of a list, or a value under any name."""
    if "$ref" in value:
        found: Mapping[str, Any] = definitions[value["$ref"].rpartition("/")[2]]
        return found if "properties" in found else None
    parts = [*value.get("anyOf", ()), value.get("items"), value.get("additionalProperties")]
    found_in = (_inner(part, definitions) for part in parts if isinstance(part, dict))
    return next((found for found in found_in if found is not None), None)


def _type(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in value:
        return _type(definitions[value["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_type(part, definitions) for part in value["anyOf"]))
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), definitions)}"
    if value.get("type") == "object":
        return "mapping"
    if "minimum" in value and "maximum" in value:
        return f"{value['minimum']}..{value['maximum']}"
    return {"string": "text", "null": "nothing"}.get(str(value.get("type", "")), str(value.get("type", "any")))


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    if default in (None, "", []) or isinstance(default, dict) or "efault" in value.get("description", ""):
        return ""
    shown = "true" if default is True else "false" if default is False else default
    return f"Default: {', '.join(map(str, shown)) if isinstance(shown, list) else shown}."


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _head(title: str, section: int) -> str:
    return f"title: {title}\nsection: {section}\nsource: orch {__version__}\n\n"


def _item(term: str, text: str) -> str:
    return f"{term}\n: {_sentences(text)}\n\n"


def _sentences(text: str) -> str:
    """One paragraph with a full stop."""
    plain = " ".join(text.split())
    return plain if not plain or plain.endswith((".", "?")) else f"{plain}."


def _plain(text: str) -> str:
    return "".join(f"\\{ch}" if ch in "*_[]<>`" else ch for ch in text)


def _dashes(option: str) -> str:
    return option.replace("-", "\\-")


# -- writing -----------------------------------------------------------------------------------------------------------


def write() -> None:
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def roff(directory: Path) -> None:
    """Write orch.1 and orch-profile.5. Raises CalledProcessError, FileNotFoundError."""
    directory.mkdir(parents=True, exist_ok=True)
    for page in sorted(PAGES_DIR.glob("*.md")):
        target = directory / page.stem
        subprocess.run(
            ["lowdown", "-s", "--parse-no-autolink", "--out-no-smarty", "-tman", "-o", str(target), str(page)],
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the manual pages and the completion scripts from the code.")
    parser.add_argument("--roff", type=Path, metavar="DIRECTORY", help="write the pages for man(1) instead")
    arguments = parser.parse_args()
    if arguments.roff:
        roff(arguments.roff)
    else:
        write()


if __name__ == "__main__":
    main()
