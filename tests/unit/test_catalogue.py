"""The catalogue is complete, and consistent with what the engines are."""

from __future__ import annotations

import pathlib

import pytest

from orchestrator import catalogue
from orchestrator.catalogue import CatalogueEntry, EngineEntry
from orchestrator.engine.stream import STREAM_STATE_LEN
from orchestrator.model import Engine, L3Proto, L4Proto, Path, is_helper_name
from orchestrator.queues import Block, Service, assign

OURS = pathlib.Path(__file__).parents[2] / "orchestrator" / "helpers"
ENTRIES = list(catalogue.helpers().values())
OFFERS = [(entry, engine) for entry in ENTRIES for engine in entry.engines]


def offered_by(engine: Engine) -> set[str]:
    return {entry.name for entry in ENTRIES if entry.engine(engine)}


def test_all_helpers_of_ours_of_conntrack_tools_and_of_the_kernel_are_there() -> None:
    assert offered_by(Engine.NATIVE) == {path.stem for path in OURS.glob("[a-z]*.py")} == {"ftp", "tftp"}
    assert offered_by(Engine.CONNTRACKD) == {
        "amanda", "dhcpv6", "ftp", "mdns", "rpc", "sane", "slp", "ssdp", "tftp", "tns",
    }  # fmt: skip
    assert offered_by(Engine.KERNEL) == {
        "ftp", "tftp", "sip", "irc", "h323", "pptp", "amanda", "sane", "snmp", "netbios-ns",
    }  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_can_be_attached_by_default(entry: CatalogueEntry) -> None:
    assert is_helper_name(entry.name)
    assert entry.summary
    assert entry.families
    assert entry.paths
    assert any(protocol.ports for protocol in entry.protocols)
    assert entry.engine("") is entry.engines[0]
    assert not entry.engines[0].broken


@pytest.mark.parametrize(("entry", "engine"), OFFERS, ids=lambda value: getattr(value, "name", value.engine))
def test_an_engine_serves_families_of_the_protocol_and_has_what_it_needs(
    entry: CatalogueEntry, engine: EngineEntry
) -> None:
    assert engine.families
    assert set(engine.families) <= set(entry.families)
    assert all(is_helper_name(engine.name_for(protocol.l4proto)) for protocol in entry.protocols)
    assert bool(engine.policies) == (engine.engine is not Engine.KERNEL)
    assert bool(engine.modules) == (engine.engine is Engine.KERNEL)
    assert bool(engine.description) == (engine.engine is Engine.NATIVE)


@pytest.mark.parametrize("name", sorted(offered_by(Engine.NATIVE)))
def test_a_class_of_ours_declares_what_the_catalogue_says(name: str) -> None:
    entry = catalogue.helpers()[name]
    assert entry.engines[0].engine is Engine.NATIVE
    described = entry.engines[0].description
    assert described is not None
    assert (described.protocols, described.families, described.bounds) == (entry.protocols, entry.families, entry.guard)
    assert entry.paths == ((Path.OUTGOING,) if described.is_outgoing_only else tuple(Path))


def test_the_native_engine_has_a_part_of_the_private_data_on_tcp() -> None:
    ftp, tftp = (catalogue.helpers()[name].engine(Engine.NATIVE) for name in ("ftp", "tftp"))
    assert ftp is not None
    assert tftp is not None
    assert ftp.priv_data_len(L4Proto.TCP) == STREAM_STATE_LEN + ftp.private_len
    assert tftp.priv_data_len(L4Proto.UDP) == tftp.private_len


# name: (protocols, expect_max, expect_timeout, private data length), as `nfct helper add` of conntrack-tools 1.4.7
# registers them and a dump of nfnetlink_cthelper shows them.
REGISTERED = {
    "amanda": ("udp", 3, 180, 0),
    "dhcpv6": ("udp", 1, 300, 0),
    "ftp": ("tcp", 1, 300, 24),
    "mdns": ("udp", 8, 30, 0),
    "rpc": ("tcp udp", 1, 300, 16),
    "sane": ("tcp", 1, 300, 4),
    "slp": ("udp", 8, 16, 0),
    "ssdp": ("tcp udp", 8, 300, 0),
    "tftp": ("udp", 1, 300, 0),
    "tns": ("tcp", 1, 300, 1),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_conntrackd_finds_the_registrations_it_insists_on(name: str) -> None:
    entry = catalogue.helpers()[name]
    engine = entry.engine(Engine.CONNTRACKD)
    assert engine is not None
    (policy,) = engine.policies
    protocols = " ".join(sorted(p.l4proto for p in entry.protocols))
    (private,) = {engine.priv_data_len(p.l4proto) for p in entry.protocols}
    assert REGISTERED[name] == (protocols, policy.expect_max, policy.expect_timeout_s, private)
    assert policy.name == name


def test_automatic_queue_numbers_of_all_services_differ_without_probing() -> None:
    services = [
        Service(Engine.CONNTRACKD, f"{name}/{l3proto}/{l4proto}")
        for name in offered_by(Engine.CONNTRACKD)
        for l3proto in L3Proto
        for l4proto in L4Proto
    ]
    together, _ = assign(tuple(Block(str(service), (service,), None) for service in services))
    for service in services:
        alone, _ = assign((Block("alone", (service,), None),))
        assert alone[service] == together[service]


def test_no_engine_ever_reads_what_another_one_wrote() -> None:
    """Private data of one length is kept when a registration is updated: another length makes it a replace."""
    for entry in catalogue.helpers().values():
        for l4proto in {p.l4proto for p in entry.protocols}:
            lengths = [e.priv_data_len(l4proto) for e in entry.engines if e.priv_data_len(l4proto)]
            assert len(lengths) == len(set(lengths)), f"{entry.name} on {l4proto}"
