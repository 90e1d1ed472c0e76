"""What a replay tells, as plain values: they cross the border between its process and `orch` as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Request:
    """What to replay. `kind` is `file` for a file of the user's own called `name`, else `named`.

    `ports` replace those that the helper declares; empty means them. `snat` and `dnat` are addresses as text, empty
    without translation. The rest loosens the bounds of the guard: `ports_expected` are the first and the last port.
    """

    kind: str
    name: str
    ports: tuple[int, ...] = ()
    snat: str = ""
    dnat: str = ""
    ports_expected: tuple[int, int] | None = None
    is_any_source: bool = False
    is_any_destination: bool = False
    is_permanent: bool = False
    is_verbose: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """An expectation as the kernel would hold it; an empty `src` and port 0 are any. `nat_port` is where NAT leads."""

    l4proto: str
    src: str
    sport: int
    dst: str
    dport: int
    policy: str
    timeout_s: int
    permanent: bool
    helper: str
    nat_port: int | None


@dataclass(frozen=True, slots=True)
class PacketReport:
    """A packet of a connection that has the helper, by the number of its frame, and what came of it.

    `time_s` counts from the first frame, None if the capture has no times. Addresses and ports are those of the
    capture. `payload` is its first line, `rewritten` are pairs (old, new), all made printable. `private` is the
    helper's new private data in hexadecimal, None if it stays as it was. `finished`: the helper is done with the
    connection. `error` is what the helper raised.
    """

    number: int
    time_s: float | None
    connection: int
    direction: str
    l4proto: str
    src: str
    sport: int
    dst: str
    dport: int
    payload: str
    payload_len: int
    expectations: tuple[Expected, ...] = ()
    rewritten: tuple[tuple[str, str], ...] = ()
    private: str | None = None
    refused: tuple[str, ...] = ()
    finished: bool = False
    error: str = ""

    @property
    def is_quiet(self) -> bool:
        """True if nothing came of it."""
        told = (self.expectations, self.rewritten, self.refused, self.finished, self.error)
        return self.private is None and not any(told)


@dataclass(slots=True)
class Summary:
    """Counts of a whole replay; `warnings` say what of the capture could not be read."""

    frames: int = 0
    connections: int = 0
    packets: int = 0
    expectations: int = 0
    rewritten: int = 0
    refused: int = 0
    errors: int = 0
    warnings: list[str] = field(default_factory=list)

    def count(self, report: PacketReport) -> None:
        self.packets += 1
        self.expectations += len(report.expectations)
        self.rewritten += len(report.rewritten)
        self.refused += len(report.refused)
        self.errors += bool(report.error)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no replay; `is_of_capture` says that the capture is to blame, and not the helper."""

    what: str
    hint: str = ""
    is_of_capture: bool = False


Line = PacketReport | Summary | Failure
_KINDS: dict[str, type[PacketReport] | type[Summary] | type[Failure]] = {
    "packet": PacketReport,
    "summary": Summary,
    "failure": Failure,
}


def value(line: Line) -> dict[str, Any]:
    return dataclasses.asdict(line)


def encode(line: Line) -> str:
    kind = next(name for name, known in _KINDS.items() if isinstance(line, known))
    return json.dumps({"type": kind, **value(line)}, ensure_ascii=True)


def decode(text: str) -> Line:
    """The inverse of `encode`; raises ValueError, TypeError, KeyError or RecursionError for anything else.

    A helper could have written it: it has the right types, and no text that a terminal would obey.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise TypeError("not an object")
    kind = _KINDS[content.pop("type")]
    if kind is PacketReport:
        content["expectations"] = tuple(Expected(**expected) for expected in content["expectations"])
        content["rewritten"] = tuple((old, new) for old, new in content["rewritten"])
        content["refused"] = tuple(content["refused"])
    line = kind(**content)
    if not _fits(line, kind):
        raise ValueError("not of the types of a line, or not printable")
    return line


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type that the lines have."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return type(value) is hint and all(_fits(getattr(value, name), kind) for name, kind in _fields(hint))
    kinds = get_args(hint)
    match get_origin(hint):
        case None:
            return type(value) is hint and (hint is not str or str(value).isprintable())
        case origin if origin is UnionType:
            return any(_fits(value, kind) for kind in kinds)
        case origin:
            return isinstance(value, origin) and all(_fits(item, kinds[0]) for item in value)


@cache
def _fields(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple(get_type_hints(kind).items())


def decode_request(text: str) -> Request:
    content = json.loads(text)
    bounds = content["ports_expected"]
    return Request(**{**content, "ports": tuple(content["ports"]), "ports_expected": bounds and tuple(bounds)})
