"""Frozen dataclasses to JSON and back, for the ledger: by their annotations, so that no value needs code of its own."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any


def to_plain(value: Any) -> Any:
    """Lists, dictionaries, strings and numbers; a dataclass becomes a dictionary, in a union with its name in `is`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **plain}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict | types.MappingProxyType):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, frozenset | set):
        return [to_plain(item) for item in sorted(value)]
    return value


def from_plain(kind: Any, plain: Any) -> Any:
    """The inverse of `to_plain` for the annotated type `kind`; raises ValueError or TypeError on anything else."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _from_union(arguments, plain)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is ...:
            return tuple(from_plain(arguments[0], item) for item in plain)
        return tuple(from_plain(a, item) for a, item in zip(arguments, plain, strict=True))
    if origin is frozenset:
        return frozenset(from_plain(arguments[0], item) for item in plain)
    if origin is not None and issubclass(origin, Mapping):
        return {key: from_plain(arguments[1], item) for key, item in plain.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: from_plain(hint, plain[name]) for name, hint in hints.items() if name in plain})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(plain)
    if not isinstance(plain, (int, float) if kind is float else kind):
        raise TypeError(f"{kind.__name__} expected, not {plain!r}")
    return plain


def _from_union(arguments: tuple[Any, ...], plain: Any) -> Any:
    if plain is None and type(None) in arguments:
        return None
    members = [a for a in arguments if a is not type(None)]
    if len(members) == 1:
        return from_plain(members[0], plain)
    return from_plain(next(m for m in members if m.__name__ == plain["is"]), plain)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return {f.name: typing.get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)}
