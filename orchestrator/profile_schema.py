"""The shape of a profile: keys, types and ranges that need no knowledge of any helper. Pydantic, and only here."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from orchestrator import model
from orchestrator.model import Backend, Engine, Inspect, L3Proto, L4Proto, Path, PortRange, Queueing, Restart

MAX_TIMEOUT_S = 2_147_483
"""Longest expect_timeout: newer kernels compare expectation times as signed 32-bit jiffies, up to 1000 a second."""

Prefix = IPv4Network | IPv6Network


class Source(StrEnum):
    """Who may open what a helper expects."""

    PEER = "peer"
    ANY = "any"


class Destination(StrEnum):
    """Where an expected connection may go: to an end of the master connection, or to whom the payload names."""

    MASTER = "master"
    ANY = "any"


_RANGE = re.compile(r"([0-9]{1,5})(?: ?- ?([0-9]{1,5}))?")
_SIZE = re.compile(r"([0-9]{1,7})([MG])")
_UNIT_BYTES = {"M": 1 << 20, "G": 1 << 30}
_MEMORY_MIN = "64M"
_DURATION = re.compile(r"([0-9]{1,10})([smhd]?)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PREFIX = re.compile(r"[0-9A-Fa-f.:]+(/[0-9]{1,3})?")
_NETNS_NAME = re.compile(r"[A-Za-z0-9_.@:+-]{1,255}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_NETNS_PATH = re.compile(r"/[!-~]{1,4000}")
_QUEUE_MAX = 0xFFFF
_RESTARTS_MAX = 1000
_WINDOW_MAX_S = 86400
_LABEL_MAX = model.LABEL_BITS - 1


def nearest(word: str, known: list[str]) -> str:
    """`did you mean ...?` for the most similar known word, empty if none is similar."""
    match = get_close_matches(word, known, n=1)
    return f"did you mean {match[0]}?" if match else ""


def show(value: object) -> str:
    """A value of the file as people wrote it, short and printable."""
    names = {type(None): "nothing", dict: "a mapping", list: "a list"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fault(message: str, hint: str = "") -> PydanticCustomError:
    """What a validator raises; message and hint reach the person as they are."""
    return PydanticCustomError("fault", "{message}", {"message": message, "hint": hint})


def _list(value: object) -> object:
    """One value stands for a list of one."""
    if value is None:
        raise fault("expected a list, found nothing", "remove the key for its default")
    if value == []:
        raise fault("the list is empty", "remove the key for its default")
    return value if isinstance(value, list) else [value]


def _one_of(words: type[StrEnum]) -> Callable[[object], Any]:
    known = [str(word) for word in words]

    def convert(value: object) -> StrEnum:
        if isinstance(value, str) and value in known:
            return words(value)
        suggestion = nearest(value, known) if isinstance(value, str) else ""
        raise fault(f"{show(value)} is not one of {', '.join(known)}", suggestion)

    return convert


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise fault(f"expected text, found {show(value)}", f'write "{value}" in quotes' if isinstance(value, int) else "")


def _profile_name(value: object) -> str:
    if isinstance(value, str) and model.is_profile_name(value):
        return value
    raise fault(
        f"{show(value)} is not a profile name",
        "at most 18 of a-z, 0-9 and -, a letter first; it names tables and chains",
    )


def _netns(value: object) -> str:
    text = _text(value)
    if _NETNS_PATH.fullmatch(text) or (_NETNS_NAME.fullmatch(text) and text not in (".", "..")):
        return text
    raise fault(f"{show(value)} names no network namespace", "a name of `ip netns list`, or an absolute path")


def _registration_name(value: object) -> str:
    text = _text(value)
    if model.is_helper_name(text):
        return text
    raise fault(f"{show(value)} is not a helper name", name_hint(text))


def name_hint(text: str) -> str:
    """Why a text is no name of a helper."""
    if len(text.encode(errors="replace")) > model.NAME_MAX_BYTES:
        return f"at most {model.NAME_MAX_BYTES} bytes, these are {len(text.encode(errors='replace'))}"
    return "letters, digits, _ . and -, a letter first"


def _interface(value: object) -> str:
    text = _text(value)
    if model.is_interface_name(text):
        return text
    too_long = len(text) > model.INTERFACE_MAX_BYTES
    hint = f"at most {model.INTERFACE_MAX_BYTES} characters" if too_long else "one name, without wildcards"
    raise fault(f"{show(value)} is not an interface name", hint)


def _ports(value: object) -> PortRange:
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        first, last = int(match[1]), int(match[2] or match[1])
    elif isinstance(value, int) and not isinstance(value, bool):
        first = last = value
    else:
        raise fault(f"{show(value)} is not a port or a range of ports", "for example 21, or 2121-2125")
    if first > last:
        raise fault(f"the range {first}-{last} runs backwards", f"write {last}-{first}")
    if first < 1 or last > 65535:
        raise fault(f"port {first if first < 1 else last} is out of range", "ports are 1 to 65535")
    return PortRange(first, last)


@cache
def _network(text: str) -> Prefix:
    return (IPv6Network if ":" in text else IPv4Network)(text)


def _prefix(value: object) -> Prefix:
    text = value if isinstance(value, str) and _PREFIX.fullmatch(value) else ""
    try:
        return _network(text)
    except ValueError:
        pass
    try:
        loose = (IPv6Network if ":" in text else IPv4Network)(text, strict=False)
    except ValueError:
        hint = "for example 192.0.2.1, 10.0.0.0/8 or fd00::/8"
        raise fault(f"{show(value)} is not an address or prefix", hint) from None
    raise fault(f"{text} has bits set beyond its prefix length", f"write {loose}")


def _seconds(value: object) -> int:
    match = _DURATION.fullmatch(str(value)) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if match is None:
        raise fault(f"{show(value)} is not a duration", "seconds, or a number with s, m, h or d: 300, 5m, 1h")
    return int(match[1]) * _UNIT_S[match[2]]


def _window(value: object) -> int:
    seconds = _seconds(value)
    if not 1 <= seconds <= _WINDOW_MAX_S:
        raise fault(f"{show(value)} is out of range", "1s to 1d")
    return seconds


def _restart_limit(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"{show(value)} is not a number of restarts", f"1 to {_RESTARTS_MAX}")
    if not 1 <= value <= _RESTARTS_MAX:
        raise fault(f"{value} restarts are out of range", f"1 to {_RESTARTS_MAX}, or restart: never")
    return value


def _confirm_within(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"{show(value)} is not a number of seconds", f"0 to {model.CONFIRM_MAX_S}")
    if not 0 <= value <= model.CONFIRM_MAX_S:
        raise fault(f"{value} seconds are out of range", f"0 to {model.CONFIRM_MAX_S}; 0 is not at all")
    return value


def _duration(value: object) -> int:
    seconds = _seconds(value)
    if not seconds:
        raise fault("the timeout is 0: expectations would be gone at once", "at least 1s")
    if seconds > MAX_TIMEOUT_S:
        raise fault(f"{show(value)} is longer than the kernel can count", f"at most {MAX_TIMEOUT_S} s, 24 days")
    return seconds


def _expect_max(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fault(f"{show(value)} is not a number of expectations", "1 to 255")
    if not 1 <= value <= model.EXPECT_MAX_LIMIT:
        raise fault(f"expect_max {value} is out of range", "1 to 255; 0 means different things to different kernels")
    return value


def _auto_or(what: str, most: int) -> Callable[[object], int | None]:
    def convert(value: object) -> int | None:
        if value == "auto":
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise fault(f"{show(value)} is not a {what}", f"auto, or 0 to {most}")
        if not 0 <= value <= most:
            raise fault(f"{what} {value} is out of range", f"0 to {most}")
        return value

    return convert


def _user(value: object) -> str:
    text = _text(value)
    if text == "own":
        return ""
    if text == "root":
        raise fault("a helper process does not run as root", "own, for a user of its own, or a user made for it")
    if _USER.fullmatch(text):
        return text
    raise fault(f"{show(value)} is not the name of a user", "own, or a name as in /etc/passwd")


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text)
    return int(match[1]) * _UNIT_BYTES[match[2]] if match else 0


def _memory(value: object) -> int:
    size = _bytes(value) if isinstance(value, str) else 0
    if not size:
        raise fault(f"{show(value)} is not an amount of memory", "a number with M or G: 128M")
    if size < _bytes(_MEMORY_MIN):
        raise fault(f"{show(value)} of memory is too little for Python", f"at least {_MEMORY_MIN}")
    return size


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise fault(f"{show(value)} is neither true nor false")


def _guard(value: object) -> object:
    """`strict` stands for no bound loosened."""
    if isinstance(value, str) and value != "strict":
        raise fault(f"{show(value)} is not a guard", "strict, or a mapping of the bounds to change")
    return {} if value == "strict" else value


def _at_most_four(value: object) -> object:
    if isinstance(value, dict) and len(value) > model.POLICIES_MAX:
        raise fault(f"{len(value)} policies, and the kernel takes at most {model.POLICIES_MAX}")
    return value


def _schema(description: str, **schema: object) -> WithJsonSchema:
    return WithJsonSchema({**schema, "description": description})


def _as_written(default: str) -> Any:
    """A default as people would write it, which is also what the schema tells."""
    return Field(default=default, validate_default=True)


def _or_strict(schema: dict[str, Any]) -> None:
    """The word or the mapping, which pydantic before 2.9 writes as `allOf` of one."""
    (mapping,) = schema.pop("allOf", None) or ({"$ref": schema.pop("$ref")},)
    schema["anyOf"] = [{"const": "strict"}, mapping]
    schema["default"] = "strict"


def _words(words: type[StrEnum]) -> dict[str, Any]:
    return {"type": "string", "enum": [str(word) for word in words]}


def _auto_schema(most: int) -> dict[str, Any]:
    return {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 0, "maximum": most}]}


def _items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


_PORTS_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 65535}, {"type": "string", "pattern": "^[0-9]+-[0-9]+$"}]
}
_NAME_SCHEMA = {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_.-]{0,14}$"}
_DURATION_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]+[smhd]?$"}]}

Prefixes = Annotated[
    tuple[Annotated[Prefix, PlainValidator(_prefix)], ...],
    BeforeValidator(_list),
    _schema("Addresses or prefixes; those of one family attach for that family only", **_items({"type": "string"})),
]
Interface = Annotated[str, PlainValidator(_interface)]
Word = Annotated[str, PlainValidator(_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttachDoc(_Strict):
    path: Annotated[
        tuple[Annotated[Path, PlainValidator(_one_of(Path))], ...],
        BeforeValidator(_list),
        _schema(
            "incoming: forwarded or to this host; outgoing: made by this host. Default: that of the helper, or the"
            " side whose interface is given",
            **_items(_words(Path)),
        ),
    ] = ()
    l4proto: Annotated[
        L4Proto | None, PlainValidator(_one_of(L4Proto)), _schema("Default: all the helper speaks", **_words(L4Proto))
    ] = None
    ports: Annotated[
        tuple[Annotated[PortRange, PlainValidator(_ports)], ...],
        BeforeValidator(_list),
        _schema("Server ports; default: the usual ones of the helper", **_items(_PORTS_SCHEMA)),
    ] = ()
    iif: Annotated[Interface, _schema("Input interface of incoming connections", type="string", maxLength=15)] = ""
    oif: Annotated[Interface, _schema("Output interface of outgoing connections", type="string", maxLength=15)] = ""
    saddr: Prefixes = ()
    daddr: Prefixes = ()


class PolicyDoc(_Strict):
    expect_max: Annotated[
        int | None,
        PlainValidator(_expect_max),
        _schema("Expectations a connection may have at once", type="integer", minimum=1, maximum=255),
    ] = None
    expect_timeout: Annotated[
        int | None, PlainValidator(_duration), _schema("How long each waits: 300, 5m, 1h", **_DURATION_SCHEMA)
    ] = None


class GuardDoc(_Strict):
    ports: Annotated[
        PortRange | None, PlainValidator(_ports), _schema("Where an expected connection may go", **_PORTS_SCHEMA)
    ] = None
    source: Annotated[Source | None, PlainValidator(_one_of(Source)), _schema("Who may open it", **_words(Source))] = (
        None
    )
    destination: Annotated[
        Destination | None,
        PlainValidator(_one_of(Destination)),
        _schema("Where to: an end of the master connection, or any host", **_words(Destination)),
    ] = None
    permanent: Annotated[
        bool | None, PlainValidator(_flag), _schema("May it stay after the first match", type="boolean")
    ] = None


class ProcessDoc(_Strict):
    user: Annotated[
        str,
        PlainValidator(_user),
        _schema("Whom the helper process runs as: own, or the name of a user", type="string"),
    ] = _as_written("own")
    memory: Annotated[
        int,
        PlainValidator(_memory),
        _schema("What it may have of memory", type="string", pattern="^[0-9]+[MG]$"),
    ] = _as_written("128M")
    restart: Annotated[
        Restart,
        PlainValidator(_one_of(Restart)),
        _schema("Is it started again when it ends", **_words(Restart)),
    ] = _as_written(str(Restart.ON_FAILURE))
    restart_limit: Annotated[
        int,
        PlainValidator(_restart_limit),
        _schema("How often, at most", type="integer", minimum=1, maximum=_RESTARTS_MAX),
    ] = 10
    restart_window: Annotated[int, PlainValidator(_window), _schema("Within which time", **_DURATION_SCHEMA)] = (
        _as_written("10m")
    )


class HelperDoc(_Strict):
    use: Annotated[
        Word,
        _schema(
            "Name in the catalogue, file of your own (./NAME.py), or name that an installed package offers; default:"
            " the key of this entry",
            type="string",
        ),
    ] = ""
    engine: Annotated[Word, _schema("Who inspects the packets", **_words(Engine))] = ""
    name: Annotated[
        str, PlainValidator(_registration_name), _schema("Registration name; default: KEY-us", **_NAME_SCHEMA)
    ] = ""
    attach: Annotated[
        tuple[AttachDoc, ...], BeforeValidator(_list), Field(description="Which connections; default: the usual ports")
    ] = ()
    queueing: Annotated[
        Queueing | None, PlainValidator(_one_of(Queueing)), _schema("Who queues packets", **_words(Queueing))
    ] = None
    queue: Annotated[
        int | None,
        PlainValidator(_auto_or("queue number", _QUEUE_MAX)),
        _schema("auto, or the first number", **_auto_schema(_QUEUE_MAX)),
    ] = None
    label: Annotated[
        int | None,
        PlainValidator(_auto_or("connection label", _LABEL_MAX)),
        _schema("Bit of the connection label, with queueing: rules", **_auto_schema(_LABEL_MAX)),
    ] = None
    inspect: Annotated[
        Inspect | None,
        PlainValidator(_one_of(Inspect)),
        _schema("Which packets rules queue, with engine: native", **_words(Inspect)),
    ] = None
    guard: Annotated[
        GuardDoc,
        BeforeValidator(_guard),
        Field(description="strict, or what expectations may open, with engine: native", json_schema_extra=_or_strict),
    ] = GuardDoc()
    process: Annotated[
        ProcessDoc, Field(description="The helper process, with engine: native", default_factory=ProcessDoc)
    ]
    policies: Annotated[
        dict[str, PolicyDoc], BeforeValidator(_at_most_four), Field(description="Limits, by name of the policy")
    ] = {}


class ProfileDoc(_Strict):
    profile: Annotated[
        str,
        PlainValidator(_profile_name),
        _schema("Name of the profile", type="string", pattern="^[a-z][a-z0-9-]{0,17}$"),
    ]
    netns: Annotated[
        str, PlainValidator(_netns), _schema("Network namespace, name or path; default: the caller's", type="string")
    ] = ""
    backend: Annotated[
        Backend, PlainValidator(_one_of(Backend)), _schema("How rules are written", **_words(Backend))
    ] = Backend.NFTABLES
    families: Annotated[
        tuple[Annotated[L3Proto, PlainValidator(_one_of(L3Proto))], ...],
        BeforeValidator(_list),
        _schema("Address families; default: both", **_items(_words(L3Proto))),
    ] = tuple(L3Proto)
    reconcile: Annotated[
        bool, PlainValidator(_flag), _schema("Mend what others change; default: false", type="boolean")
    ] = False
    confirm_within_s: Annotated[
        int,
        PlainValidator(_confirm_within),
        _schema(
            "Undo an apply that is not confirmed within so many seconds; default: 0, keep it",
            type="integer",
            minimum=0,
            maximum=model.CONFIRM_MAX_S,
        ),
    ] = 0
    helpers: Annotated[dict[str, HelperDoc], Field(description="Helpers by a name of your choice", min_length=1)]


def known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys that the mapping at a path may have."""
    if not path:
        return list(ProfileDoc.model_fields)
    if len(path) == 2:
        return list(HelperDoc.model_fields)
    documents: dict[str | int, type[BaseModel]] = {"attach": AttachDoc, "guard": GuardDoc, "process": ProcessDoc}
    return list(documents.get(path[2], PolicyDoc).model_fields)


def explain(error: ErrorDetails) -> tuple[str, str]:
    """Message and hint, in our words, for one error of pydantic."""
    kind, found, path = error["type"], error["input"], error["loc"]
    key = str(path[-1]) if path else ""
    if kind == "fault":
        return error["ctx"]["message"], error["ctx"]["hint"]
    if kind == "extra_forbidden":
        known = known_keys(path[:-1])
        return f"unknown key {show(key)}", nearest(key, known) or f"known here: {', '.join(known)}"
    if kind == "missing":
        return f"the key {key} is missing", f"for example {key}: {_EXAMPLES[key]}"
    if kind == "too_short":
        return "there is no helper in it", "for example ftp: {}"
    hint = "write {} for one without options" if found is None else ""
    return (
        f"expected a mapping, found {show(found)}",
        f"for example helpers: {_EXAMPLES[key]}" if key == "helpers" else hint,
    )


_EXAMPLES = {"profile": "office-edge", "helpers": "{ftp: {}}"}
