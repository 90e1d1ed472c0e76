"""What a helper declares, as JSON: asked of code nobody has looked at, in a process without privilege."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any, NoReturn

from orchestrator.engine import loading
from orchestrator.engine.api import Helper


def declaration(helper: type[Helper]) -> dict[str, Any]:
    """The declared attributes as plain values. Raises AttributeError, TypeError or ValueError for what is none."""
    return {
        "summary": helper.summary,
        "serves": [{"l4proto": serves.l4proto.name.lower(), "ports": list(serves.ports)} for serves in helper.serves],
        "policies": [dataclasses.asdict(policy) for policy in helper.policies],
        "families": list(helper.families),
        "outgoing_only": helper.outgoing_only,
        "private_len": helper.private_len,
        "bounds": dataclasses.asdict(helper.bounds),
        "triggers": [trigger.hex() for trigger in helper.triggers],
    }


def main(kind: str, name: str, program: str) -> NoReturn:
    """Describe the helper in the `file` called `name`, its source on standard input, or the `installed` one.

    `program` is the filter of system calls for code that is loaded, in hexadecimal digits. The answer is
    `{"declared": ...}` or `{"error": ...}` on standard output, and nothing that the helper prints.
    """
    loading.end_after(lambda: _describe(kind, name, program))


def _describe(kind: str, name: str, program: str) -> int:
    from orchestrator.engine import privileges

    source = sys.stdin.buffer.read()
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        privileges.confine_trial(bytes.fromhex(program))
        json.dump(_ask(kind, name, source), answer)
    return 0


def _ask(kind: str, name: str, source: bytes) -> dict[str, Any]:
    try:
        helper = loading.from_source(source, name) if kind == "file" else loading.installed(name)
        if helper.inspect is Helper.inspect:
            return {"error": f"{helper.__name__} has no method inspect"}
        helper()
        return {"declared": declaration(helper)}
    except loading.LoadError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 (anything may be written in a class)
        return {"error": f"what it declares cannot be read: {type(error).__name__}: {error}"}
