"""Imports point one way: cli -> app -> pure code -> model; adapters know the ports; only app wires them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "orchestrator"

# What each layer may import from the project, besides itself; the lists are short on purpose.
BASE = {"orchestrator", "errors", "model"}
PURE = BASE | {"ports", "state", "catalogue", "overlap", "launches", "release", "serial", "typed", "earlier"}
PROFILE = BASE | {"catalogue", "document", "overlap", "yamltext"}
PROFILE |= {"profile_schema", "resolve", "choose", "attach", "queues"}
PLAN = PURE | {"plan_registrations", "plan_processes", "plan_rules", "plan_standin", "queues"}
COMMAND = PURE | {"replay", "reports", "app", "execute", "kernel", "profile", "render", "supervise", "views"}
LAYERS: dict[str, set[str]] = {
    "__main__": {"cli"},
    "errors": set(),
    "model": set(),
    "ports": BASE | {"engine"},
    "state": BASE | {"ports", "typed"},
    "serial": set(),
    "typed": set(),
    "release": set(),
    "engine": set(),
    "helpers": {"engine"},
    "catalogue": BASE | {"engine"},
    "launches": BASE | {"ports", "engine"},
    "overlap": BASE,
    "earlier": BASE | {"ports"},
    **dict.fromkeys(("attach", "choose", "profile", "profile_schema", "queues", "resolve", "yamltext"), PROFILE),
    "document": BASE | {"engine"},
    **dict.fromkeys(("render", "ruleset"), BASE | {"document", "ruleset", "yamltext"}),
    **dict.fromkeys(("plan", "plan_registrations", "plan_processes", "plan_rules", "plan_standin"), PLAN),
    "plan_around": PLAN | {"plan"},
    "journal": PURE,
    "execute": PURE | {"journal", "observe"},
    "observe": PURE | {"journal"},
    "status": PURE | {"engine"},
    "reports": PURE | {"execute"},
    "fake": BASE | {"ports", "engine"},
    "kernel": BASE | {"ports", "kernel", "engine"},
    "supervise": BASE | {"ports", "engine", "catalogue"},
    "replay": {"errors", "engine", "supervise"},
    "look": PURE | {"observe", "plan", "plan_around", "plan_registrations"},
    "work": PURE | {"execute", "journal", "observe", "reports"},
    "establish": PURE | {"execute", "look", "plan_around", "reports", "work"},
    "remove": PURE | {"execute", "look", "observe", "reports", "work"},
    "settle": PURE | {"execute", "remove", "work"},
    "unconfirmed": PURE | {"establish", "execute", "journal", "remove", "reports", "work"},
    "survey": PURE | {"look", "observe", "status"},
    "app": PURE
    | {"establish", "execute", "journal", "look", "observe", "remove", "reports", "settle", "status", "survey"}
    | {"unconfirmed", "work", "kernel", "supervise"},
    "exporter": PURE | {"engine", "journal", "status"},
    "doctor": PURE | {"app", "journal", "observe", "status", "verify"},
    "events": PURE | {"kernel", "supervise"},
    "drift": PURE | {"app", "execute", "journal", "reports"},
    "watcher": PURE | {"app", "drift", "kernel", "supervise"},
    "explain": PURE | {"status"},
    "views": PURE
    | {"confirm", "doctor", "drift", "engine", "events", "explain", "replay", "reports", "execute", "status"}
    | {"supervise", "verify", "views"},
    "confirm": PURE | {"app", "execute", "journal", "reports"},
    "watchdog": PURE | {"app", "execute", "journal", "reports", "supervise"},
    "boot": BASE | {"render"},
    "complete": set(),
    "verify": PURE | {"app", "journal", "kernel", "observe", "render", "reports", "verify"},
    "session": COMMAND | {"complete", "watchdog"},
    "commands": COMMAND
    | {"doctor", "drift", "events", "explain", "journal", "exporter", "session", "verify", "watcher"}
    | {"boot", "complete", "confirm", "watchdog"},
    "cli": COMMAND | {"commands", "complete", "session"},
}


def imports(file: Path) -> set[str]:
    """Top-level parts of the project that a file imports, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "orchestrator":
            part = node.module.split(".")[1:2]
            found |= set(part) if part else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("orchestrator.")}
    return found - {"__version__"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    if file == PACKAGE / "__init__.py":
        assert not imports(file)
        return
    layer = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imports(file) - {layer} <= LAYERS[layer]


def test_every_layer_exists() -> None:
    there = {
        p.stem for p in PACKAGE.iterdir() if p.stem not in ("__init__", "__pycache__", "data") and p.suffix != ".typed"
    }
    assert there == set(LAYERS)


@pytest.mark.parametrize("program", ["supervisor", "foreground"])
def test_what_looks_after_processes_needs_the_standard_library_and_the_engine_alone(program: str) -> None:
    look = (
        f"import sys; sys.path.append({str(PACKAGE.parent)!r}); import orchestrator.supervise.{program};"
        " print(*{name.split('.')[1] for name in sys.modules if name.startswith('orchestrator.')})"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", look], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"engine", "supervise"}
