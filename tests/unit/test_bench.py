"""The bench compares like with like: orch's profile and the recipe by hand attach the same connections."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.recipes import by_hand, by_orch
from orchestrator import profile, render


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("attachments", [1, 2, 300])
def test_both_ways_attach_as_much_as_was_asked_for(backend: str, attachments: int, tmp_path: Path) -> None:
    orch = by_orch(backend, attachments, orch="orch", directory=tmp_path, netns="bench")
    hand = by_hand(backend, attachments, directory=tmp_path)
    target = render.target(profile.load_file(tmp_path / "profile.yaml"))
    assert len(target.attachments) == attachments
    (rules,) = target.rules.documents
    assert len(orch.attached.findall(rules.text)) == attachments
    assert len(hand.attached.findall((tmp_path / "rules").read_text())) == attachments
    assert [action for action, _ in orch.actions] == [action for action, _ in hand.actions]
