"""The processes of a target, with the files they are started next to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields

from orchestrator.model import Document, Netns, ProcessSpec
from orchestrator.ports import Launch


def launches(
    profile: str, netns: Netns, processes: tuple[ProcessSpec, ...], documents: tuple[Document, ...]
) -> tuple[Launch, ...]:
    """One Launch per process; its digest changes with all that it says, files included."""
    texts = {document.name: document.text for document in documents}
    return tuple(
        Launch(profile, netns, spec, files, _digest(spec, files))
        for spec in processes
        for files in ({name: texts[name] for name in spec.files},)
    )


def _digest(spec: ProcessSpec, files: dict[str, str]) -> str:
    said = [sorted(files.items()), *(getattr(spec, field.name) for field in fields(spec))]
    text = json.dumps(said, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
