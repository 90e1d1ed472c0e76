"""The kernel's own helpers as the oracle: the same bytes through each engine, and the same expectations come of them.

The differences that are allowed, and no others:
    id            the kernel's address of the expectation, in disguise; not read at all
    lifetime      the seconds that are left when it is announced: the policy's, or one less
    helper        our registration has a name of its own, so that the kernel's module may be loaded beside it
    IPv6 text     the kernel writes addresses in full into a payload, others write them short; the address is compared
    port by NAT   where the announced port is taken, NAT chooses another: `test_a_port_that_is_taken`
conntrackd is shown beside them in the table below the results, on one kernel, and not judged.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lab.dialogue import SCRIPTS, Seen, Session, play_rivals
from lab.nat import OUTSIDE_IP, Nat, load_nat
from lab.topology import ROUTER, ROUTER_FILTER, load_filter
from orchestrator.verify.expectations import Ends, Expectation, expectations_made
from tests.kernel.conftest import IS_FIRST_KERNEL, clean_orch
from tests.reports import REPORTS

ORACLE, JUDGED, BESIDE = "kernel", "native", "conntrackd"
ANNOUNCES_IPV4_ONLY = ("PORT", "PASV", "port", "227 bare")
ANNOUNCES_ANOTHER_HOST = "PORT elsewhere"
SESSIONS = [
    Session(script, nat, ip6=ip6, port=port)
    for port, (nat, ip6, script) in enumerate(
        ((nat, ip6, script) for nat in Nat for ip6 in (False, True) for script in SCRIPTS), start=40001
    )
]
Side = dict[Session, Seen]


def profile(engine: str) -> str:
    families = "ip" if engine == BESIDE else "ip, ip6"
    return (
        f"profile: oracle\nfamilies: [{families}]\nhelpers:\n"
        f"  ftp: {{engine: {engine}, attach: [{{path: [incoming], ports: [2121]}}]}}\n"
        f"  tftp: {{engine: {engine}, attach: [{{path: [incoming], ports: [1069]}}]}}\n"
    )


def observe(engine: str, state: Path) -> Side:
    """Every session through one engine; one that serves IPv4 only gets no others."""
    with clean_orch(state) as orch, expectations_made(ROUTER) as events:
        load_filter(ROUTER, ROUTER_FILTER)
        orch.apply(profile(engine), ROUTER)
        seen: Side = {}
        for nat in Nat:
            load_nat(nat)
            played = (s for s in SESSIONS if s.nat is nat and not (s.ip6 and engine == BESIDE))
            seen |= {session: session.play(events) for session in played}
        return seen


@pytest.fixture(scope="module")
def sides(routed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Side]:
    engines = (ORACLE, JUDGED, BESIDE) if IS_FIRST_KERNEL else (ORACLE, JUDGED)
    found = {engine: observe(engine, tmp_path_factory.mktemp(engine)) for engine in engines}
    REPORTS["expectations: the kernel's helper, and what others make of the same bytes"] = list(table(found))
    return found


def table(sides: dict[str, Side]) -> Iterator[str]:
    """A line for each session: what the kernel expects, and who agrees with it."""
    for session, oracle in sides[ORACLE].items():
        opinions = (f"{name} {opinion(oracle, side.get(session))}" for name, side in sides.items() if name != ORACLE)
        expected = "; ".join(str(expectation.ends) for expectation in oracle.expectations) or "nothing"
        yield f"{str(session).ljust(26)} {'  '.join(o.ljust(20) for o in opinions)} {expected}"


def opinion(oracle: Seen, other: Seen | None) -> str:
    """`same`, or where another engine differs; a dash if it does not serve this at all."""
    if other is None:
        return "-"
    if len(other.expectations) != len(oracle.expectations):
        return f"expects {len(other.expectations)}"
    return ", ".join(differences(comparable(oracle), comparable(other))) or "same"


def differences(a: Seen, b: Seen) -> Iterator[str]:
    pairs: list[tuple[Seen, Seen] | tuple[Expectation, Expectation]] = [
        *zip(a.expectations, b.expectations, strict=True),
        (replace(a, expectations=()), replace(b, expectations=())),
    ]
    for one, other in pairs:
        yield from (f.name for f in fields(one) if getattr(one, f.name) != getattr(other, f.name))


def comparable(seen: Seen) -> Seen:
    """What has to be equal: everything but the differences that are allowed."""
    expectations = tuple(
        replace(expectation, helper="", lifetime_s=-(-expectation.lifetime_s // 5) * 5)
        for expectation in seen.expectations
    )
    return replace(seen, expectations=expectations, heard=re.sub(r"(?<=\|2\|)[0-9a-fA-F:]+", _shortest, seen.heard))


def _shortest(address: re.Match[str]) -> str:
    return str(ipaddress.ip_address(address[0]))


@pytest.mark.parametrize("session", SESSIONS, ids=str)
def test_the_engine_expects_what_the_kernel_expects(sides: dict[str, Side], session: Session) -> None:
    assert {e.helper for e in sides[JUDGED][session].expectations} <= {"ftp-us", "tftp-us"}
    assert comparable(sides[JUDGED][session]) == comparable(sides[ORACLE][session])


@pytest.mark.parametrize("session", SESSIONS, ids=str)
def test_the_oracle_is_worth_its_name(sides: dict[str, Side], session: Session) -> None:
    """The kernel's helper expects one connection, which then passes the filter; or none, where that is right."""
    seen = sides[ORACLE][session]
    assert not seen.trouble
    if session.script == ANNOUNCES_ANOTHER_HOST or (session.ip6 and session.script in ANNOUNCES_IPV4_ONLY):
        assert seen.expectations == ()
    else:
        assert len(seen.expectations) == 1
        assert seen.data_from not in ("", "blocked")


