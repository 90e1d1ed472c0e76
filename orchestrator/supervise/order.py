"""How one helper process is run: written beside its documents by who starts it, read by the supervisor at any time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from orchestrator.supervise.lifecycle import Policy


class VersionError(ValueError):
    """An order for a supervisor of another version."""


@dataclass(frozen=True, slots=True)
class Order:
    """A process as NAME.order has it: `argv` begins with the full path of its program.

    It is ready when all `queues` are bound, and its page says so if it has one (`has_page`). `keys` are its
    registrations, as file names have them. When it ends, `disable` is sent; when it is ready again, `keep_disabled`,
    and then `enable`, by key. These are netlink messages in hexadecimal digits.
    """

    name: str
    argv: list[str]
    env: dict[str, str]
    queues: list[int]
    has_page: bool
    keys: list[str]
    disable: list[str]
    keep_disabled: list[str]
    enable: dict[str, str]
    is_restarted: bool
    restart_limit: int
    restart_window_s: int
    ready_within_s: int

    @property
    def policy(self) -> Policy:
        return Policy(self.is_restarted, self.restart_limit, self.restart_window_s, self.ready_within_s)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, name: str, suffix: str = "") -> Order:
        """The order of that name in the working directory. Raises OSError, and ValueError for what is none."""
        with open(f"{file_name(name)}{suffix}", "rb") as file:  # noqa: PTH123 (a supervisor imports no pathlib)
            values = json.load(file)
        if not isinstance(values, Mapping) or values.keys() != {field.name for field in fields(cls)}:
            raise VersionError(f"{file_name(name)} is not an order of this version")
        return cls(**values)


def file_name(name: str) -> str:
    return f"{name}.order"
