"""What a rendered document says: parsed back, and checked to be about its own profile and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.model import HelperKey, L3Proto, L4Proto, Policy, ProcessSpec, Registration, Restart, Status

if TYPE_CHECKING:
    from orchestrator.engine.settings import Settings

_REGISTRATION_KEYS = {"name", "l3proto", "l4proto", "queue_num", "status", "priv_data_len", "policies"}
_POLICY_KEYS = {"name", "expect_max", "expect_timeout_s"}
_PROCESS_KEYS = {"name", "argv", "files", "queues", "keys", "enables", "ready_within_s"}
_PROCESS_KEYS |= {"restart", "restart_limit", "restart_window_s"}

# An nft token: comment, quoted string, block limits, or a word.
_NFT_TOKEN = re.compile(r'#[^\n]*|"[^"\n]*"|[{};\n]|[^\s{};"#]+|.', re.DOTALL)


def parse_registrations(text: str) -> tuple[tuple[Registration, ...], tuple[Registration, ...]]:
    """registrations.yaml: those that rules attach, and those that an engine insists on. Raises ValueError."""
    document = _mapping(_yaml(text), {"registrations", "stock"}, "document")
    attached, stock = (
        tuple(_registration(item, f"{part}[{i}]") for i, item in enumerate(_list(document[part], part)))
        for part in ("registrations", "stock")
    )
    return attached, stock


def parse_supervise(text: str) -> tuple[tuple[ProcessSpec, ...], bool]:
    """supervise.yaml: the helper processes, and whether their supervisor has drift mended. Raises ValueError."""
    tree = _yaml(text)
    tree = {"reconcile": False, **tree} if isinstance(tree, dict) else tree
    document = _mapping(tree, {"processes", "reconcile"}, "document")
    if not isinstance(document["reconcile"], bool):
        raise ValueError("reconcile: must be true or false")
    items = enumerate(_list(document["processes"], "processes"))
    return tuple(_process(item, f"processes[{i}]") for i, item in items), document["reconcile"]


def parse_helper(text: str) -> Settings:
    """helper-NAME.toml: what the process of a native helper is told. Raises ValueError."""
    from orchestrator.engine.settings import parse

    return parse(text)


def problems_of_nft(text: str, profile: str, digest: str) -> Iterator[tuple[int, str]]:
    """Every statement that is not about the table of the profile, as (line, message); line 0 means the whole text."""
    table = f"inet orch-{profile}"
    blocks = 0
    for line, statement in _nft_statements(text):
        if statement == f"table {table} {{":
            blocks += 1
        elif statement not in (f"table {table}", f"flush table {table}"):
            yield line, f"only table {table} can be written here, not: {statement}"
    if not blocks:
        yield 0, f"there is no table {table}"
    yield from _digest_problems(text, profile, digest)


def problems_of_iptables(text: str, profile: str, digest: str) -> Iterator[tuple[int, str]]:
    """Every line that is not about the chains of the profile in table raw, as (line, message)."""
    own = rf"orch-{re.escape(profile)}-(?:pre|out)"
    allowed = re.compile(rf"(?:#.*|\*raw|COMMIT|:{own} - .*|-A {own} .*|-A (?:PREROUTING|OUTPUT) (?:.* )?-j {own}|)")
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not allowed.fullmatch(line.strip()):
            yield number, f"only chains orch-{profile}-pre and orch-{profile}-out can be written here, not: {line}"
    statements = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if statements[:1] != ["*raw"] or statements[-1:] != ["COMMIT"] or statements.count("*raw") != 1:
        yield 0, "it is not one table raw, ended by COMMIT"
    yield from _digest_problems(text, profile, digest)


def digest_comment(profile: str, digest: str) -> str:
    """The comment in the rules by which a later look knows what was loaded."""
    return f"orch profile={profile} digest={digest}"


def _digest_problems(text: str, profile: str, digest: str) -> Iterator[tuple[int, str]]:
    comment = digest_comment(profile, digest)
    if text.count(f'comment "{comment}"') != 1:
        yield 0, 'there must be one rule with comment "orch profile={{ view.profile }} digest={{ view.digest }}"'


def _nft_statements(text: str) -> Iterator[tuple[int, str]]:
    """Top-level statements with their line, a block as its head and `{`; an `include` counts wherever it is."""
    line, depth, words, start = 1, 0, list[str](), 1
    for match in _NFT_TOKEN.finditer(text):
        token = match.group()
        if token in ("\n", ";", "{") and depth == 0 and (words or token == "{"):
            yield start, " ".join([*words, *(["{"] if token == "{" else [])])
            words = []
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            if depth < 0:
                yield line, "}"
                depth = 0
        elif token == "\n":
            line += 1
        elif token == "include" and depth:
            yield line, "include"
        elif depth == 0 and not token.isspace() and token != ";" and not token.startswith("#"):
            start = start if words else line
            words.append(token)
    if words:
        yield start, " ".join(words)
    if depth:
        yield line, "a block without an end"


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"line {mark.line + 1}: {reason}" if mark else reason) from error


def _registration(item: object, place: str) -> Registration:
    fields = _mapping(item, _REGISTRATION_KEYS, place)
    policies = _list(fields["policies"], f"{place}.policies")
    with _Place(place):
        return Registration(
            key=HelperKey(_text(fields, "name"), L3Proto(fields["l3proto"]), L4Proto(fields["l4proto"])),
            queue_num=_int(fields, "queue_num"),
            status=Status(fields["status"]),
            policies=tuple(_policy(p, f"policies[{i}]") for i, p in enumerate(policies)),
            priv_data_len=_int(fields, "priv_data_len"),
        )


def _policy(item: object, place: str) -> Policy:
    fields = _mapping(item, _POLICY_KEYS, place)
    return Policy(_text(fields, "name"), _int(fields, "expect_max"), _int(fields, "expect_timeout_s"))


def _process(item: object, place: str) -> ProcessSpec:
    fields = _mapping(item, _PROCESS_KEYS, place)
    with _Place(place):
        return ProcessSpec(
            name=_text(fields, "name"),
            argv=_texts(fields, "argv"),
            files=_texts(fields, "files"),
            queues=tuple(_int({"queue": q}, "queue") for q in _list(fields["queues"], "queues")),
            keys=tuple(HelperKey.parse(k) for k in _texts(fields, "keys")),
            enables=tuple(HelperKey.parse(k) for k in _texts(fields, "enables")),
            ready_within_s=_int(fields, "ready_within_s"),
            restart=Restart(fields["restart"]),
            restart_limit=_int(fields, "restart_limit"),
            restart_window_s=_int(fields, "restart_window_s"),
        )


class _Place:
    """Says where in the document a ValueError arose."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self._place}: {error}") from error


def _mapping(value: object, keys: set[str], place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be a mapping of {', '.join(sorted(keys))}")
    if value.keys() != keys:
        wrong = sorted(map(str, value.keys() ^ keys))
        raise ValueError(f"{place}: missing or unknown: {', '.join(wrong)}")
    return value


def _list(value: object, place: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{place}: must be a list")
    return value


def _text(fields: Mapping[str, Any], key: str) -> str:
    if not isinstance(fields[key], str):
        raise ValueError(f"{key}: must be text, not {fields[key]!r}")
    return str(fields[key])


def _texts(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_text({key: item}, key) for item in _list(fields[key], key))


def _int(fields: Mapping[str, Any], key: str) -> int:
    if type(fields[key]) is not int:
        raise ValueError(f"{key}: must be a number, not {fields[key]!r}")
    return int(fields[key])
