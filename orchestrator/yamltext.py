"""YAML text to plain data with the place of every part; strict, so that no reader of the file sees something else.

Scalars follow the YAML 1.2 core rules without floats: null, true, false, integers, else text. What readers of YAML 1.1
take for something else (`no`, `21:22`, `0755`) is an error unless it is quoted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from orchestrator.errors import Problem, ProfileError

MAX_DEPTH = 30
MAX_NODES = 500_000

Place = tuple[int, int]
Part = str | int
Path = tuple[Part, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_INTEGER = re.compile(r"[-+]?[0-9]{1,20}|0o[0-7]{1,20}|0x[0-9a-fA-F]{1,20}")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]{1,30}")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]{0,30}(:[0-5]?[0-9]){1,3}")
_KEYWORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_YAML_1_1_BOOLEANS = frozenset(("yes", "no", "on", "off"))


@dataclass(slots=True)
class Tree:
    """Plain data (dict, list, str, int, bool, None) of one document, where its parts are, and what is wrong with it.

    An alias gives the very object of its anchor, so the place of what is inside is that of the anchor.
    """

    source: str
    data: object = None
    problems: list[Problem] = field(default_factory=list)
    root: Place = (1, 1)
    places: dict[int, dict[Part, tuple[Place, Place]]] = field(default_factory=dict)
    unreadable: set[Place] = field(default_factory=set)

    def place(self, path: Path, *, of_key: bool = False) -> Place:
        """Line and column, from 1, of the value (or the key) at a path; of the nearest part that exists.

        An index into what is no list is skipped: one value may stand for a list of one.
        """
        container: Any = self.data
        place = self.root
        for position, part in enumerate(path):
            if isinstance(part, int) and not isinstance(container, list):
                continue
            places = self.places.get(id(container), {}).get(part)
            if places is None:
                break
            place = places[0] if of_key and position == len(path) - 1 else places[1]
            container = container[part]
        return place

    def report(self, path: Path, message: str, hint: str = "", *, of_key: bool = False) -> None:
        """Add a problem; not where the text itself was found wrong, what follows from that is noise."""
        place = self.place(path, of_key=of_key)
        if place not in self.unreadable:
            self.problems.append(Problem(self.source, *place, message, hint))


def decode(raw: bytes, source: str) -> str:
    """UTF-8 to text; raises ProfileError with the place of the first byte that is none."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        hint = "save the file as UTF-8"
        raise ProfileError((Problem(source, *_place_after(before), "not UTF-8 text", hint),)) from error