ENDS = Ends("10.66.2.2", 0, "10.66.1.2", 40001, 6)
EXPECTED = Expectation(ENDS, ENDS, 0, 0, 300, "ftp", 0, "nat-follow-master", (1, ENDS))
OTHER_ENDS = replace(ENDS, sport=1)
CHANGES = {
    "ends": OTHER_ENDS,
    "mask": OTHER_ENDS,
    "expect_class": 1,
    "flags": 1,
    "lifetime_s": 295,
    "zone": 1,
    "function": "",
    "nat": None,
}


def test_nothing_else_goes_unseen() -> None:
    assert {field.name for field in fields(Expectation)} - CHANGES.keys() == {"helper"}
    for name, value in CHANGES.items():
        changed = replace(EXPECTED, **{name: value})  # type: ignore[arg-type]
        assert comparable(Seen((changed,))) != comparable(Seen((EXPECTED,))), name
    assert comparable(Seen((EXPECTED,), "EPRT |2|fd66::1|40001|")) != comparable(Seen((EXPECTED,), ""))


@pytest.mark.parametrize("engine", [ORACLE, JUDGED])
def test_a_port_that_is_taken(routed: None, tmp_path: Path, engine: str) -> None:
    """Two clients' sessions behind one address announce one port: NAT gives the second another, and both get data."""
    with clean_orch(tmp_path / "state") as orch, expectations_made(ROUTER) as events:
        load_filter(ROUTER, ROUTER_FILTER)
        orch.apply(profile(engine), ROUTER)
        load_nat(Nat.SOURCE)
        first, second = play_rivals(Session("PORT", Nat.SOURCE, ip6=False, port=41001), events)
    for seen in (first, second):
        assert (seen.trouble, seen.data_from) == ("", "10.66.2.2")
        assert [e.ends.dst for e in seen.expectations] == [OUTSIDE_IP]
    ports = [seen.expectations[0].ends.dport for seen in (first, second)]
    assert ports[0] == 41001 != ports[1]
