"""`orch verify` without a helper registry: what is tried of a profile, under which names, and the dialogues by hand."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path as File

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import catalogue, cli, profile, render
from orchestrator.kernel.netns import entered
from orchestrator.model import Desired, Engine, HelperKey, L3Proto, L4Proto, Netns, Path, is_helper_name
from orchestrator.session import ExitCode
from orchestrator.supervise.describe import describe
from orchestrator.verify.dialogues import DIALOGUES, PORTS_ANNOUNCED, Dialogue, Ends
from orchestrator.verify.disguise import Case, cases, disguised, left_out, narrowed
from orchestrator.verify.expectations import Events, expectations_made
from orchestrator.verify.network import LAN, WAN, Network, load_filter, network
from orchestrator.verify.play import play
from orchestrator.verify.run import Outcome, Result, Verification
from orchestrator.views import verify as view
from orchestrator.views.human import Paint

GOLDEN = File(__file__).parents[1] / "golden" / "verify" / "table.txt"
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Every way in which a helper can have a registration: none of it, its own, one with another's name, a shared process.
ENTRIES = {
    "ftp": "{}",
    "queued": "{use: ftp, queueing: registration, name: mine, attach: [{ports: 2121, iif: lan0}]}",
    "other": "{use: ftp, engine: conntrackd, attach: [{path: incoming, ports: 2122, saddr: [10.0.0.0/8]}]}",
    "tftp": "{engine: conntrackd, name: tftp}",
    "ssdp": "{}",
    "sip": "{attach: [{path: outgoing, daddr: [192.0.2.1, 2001:db8::1]}]}",
}
FIXED = {"tftp": "tftp", "other": "ftp", "ssdp": "ssdp"}


def desired(names: set[str] | None = None, *, options: str = "", **entries: str) -> Desired:
    chosen = entries or {name: entry for name, entry in ENTRIES.items() if names is None or name in names}
    lines = "".join(f"  {name}: {entry}\n" for name, entry in chosen.items())
    return profile.load(f"profile: some\n{options}\nhelpers:\n{lines}", "some.yaml")


profiles = st.sets(st.sampled_from(sorted(ENTRIES)), min_size=1).map(desired)


@settings(deadline=None)
@given(profiles, st.sets(st.sampled_from(sorted(ENTRIES))))
def test_a_disguised_profile_is_whole_and_has_names_of_its_own(wanted: Desired, without: set[str]) -> None:
    tried = disguised(wanted, prefix="v1", without=without)
    kept = {helper.name for helper in wanted.helpers} - without
    assert {helper.name for helper in tried.helpers} == kept
    registered = {r.key: r for r in (*tried.registrations, *tried.stock)}
    assert {key.name for key in registered if not key.name.startswith("v1-")} == {
        FIXED[name] for name in kept & FIXED.keys()
    }
    assert all(is_helper_name(key.name) for key in registered)
    served = [helper for helper in tried.helpers if helper.engine is not Engine.KERNEL]
    assert {key for helper in served for key in (*helper.keys, *helper.stock_keys)} == registered.keys()
    assert {a.key for helper in served for a in helper.attachments} <= registered.keys()
    assert {key for queue in tried.rule_queues for key in queue.keys} <= registered.keys()
    assert {name for native in tried.natives for name in native.names} <= {key.name for key in registered}
    for process in tried.processes:
        assert set(process.enables) <= set(process.keys) <= registered.keys()
        assert not process.keys or {registered[key].queue_num for key in process.keys} == set(process.queues)
    assert not narrowed(tried)
    target = render.target(tried)
    assert (target.registrations, target.stock) == (tried.registrations, tried.stock)
    assert target.processes == tried.processes


@settings(deadline=None)
@given(profiles)
def test_a_disguise_changes_nothing_but_names_interfaces_and_addresses(wanted: Desired) -> None:
    tried = disguised(wanted, prefix="v1")
    policies = [sorted((r.queue_num, r.policies, r.status) for r in d.registrations) for d in (wanted, tried)]
    assert policies[0] == policies[1]
    processes = [[(p.argv, p.queues, len(p.keys), len(p.enables)) for p in d.processes] for d in (wanted, tried)]
    assert processes[0] == processes[1]
    assert [(a.path, a.ports) for a in tried.attachments] == [(a.path, a.ports) for a in wanted.attachments]


def test_two_runs_share_no_name() -> None:
    names = [{r.key.name for r in disguised(desired({"ftp", "queued"}), prefix=p).registrations} for p in ("v1", "v2")]
    assert not names[0] & names[1]


def test_what_others_use_under_a_name_that_cannot_be_chosen_is_left_out() -> None:
    live = HelperKey("ftp", L3Proto.IP, L4Proto.TCP), HelperKey("sip", L3Proto.IP6, L4Proto.UDP)
    found = left_out(desired(), live)
    assert found == {
        "other": "ftp/ip/tcp is in use on this host, and engine conntrackd takes no other name",
        "sip": "sip/ip6/udp is in use on this host, and engine kernel takes no other name",
    }
    assert not left_out(desired(), [HelperKey("ftp-us", L3Proto.IP, L4Proto.TCP)])


def test_what_only_addresses_tell_apart_is_tried_once() -> None:
    east, west = (f"{{use: ftp, attach: [{{saddr: [{net}]}}]}}" for net in ("10.1.0.0/16", "10.2.0.0/16"))
    assert left_out(desired(east=east, west=west), ()) == {
        "west": "only interfaces or addresses, which are not tried, tell its connections from those of east"
    }


def test_a_case_for_each_attachment_and_dialogue() -> None:
    wanted = desired(ftp="{attach: [{path: incoming, ports: [2121, 21], saddr: [10.0.0.0/8]}]}", h323="{}")
    found = [(c.helper, c.l3proto, c.path, c.port, c.dialogue and c.dialogue.name) for c in cases(wanted, {})]
    incoming, outgoing = Path.INCOMING, Path.OUTGOING
    assert found[:4] == [("ftp", L3Proto.IP, incoming, 21, name) for name in ("PORT", "PASV", "EPRT", "EPSV")]
    assert set(found[4:]) == {
        ("h323", family, path, port, None)
        for family in L3Proto
        for path in (incoming, outgoing)
        for port in (1719, 1720)
    }


def test_a_family_that_the_engine_does_not_serve_is_a_failure() -> None:
    entry = "{engine: conntrackd, attach: [{path: incoming}]}"
    assert [(c.port, c.unserved) for c in cases(desired(ftp=entry), {}) if c.l3proto is L3Proto.IP6] == [
        (21, "engine conntrackd does not serve IPv6")
    ]
    assert not any(c.unserved for c in cases(desired(options="families: [ip]", ftp=entry), {}))


def test_a_helper_of_ones_own_has_the_dialogues_of_what_it_is_called() -> None:
    directory = str(File("profiles").absolute())
    text = "profile: some\nfamilies: [ip]\nhelpers: {mdns: {use: ./steam.py, attach: [{ports: 5353}]}}\n"
    wanted = profile.load(text, "some.yaml", describe, directory=directory)
    assert [c.dialogue for c in cases(wanted, {})] == [DIALOGUES["mdns"][0]]


# -- dialogues ---------------------------------------------------------------------------------------------------------


EVERY = [(name, dialogue) for name, dialogues in DIALOGUES.items() for dialogue in dialogues]
every_dialogue = pytest.mark.parametrize(
    ("name", "dialogue"), EVERY, ids=[f"{n} {d.name} {d.l4proto}" for n, d in EVERY]
)


@every_dialogue
def test_a_dialogue_is_of_its_protocol(name: str, dialogue: Dialogue) -> None:
    entry = catalogue.helpers().get(name)
    if entry is not None:  # else it is that of an example
        assert dialogue.l4proto in {protocol.l4proto for protocol in entry.protocols}
        assert set(dialogue.families) <= set(entry.families)
        assert any(dialogue.fits(f, dialogue.l4proto, path) for f in dialogue.families for path in entry.paths)
    assert dialogue.openings
    assert all(opening.announced in (None, *range(PORTS_ANNOUNCED)) for opening in dialogue.openings)


@every_dialogue
def test_what_is_said_depends_on_what_is_announced_alone(name: str, dialogue: Dialogue) -> None:
    client, server = ("fd00::1", "fd00::2") if L3Proto.IP6 in dialogue.families else ("192.0.2.1", "192.0.2.2")
    said = [
        b"".join(say.payload(Ends(client, server, 50000, 7, tuple(range(first, first + 4)))) for say in dialogue.says)
        for first in (40000, 40000, 40004)
    ]
    announces = any(opening.announced is not None for opening in dialogue.openings)
    assert said[0] == said[1]
    assert (said[0] != said[2]) is announces


@pytest.fixture(scope="module")
def router() -> Iterator[tuple[Network, Events]]:
    """The network with a filter for the ports of all dialogues, and no helper at all."""
    with network() as made, expectations_made(made.router.netns.path) as events:
        load_filter(made.router, ((dialogue.l4proto, 7) for _, dialogue in EVERY))
        yield made, events


@root
@pytest.mark.parametrize("path", Path)
@every_dialogue
def test_without_a_helper_a_dialogue_comes_through_and_nothing_is_expected(
    router: tuple[Network, Events], name: str, dialogue: Dialogue, path: Path
) -> None:
    there, events = router
    for number, family in enumerate(f for f in L3Proto if dialogue.fits(f, dialogue.l4proto, path)):
        case = Case(name, family, dialogue.l4proto, path, 7, dialogue)
        ports = tuple(range(40000 + 4 * number, 40004 + 4 * number))
        assert play(case, there, events, ports).endswith(" was not expected")


@root
def test_the_network_ends_with_its_block() -> None:
    with network() as made:
        paths = [File(host.netns.path) for host in (made.client, made.router, made.server)]
        assert all(path.exists() for path in paths)
    assert not any(path.exists() for path in paths)


@root
def test_where_nothing_can_be_tried_it_says_so_and_fails(tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tunnel.yaml"
    file.write_text("profile: tunnel\nfamilies: [ip]\nhelpers: {pptp: {attach: [{path: incoming}]}}\n")
    assert cli.run(["verify", str(file)]) == ExitCode.FAILED
    *_, row, counts = capsys.readouterr().out.splitlines()
    assert row.split() == ["pptp", "ip/tcp/1723", "incoming", "-", "no", "dialogue", "-"]
    assert counts == "Profile tunnel: 0 ok, 0 failed, 1 without a dialogue."


# -- what is said of it ------------------------------------------------------------------------------------------------


def verification() -> Verification:
    port, pasv = DIALOGUES["ftp"][:2]
    ip, ip6, tcp = L3Proto.IP, L3Proto.IP6, L4Proto.TCP
    return Verification(
        "edge",
        (
            Result(Case("ftp", ip, tcp, Path.INCOMING, 21, port), Outcome.OK, seconds=0.0042),
            Result(
                Case("ftp", ip, tcp, Path.OUTGOING, 2121, pasv),
                Outcome.FAILED,
                "tcp 10.66.2.1 > 10.66.2.2 40000 was not expected",
                1.5,
            ),
            Result(
                Case("ftp", ip6, tcp, Path.INCOMING, 21, None, unserved="x"),
                Outcome.FAILED,
                "engine conntrackd does not serve IPv6",
            ),
            Result(Case("tns", ip, tcp, Path.INCOMING, 1521, None), Outcome.SKIPPED, "tns/ip/tcp is in use"),
            Result(Case("pptp", ip, tcp, Path.INCOMING, 1723, None), Outcome.NO_DIALOGUE),
        ),
    )


def test_the_table_is_as_expected() -> None:
    text = view.text(verification(), Paint(is_on=False))
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_colours_change_no_word() -> None:
    coloured = view.text(verification(), Paint(is_on=True))
    for code in (31, 32, 33):
        assert f"\x1b[{code}m" in coloured
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured.replace("\x1b[0m", "") == view.text(verification(), Paint(is_on=False))


def test_every_result_is_in_the_json() -> None:
    value = view.value(verification())
    assert [result["outcome"] for result in value["results"]] == ["ok", "failed", "failed", "skipped", "no dialogue"]
    assert value["results"][1] == {
        "helper": "ftp",
        "l3proto": "ip",
        "l4proto": "tcp",
        "path": "outgoing",
        "port": 2121,
        "dialogue": "PASV",
        "outcome": "failed",
        "reason": "tcp 10.66.2.1 > 10.66.2.2 40000 was not expected",
        "seconds": 1.5,
    }


@root
def test_no_two_ends_of_a_link_have_one_index() -> None:
    """The kernel would tell them a second late that they are linked, and the first IPv6 dialogue would wait for it."""
    with network() as made:
        for host, interface in ((made.client, LAN), (made.server, WAN)):
            assert link_index(host.netns, host.interface) != link_index(made.router.netns, interface)


def link_index(netns: Netns, interface: str) -> int:
    with entered(netns):
        return socket.if_nametoindex(interface)