def parse(text: str, source: str) -> Tree:
    """Read one document; its data is None if there is none.

    Raises ProfileError if it is no YAML at all; everything else that is wrong is in `problems`.
    """
    text = text.removeprefix("\ufeff")
    forbidden = _FORBIDDEN.search(text)
    if forbidden is not None:
        place = _place_after(text[: forbidden.start()])
        message = f"character U+{ord(forbidden.group()):04X} is not allowed"
        raise ProfileError((Problem(source, *place, message, "remove it; such characters are invisible in editors"),))
    try:
        return _Reader(text, source).document()
    except yaml.MarkedYAMLError as error:
        raise ProfileError((_syntax_problem(error, text, source),)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # The pure Python scanner, used where libyaml is missing, lets bad \U escapes escape as ValueError.
        raise ProfileError((Problem(source, 0, 0, f"not YAML: {error}".splitlines()[0]),)) from error


def _place_after(text: str) -> Place:
    lines = re.split("\r\n|\r|\n", text)
    return len(lines), len(lines[-1]) + 1


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem(source, 0, 0, f"not YAML: {error.problem}")
    lines = re.split("\r\n|\r|\n", text)
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    context = f", {error.context}" if error.context else ""
    hint = "indent with spaces, tabs are not allowed" if rest.startswith("\t") else ""
    return Problem(source, mark.line + 1, mark.column + 1, f"not YAML: {error.problem}{context}", hint)


class _Reader:
    """Walks the parser's events once; recursion is bounded by MAX_DEPTH, work by MAX_NODES."""

    def __init__(self, text: str, source: str) -> None:
        self._next: Callable[[], Any] = _LOADER(text).get_event
        self._tree = Tree(source)
        self._nodes = 0
        self._anchors: dict[str, tuple[object, int]] = {}
        self._open_anchors: set[str] = set()

    def document(self) -> Tree:
        self._next()  # start of the stream
        if not isinstance(self._next(), DocumentStartEvent):
            return self._tree
        root = self._next()
        self._tree.root = _place(root)
        self._tree.data = self._value(root, 0)
        self._next()  # end of the document
        event = self._next()
        if not isinstance(event, StreamEndEvent):
            self._report(event, "a second document begins here", "one profile per file: remove the line ---")
        return self._tree

    def _report(self, event: Any, message: str, hint: str = "") -> None:
        self._tree.problems.append(Problem(self._tree.source, *_place(event), message, hint))
        self._tree.unreadable.add(_place(event))

    def _stop(self, event: Any, message: str, hint: str = "") -> ProfileError:
        self._report(event, message, hint)
        return ProfileError(tuple(self._tree.problems))

    def _count(self, event: Any, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise self._stop(event, f"more than {MAX_NODES} values", "an alias (*name) counts with all that it repeats")

    def _value(self, event: Any, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise self._stop(event, f"nested more than {MAX_DEPTH} levels deep")
        self._count(event, 1)
        if isinstance(event, AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            hint = "remove it; quote a value that is meant as text"
            self._report(event, f"tags are not supported: {event.tag!r}", hint)
        if event.anchor is None:
            return self._content(event, depth)
        self._open_anchors.add(event.anchor)
        before = self._nodes
        value = self._content(event, depth)
        self._open_anchors.discard(event.anchor)
        self._anchors[event.anchor] = (value, self._nodes - before)
        return value

    def _content(self, event: Any, depth: int) -> object:
        if isinstance(event, ScalarEvent):
            return event.value if event.style else self._plain(event)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(depth)
        return self._mapping(depth)

    def _alias(self, event: AliasEvent) -> object:
        if event.anchor in self._open_anchors:
            raise self._stop(event, f"*{event.anchor} is inside its own anchor: it would never end")
        if event.anchor not in self._anchors:
            self._report(event, f"there is no anchor &{event.anchor} before this alias")
            return None
        value, nodes = self._anchors[event.anchor]
        self._count(event, nodes)
        return value

    def _sequence(self, depth: int) -> list[object]:
        items: list[object] = []
        places: dict[Part, tuple[Place, Place]] = {}
        while not isinstance(event := self._next(), SequenceEndEvent):
            place = _place(event)
            places[len(items)] = (place, place)
            items.append(self._value(event, depth + 1))
        self._tree.places[id(items)] = places
        return items

    def _mapping(self, depth: int) -> dict[str, object]:
        items: dict[str, object] = {}
        places: dict[Part, tuple[Place, Place]] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            key = self._key(event, depth)
            value_event = self._next()
            value = self._value(value_event, depth + 1)
            if key is None:
                continue
            if key in items:
                line, column = places[key][0]
                hint = f"the first is in line {line}, column {column}"
                self._report(event, f"the key {key!r} is here for the second time", hint)
                continue
            places[key] = (_place(event), _place(value_event))
            items[key] = value
        self._tree.places[id(items)] = places
        return items

    def _key(self, event: Any, depth: int) -> str | None:
        """The text of a key, None if it cannot be one; then it was reported."""
        if not isinstance(event, ScalarEvent):
            raise self._stop(event, "a key must be plain text")
        if not event.style and event.value == "<<":
            hint = "write the keys out, or let an alias stand for a whole value"
            self._report(event, "merge keys (<<) are not supported", hint)
            return None
        self._value(event, depth + 1)  # reports what other readers would take for something else
        return str(event.value)

    def _plain(self, event: ScalarEvent) -> object:
        text: str = event.value
        first = text[:1]
        if first.isdecimal() or first in ("+", "-"):
            return self._number_or_text(event, text)
        if len(text) > 5:
            return text
        if text in _KEYWORDS:
            return _KEYWORDS[text]
        if text.lower() in _YAML_1_1_BOOLEANS:
            self._report(event, f"{text} means true or false to many YAML readers", f'write "{text}" in quotes')
        return text

    def _number_or_text(self, event: ScalarEvent, text: str) -> object:
        if _LEADING_ZERO.fullmatch(text):
            hint = f'write {text.lstrip("+-0_") or 0}, or "{text}" in quotes'
            self._report(event, f"{text} is an octal number to many YAML readers", hint)
        elif _INTEGER.fullmatch(text):
            return int(text, 0)
        elif _SEXAGESIMAL.fullmatch(text):
            ports = f"{text.replace(':', '-')} for a range of ports, or " if text.count(":") == 1 else ""
            hint = f'write {ports}"{text}" in quotes'
            self._report(event, f"{text} is a number of base 60 to many YAML readers", hint)
        return text


def _place(event: Any) -> Place:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1
