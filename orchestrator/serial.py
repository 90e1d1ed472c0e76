"""Frozen dataclasses to JSON and back, for the ledger: by their annotations, so that a value needs no own code."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_Reader = Callable[[Any], Any]


def to_json(value: Any) -> str:
    """JSON text; a dataclass becomes an object that says in `is` which it was, a string enum its value, bytes hex."""
    return json.dumps(value, default=_plain, separators=(",", ":"))


def from_json(kind: Any, text: str) -> Any:
    """The inverse of `to_json` for the annotated type `kind`; raises ValueError, TypeError or LookupError."""
    return _reader(kind)(json.loads(text))


def _plain(value: Any) -> Any:
    """One level of what JSON has no word for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__, **{name: getattr(value, name) for name in _names(type(value))}}
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot be written as JSON: {value!r}")


@functools.cache
def _reader(kind: Any) -> _Reader:
    """What makes a value of an annotated type from JSON; made once per type, as a ledger holds thousands of values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union_reader(arguments)
    if origin is tuple and arguments[1:] == (...,):
        item = _reader(arguments[0])
        return lambda plain: tuple(map(item, plain))
    if origin is tuple:
        items = [_reader(argument) for argument in arguments]
        return lambda plain: tuple(read(part) for read, part in zip(items, plain, strict=True))
    if origin is frozenset:
        item = _reader(arguments[0])
        return lambda plain: frozenset(map(item, plain))
    if origin is not None and issubclass(origin, Mapping):
        item = _reader(arguments[1])
        return lambda plain: {key: item(part) for key, part in plain.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    if kind is bytes:
        return bytes.fromhex
    return kind if issubclass(kind, enum.Enum) else _checker(kind)


def _union_reader(arguments: tuple[Any, ...]) -> _Reader:
    readers = {member.__name__: _reader(member) for member in arguments if member is not type(None)}
    only = next(iter(readers.values())) if len(readers) == 1 else None
    is_optional = type(None) in arguments

    def read(plain: Any) -> Any:
        if plain is None and is_optional:
            return None
        return (only or readers[plain["is"]])(plain)

    return read


def _dataclass_reader(kind: Any) -> _Reader:
    hints = typing.get_type_hints(kind)
    readers = [(name, _reader(hints[name])) for name in _names(kind)]
    return lambda plain: kind(**{name: read(plain[name]) for name, read in readers if name in plain})


def _checker(kind: Any) -> _Reader:
    accepted = (int, float) if kind is float else kind

    def read(plain: Any) -> Any:
        if not isinstance(plain, accepted):
            raise TypeError(f"{kind.__name__} expected, not {plain!r}")
        return plain

    return read


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))
