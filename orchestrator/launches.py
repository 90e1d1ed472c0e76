"""The processes of a target, with the files they are started next to."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from shutil import which

from orchestrator.model import HELPER_PROGRAM, SEARCH_PATH, Document, Netns, ProcessSpec
from orchestrator.ports import Launch

_PACKAGE = Path(__file__).parent


def launches(
    profile: str, netns: Netns, processes: tuple[ProcessSpec, ...], documents: tuple[Document, ...]
) -> tuple[Launch, ...]:
    """One Launch per process; its digest changes with all that it says, files included, and with the code it runs."""
    texts = {document.name: document.text for document in documents}
    return tuple(
        Launch(profile, netns, spec, files, _digest(spec, files))
        for spec in processes
        for files in ({name: texts[name] for name in spec.files},)
    )


def _digest(spec: ProcessSpec, files: dict[str, str]) -> str:
    said = [sorted(files.items()), *(getattr(spec, field.name) for field in fields(spec)), _code(spec, files)]
    text = json.dumps(said, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(spec: ProcessSpec, files: dict[str, str]) -> str:
    """What a native helper process runs of ours and of installed packages; a user's own helper is among the files.

    A program of others is another one when its file is, as after an upgrade of its package.
    """
    if spec.argv[0] != HELPER_PROGRAM:
        return _program(spec.argv[0])
    file, use = _said(files[spec.argv[-1]])
    return _engine() if file else f"{_engine()} {_helper(use)}"


@lru_cache(maxsize=1024)
def _said(document: str) -> tuple[str, str]:
    """The user's file of a helper, if it is one, and whose class it is."""
    said = tomllib.loads(document)
    return said["file"], said["use"]


def _program(name: str) -> str:
    """The file that is executed now; it has the times of its package."""
    found = which(name, path=SEARCH_PATH)
    if found is None:
        return ""
    status = Path(found).stat()
    return f"{status.st_size} {status.st_mtime_ns}"


@cache
def _engine() -> str:
    return _sha256(*sorted(_PACKAGE.glob("engine/*.py")))


@cache
def _helper(use: str) -> str:
    """One of our helpers by what it says, an installed one by the version of its package."""
    own = _PACKAGE / "helpers" / f"{use}.py"
    if own.exists():
        return _sha256(own)
    from importlib.metadata import entry_points

    from orchestrator.engine.loading import ENTRY_POINTS

    packages = (point.dist for point in entry_points(group=ENTRY_POINTS, name=use))
    return " ".join(sorted(f"{package.name} {package.version}" for package in packages if package))


def _sha256(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
