"""What a helper process is told, in the document `helper-NAME.toml`: whom it serves, which queues, what is allowed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from orchestrator.engine.api import Bounds

T = TypeVar("T")

_PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LABEL_BITS = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """One helper process.

    `use` names one of our helpers or an installed one; `file` is where the user's own came from, an absolute path, and
    `sha256` that of its copy beside the document, both empty otherwise. `names` are those of its registrations. It
    binds all `queues`; in queueing `rules` the second, if there is one, has the connections whose sequence numbers were
    adjusted. `label` is the bit of the connection label that queues a connection, None in queueing `registration`.
    `inspect` is `triggers` if only payloads that begin with one are queued, else `payload`. `user` is whom it runs as,
    empty for a user of its own. `memory_bytes` is what it may have of memory.
    """

    name: str
    use: str
    file: str
    sha256: str
    queueing: str
    inspect: str
    names: tuple[str, ...]
    queues: tuple[int, ...]
    bounds: Bounds
    user: str
    memory_bytes: int
    label: int | None = None

    @property
    def is_by_rules(self) -> bool:
        return self.queueing == "rules"


def parse(text: str) -> Settings:
    """Read a document. Raises ValueError that says which key is wrong, and how."""
    values = tomllib.loads(text)
    _refuse_unknown(values, {field.name for field in fields(Settings)}, "")
    settings = Settings(
        name=_take(values, "name", str),
        use=_take(values, "use", str),
        file=_take(values, "file", str),
        sha256=_take(values, "sha256", str),
        queueing=_take(values, "queueing", str),
        inspect=_take(values, "inspect", str),
        names=_list(values, "names", str),
        queues=_list(values, "queues", int),
        bounds=_bounds(_take(values, "bounds", dict)),
        user=_take(values, "user", str),
        memory_bytes=_take(values, "memory_bytes", int),
        label=_take(values, "label", int) if "label" in values else None,
    )
    wrong = _fault(settings)
    if wrong:
        raise ValueError(wrong)
    return settings


def _fault(settings: Settings) -> str:
    queues = settings.queues
    if not (settings.name and settings.use and all(settings.names)):
        return "name, use and names must not be empty"
    if settings.memory_bytes <= 0:
        return f"memory_bytes: more than 0, not {settings.memory_bytes}"
    if settings.file and not settings.file.startswith("/"):
        return f"file: not an absolute path: {settings.file!r}"
    if bool(settings.file) != (_SHA256.fullmatch(settings.sha256) is not None):
        return "sha256: a file, and nothing else, has one of 64 hexadecimal digits"
    if settings.queueing not in ("rules", "registration"):
        return f"queueing: rules or registration, not {settings.queueing!r}"
    if settings.inspect not in ("payload", "triggers"):
        return f"inspect: payload or triggers, not {settings.inspect!r}"
    if len(set(queues)) != len(queues) or not all(0 <= number <= 0xFFFF for number in queues):
        return f"queues: different numbers of 0-65535, not {list(queues)}"
    if settings.is_by_rules != (settings.label is not None):
        return "label: needed with queueing rules, and only there"
    if settings.label is not None and not 0 <= settings.label < _LABEL_BITS:
        return f"label: 0-{_LABEL_BITS - 1}, not {settings.label}"
    return ""


def _bounds(values: Mapping[str, object]) -> Bounds:
    _refuse_unknown(values, {"ports", "source", "destination", "permanent"}, "bounds.")
    text = _take(values, "ports", str, "bounds.")
    match = _PORTS.fullmatch(text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last <= 0xFFFF:
        raise ValueError(f"bounds.ports: a range such as 1024-65535, not {text!r}")
    return Bounds(
        first_port=first,
        last_port=last,
        is_any_source=_is_any(values, "source", "peer"),
        is_any_destination=_is_any(values, "destination", "master"),
        is_permanent=_take(values, "permanent", bool, "bounds."),
    )


def _is_any(values: Mapping[str, object], key: str, otherwise: str) -> bool:
    value = _take(values, key, str, "bounds.")
    if value not in ("any", otherwise):
        raise ValueError(f"bounds.{key}: any or {otherwise}, not {value!r}")
    return value == "any"


def _refuse_unknown(values: Mapping[str, object], known: set[str], prefix: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}")


def _take(values: Mapping[str, object], key: str, kind: type[T], prefix: str = "") -> T:
    if key not in values:
        raise ValueError(f"{prefix}{key} is missing")
    value = values[key]
    if type(value) is not kind:  # not isinstance: a bool is no number here
        raise ValueError(f"{prefix}{key}: {kind.__name__} expected, not {value!r}")
    return value


def _list(values: Mapping[str, object], key: str, kind: type[T]) -> tuple[T, ...]:
    items = _take(values, key, list)
    if not items or not all(type(item) is kind for item in items):
        raise ValueError(f"{key}: a list of {kind.__name__} expected, not {items!r}")
    return tuple(items)
