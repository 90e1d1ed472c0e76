"""Rendered documents: a directory per case, with profile.yaml and every document. ORCH_UPDATE_GOLDEN=1 renews them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator import profile, render

GOLDEN = Path(__file__).parents[1] / "golden" / "render"
CASES = sorted(d.name for d in GOLDEN.iterdir())
PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml"))
# The document of a helper in a file holds the path of the file, which is another on each machine.
SHIPPED = [file for file in PROFILES if "use: ./" not in file.read_text()]
SHIPPED_GOLDEN = Path(__file__).parents[1] / "golden" / "profiles"


def documents(text: str) -> dict[str, str]:
    return {d.name: d.text for d in render.render(profile.load(text, "profile.yaml"))}


def check(rendered: dict[str, str], directory: Path) -> None:
    """Compare with the files of a directory, or write them anew."""
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if path.name != "profile.yaml":
                path.unlink()
        for name, text in rendered.items():
            (directory / name).write_text(text)
    assert rendered == {p.name: p.read_text() for p in directory.iterdir() if p.name != "profile.yaml"}


@pytest.mark.parametrize("case", CASES)
def test_documents_are_as_expected(case: str) -> None:
    check(documents((GOLDEN / case / "profile.yaml").read_text()), GOLDEN / case)


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_profiles_render_as_expected(file: Path, backend: str) -> None:
    check(documents(f"{file.read_text()}\nbackend: {backend}\n"), SHIPPED_GOLDEN / f"{file.stem}.{backend}")


@pytest.mark.parametrize("case", CASES)
def test_what_is_parsed_back_is_what_the_profile_asks_for(case: str) -> None:
    desired = profile.load((GOLDEN / case / "profile.yaml").read_text(), "profile.yaml")
    target = render.target(desired)
    assert (target.registrations, target.stock) == (desired.registrations, desired.stock)
    assert target.processes == desired.processes
    assert target.rules.digest in target.rules.documents[0].text
