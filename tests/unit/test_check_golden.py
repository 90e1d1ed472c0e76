"""What `orch check` finds, case by case: tests/golden/check/CASE/profile.yaml and the text expected for it.

A new case is a new directory; ORCH_UPDATE_GOLDEN=1 writes its expected.txt.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.errors import ProfileError
from orchestrator.profile import load_file
from orchestrator.supervise.describe import describe

CASES = sorted(p for p in (Path(__file__).parents[1] / "golden" / "check").iterdir() if p.is_dir())


def findings(case: Path) -> str:
    try:
        warnings = load_file(case / "profile.yaml", describe).warnings
    except ProfileError as error:
        lines = [f"{p.place}: {p.message}" + (f" (hint: {p.hint})" if p.hint else "") for p in error.problems]
    else:
        lines = ["ok", *(f"warning: {warning}" for warning in warnings)]
    return "\n".join(lines).replace(f"{case}/", "") + "\n"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_findings_are_those_expected(case: Path) -> None:
    expected = case / "expected.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        expected.write_text(findings(case), encoding="utf-8")
    assert findings(case) == expected.read_text(encoding="utf-8")
