"""The TFTP helper, and the example that authors begin with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from orchestrator.engine.api import L4, NOTHING, Direction, Expect, Flow, Helper, Policy, Source
from orchestrator.helpers.tftp import Tftp
from tests.fuzz import FLOW, FLOW6

TFTP = Tftp()
STEAM = Path(__file__).parents[2] / "profiles" / "steam.py"


def test_it_declares_what_the_kernel_helper_has() -> None:
    """net/netfilter/nf_conntrack_tftp.c, nf_conntrack_tftp_init."""
    assert TFTP.policies == (Policy("tftp", 1, 300),)
    assert [(s.l4proto, s.ports) for s in TFTP.serves] == [(L4.UDP, (69,))]
    assert TFTP.private_len == 0


@pytest.mark.parametrize("flow", [FLOW, FLOW6], ids=["ip", "ip6"])
@pytest.mark.parametrize(
    "message",
    [b"\0\1a\0octet\0", b"\0\2dir/a file\0NetASCII\0", b"\0\1a\0octet\0tsize\0" + b"0\0", b"\0\1a\0mail\0blksize"],
)
def test_a_request_expects_any_port_of_the_server_to_the_port_it_came_from(flow: Flow, message: bytes) -> None:
    (expect,) = TFTP.inspect(message, Direction.ORIGINAL, flow, b"").expects
    assert expect == Expect(L4.UDP, port=None, address=None, text=None, source=Source.PEER, source_port=0)
    assert TFTP.inspect(message, Direction.REPLY, flow, b"") == NOTHING


@pytest.mark.parametrize(
    "payload", [b"\0\1", b"\0\1\0", b"\0\1a", b"\0\1a\0", b"\0\1a\0octet", b"\0\1\0octet\0", b"\0\2a\0\0"]
)
def test_a_request_without_file_name_and_mode_is_refused(payload: bytes) -> None:
    answer = TFTP.inspect(payload, Direction.ORIGINAL, FLOW, b"")
    assert (answer.expects, bool(answer.refused)) == ((), True)


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0\3\0\1data", b"\0\4\0\1", b"\0\5\0\1no\0", b"\1\0a\0octet\0"])
def test_other_messages_say_nothing(payload: bytes) -> None:
    assert TFTP.dull(Direction.ORIGINAL, b"").fullmatch(payload)
    assert TFTP.inspect(payload, Direction.ORIGINAL, FLOW, b"") == NOTHING


@pytest.fixture
def steam() -> Helper:
    spec = importlib.util.spec_from_file_location("steam", STEAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    helper = module.Steam()
    assert isinstance(helper, Helper)
    return helper


def test_the_example_expects_answers_from_any_host_to_a_query(steam: Helper) -> None:
    query = bytes.fromhex("ffffffff214c5fa0 06000000 0801 1000 1800 02000000 0801")
    (expect,) = steam.inspect(query, Direction.ORIGINAL, FLOW, b"").expects
    assert (expect.port, expect.source, expect.source_port, expect.is_permanent) == (None, Source.ANY, 27036, True)
    assert steam.inspect(query, Direction.REPLY, FLOW, b"") == NOTHING
    assert steam.inspect(query[4:], Direction.ORIGINAL, FLOW, b"") == NOTHING


def test_the_example_asks_for_the_bounds_it_needs(steam: Helper) -> None:
    assert (steam.bounds.is_any_source, steam.bounds.is_permanent, steam.bounds.is_any_destination) == (
        True,
        True,
        False,
    )
    assert steam.outgoing_only
    assert steam.families == ("ip",)


def test_the_example_is_short() -> None:
    assert len(STEAM.read_text().splitlines()) <= 40
