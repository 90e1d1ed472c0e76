"""Rendered documents: a directory per case, with profile.yaml and every document. ORCH_UPDATE_GOLDEN=1 renews them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator import profile, render

GOLDEN = Path(__file__).parents[1] / "golden" / "render"
CASES = sorted(d.name for d in GOLDEN.iterdir())


def documents(case: str) -> dict[str, str]:
    desired = profile.load((GOLDEN / case / "profile.yaml").read_text(), f"{case}/profile.yaml")
    return {d.name: d.text for d in render.render(desired)}


@pytest.mark.parametrize("case", CASES)
def test_documents_are_as_expected(case: str) -> None:
    directory = GOLDEN / case
    rendered = documents(case)
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        for path in directory.iterdir():
            if path.name != "profile.yaml":
                path.unlink()
        for name, text in rendered.items():
            (directory / name).write_text(text)
    expected = {p.name: p.read_text() for p in directory.iterdir() if p.name != "profile.yaml"}
    assert rendered == expected


@pytest.mark.parametrize("case", CASES)
def test_what_is_parsed_back_is_what_the_profile_asks_for(case: str) -> None:
    desired = profile.load((GOLDEN / case / "profile.yaml").read_text(), "profile.yaml")
    target = render.target(desired)
    assert (target.registrations, target.stock) == (desired.registrations, desired.stock)
    assert target.processes == desired.processes
    assert target.rules.digest in target.rules.documents[0].text
