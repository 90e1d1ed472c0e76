"""Canned dialogues: who says what to whom, and which connections must then be let through. Data, and no more.

Each is the shortest that real software could have. Addresses and ports are those of the throw-away network, so what is
said is a function of them. A dialogue that is known to fail with an engine is here all the same: it is what users have.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.model import L3Proto, L4Proto, Path


class Side(StrEnum):
    """The client is who opens the first connection."""

    CLIENT = "client"
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Ends:
    """The first connection, and the ports that the dialogue may announce: in a row, the first one even."""

    client: str
    server: str
    sport: int
    dport: int
    ports: tuple[int, ...]


Payload = Callable[[Ends], bytes]


@dataclass(frozen=True, slots=True)
class Say:
    speaker: Side
    payload: Payload


@dataclass(frozen=True, slots=True)
class Opening:
    """A connection that must be expected and let through: who opens it; it leads to the other one.

    `announced` is the index of its port among those announced; None is the port that the client speaks from. `sport` is
    the port that it comes from, 0 for any.
    """

    opener: Side
    l4proto: L4Proto
    announced: int | None = 0
    sport: int = 0


BROADCAST = "broadcast"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """`groups` are the multicast groups that the client asks, by family, or BROADCAST; empty if it asks the server.

    `sport` is the port that the client speaks from, 0 for any.
    """

    name: str
    l4proto: L4Proto
    says: tuple[Say, ...]
    openings: tuple[Opening, ...]
    families: tuple[L3Proto, ...] = tuple(L3Proto)
    groups: tuple[tuple[L3Proto, str], ...] = ()
    sport: int = 0

    def fits(self, l3proto: L3Proto, l4proto: L4Proto, path: Path) -> bool:
        """True if it can be held so; what many hear is not forwarded."""
        is_there = path is Path.OUTGOING or not self.groups
        return l3proto in self.families and l4proto is self.l4proto and is_there

    def group(self, l3proto: L3Proto) -> str:
        return dict(self.groups).get(l3proto, "")


TCP, UDP = L4Proto.TCP, L4Proto.UDP
CLIENT, SERVER = Side.CLIENT, Side.SERVER
_IP_ONLY = (L3Proto.IP,)
PORTS_ANNOUNCED = 4


def _fixed(payload: bytes) -> Payload:
    return lambda _: payload


# -- FTP ---------------------------------------------------------------------------------------------------------------


def _commas(address: str, port: int) -> str:
    return ",".join((*address.split("."), *map(str, divmod(port, 256))))


def _eprt(ends: Ends) -> bytes:
    family = 2 if ":" in ends.client else 1
    return f"EPRT |{family}|{ends.client}|{ends.ports[0]}|\r\n".encode()


def _pasv(ends: Ends) -> bytes:
    return f"227 Entering Passive Mode ({_commas(ends.server, ends.ports[0])}).\r\n".encode()


_WELCOME = (
    Say(SERVER, _fixed(b"220 ready\r\n")),
    Say(CLIENT, _fixed(b"USER anonymous\r\n")),
    Say(SERVER, _fixed(b"230 welcome\r\n")),
)
_ACTIVE = (Opening(SERVER, TCP),)
_PASSIVE = (Opening(CLIENT, TCP),)
_FTP = (
    Dialogue(
        "PORT",
        TCP,
        (*_WELCOME, Say(CLIENT, lambda ends: f"PORT {_commas(ends.client, ends.ports[0])}\r\n".encode())),
        _ACTIVE,
        _IP_ONLY,
    ),
    Dialogue("PASV", TCP, (*_WELCOME, Say(CLIENT, _fixed(b"PASV\r\n")), Say(SERVER, _pasv)), _PASSIVE, _IP_ONLY),
    Dialogue("EPRT", TCP, (*_WELCOME, Say(CLIENT, _eprt)), _ACTIVE),
    Dialogue(
        "EPSV",
        TCP,
        (
            *_WELCOME,
            Say(CLIENT, _fixed(b"EPSV\r\n")),
            Say(SERVER, lambda ends: f"229 Entering Extended Passive Mode (|||{ends.ports[0]}|)\r\n".encode()),
        ),
        _PASSIVE,
    ),
)

# -- TFTP --------------------------------------------------------------------------------------------------------------

_TRANSFER = (Opening(SERVER, UDP, announced=None),)
_TFTP = (
    Dialogue("RRQ", UDP, (Say(CLIENT, _fixed(b"\0\1file\0octet\0")),), _TRANSFER),
    Dialogue("WRQ", UDP, (Say(CLIENT, _fixed(b"\0\2file\0octet\0")),), _TRANSFER),
)

# -- Amanda: the planner asks, and the client answers with three ports -------------------------------------------------


def _amanda_reply(ends: Ends) -> bytes:
    data, mesg, index = ends.ports[:3]
    return f"Amanda 2.6 REP HANDLE 000-0 SEQ 1\nCONNECT DATA {data} MESG {mesg} INDEX {index}\nOPTIONS ;\n".encode()


_AMANDA = (
    Dialogue(
        "sendbackup",
        UDP,
        (
            Say(CLIENT, _fixed(b"Amanda 2.6 REQ HANDLE 000-0 SEQ 1\nSERVICE sendbackup\nDUMP / 0 OPTIONS ;\n")),
            Say(SERVER, _amanda_reply),
        ),
        tuple(Opening(CLIENT, TCP, announced=index) for index in range(3)),
    ),
)

# -- Sun RPC: RFC 1057 (portmap 2, GETPORT) and RFC 1833 (rpcbind 3, GETADDR), asking for NFS 3 over TCP ---------------

_XID, _PORTMAP, _NFS = 0x6F726368, 100000, 100003
_NO_AUTH = struct.pack(">4I", 0, 0, 0, 0)  # credentials and verifier
_ACCEPTED = struct.pack(">6I", _XID, 1, 0, 0, 0, 0)


def _call(version: int, procedure: int, arguments: bytes) -> bytes:
    return struct.pack(">6I", _XID, 0, 2, _PORTMAP, version, procedure) + _NO_AUTH + arguments


def _xdr(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _universal(ends: Ends) -> bytes:
    """The universal address of RFC 5665: the port as two decimal numbers behind the address."""
    return _xdr(".".join((ends.server, *map(str, divmod(ends.ports[0], 256)))))


def _framed(payload: Payload) -> Payload:
    """A record of one last fragment: RPC over TCP."""

    def record(ends: Ends) -> bytes:
        data = payload(ends)
        return struct.pack(">I", 0x80000000 | len(data)) + data

    return record


_GETPORT = Dialogue(
    "GETPORT",
    UDP,
    (
        Say(CLIENT, _fixed(_call(2, 3, struct.pack(">4I", _NFS, 3, TCP.number, 0)))),
        Say(SERVER, lambda ends: _ACCEPTED + struct.pack(">I", ends.ports[0])),
    ),
    _PASSIVE,
)
_GETADDR = Dialogue(
    "GETADDR",
    UDP,
    (
        Say(
            CLIENT,
            lambda ends: _call(
                3,
                3,
                struct.pack(">2I", _NFS, 3) + _xdr("tcp6" if ":" in ends.server else "tcp") + _xdr("") + _xdr("orch"),
            ),
        ),
        Say(SERVER, lambda ends: _ACCEPTED + _universal(ends)),
    ),
    _PASSIVE,
)


def _over_tcp(dialogue: Dialogue) -> Dialogue:
    says = tuple(Say(say.speaker, _framed(say.payload)) for say in dialogue.says)
    return replace(dialogue, l4proto=TCP, says=says)


_RPC = (_GETPORT, _over_tcp(_GETPORT), _GETADDR, _over_tcp(_GETADDR))

# -- Oracle TNS: CONNECT, answered by REDIRECT -------------------------------------------------------------------------

_TNS_CONNECT, _TNS_REDIRECT = 1, 5


def _tns(kind: int, data: bytes) -> bytes:
    return struct.pack(">HHBBH", 8 + len(data), 0, kind, 0, 0) + data


def _redirect(ends: Ends) -> bytes:
    address = f"(ADDRESS=(PROTOCOL=tcp)(HOST={ends.server})(PORT={ends.ports[0]}))".encode()
    return _tns(_TNS_REDIRECT, struct.pack(">H", len(address)) + address)


_ASK_FOR_DATABASE = b"(DESCRIPTION=(CONNECT_DATA=(SERVICE_NAME=orch)))"
_DATABASE = struct.pack(">24H", *(0,) * 8, len(_ASK_FOR_DATABASE), 58, *(0,) * 14) + b"\0\0" + _ASK_FOR_DATABASE
_TNS = (
    Dialogue(
        "REDIRECT",
        TCP,
        (Say(CLIENT, _fixed(_tns(_TNS_CONNECT, _DATABASE))), Say(SERVER, _redirect)),
        _PASSIVE,
    ),
)

# -- SANE: NET_START, answered by a port -------------------------------------------------------------------------------

_NET_START = 7
_SANE = (
    Dialogue(
        "NET_START",
        TCP,
        (
            Say(CLIENT, _fixed(struct.pack(">2I", _NET_START, 0))),
            # Status, port, byte order, and an empty resource to authorise.
            Say(SERVER, lambda ends: struct.pack(">4I", 0, ends.ports[0], 0x1234, 0)),
        ),
        _PASSIVE,
    ),
)

# -- IRC and SIP -------------------------------------------------------------------------------------------------------


def _dcc(ends: Ends) -> bytes:
    number = int.from_bytes(bytes(map(int, ends.client.split("."))), "big")
    return f"PRIVMSG friend :\1DCC SEND file {number} {ends.ports[0]} 1024\1\r\n".encode()


_IRC = (Dialogue("DCC SEND", TCP, (Say(CLIENT, _dcc),), _ACTIVE, _IP_ONLY),)


def _invite(transport: str) -> Payload:
    def request(ends: Ends) -> bytes:
        kind, client, server = ("IP6", f"[{ends.client}]", f"[{ends.server}]")
        if ":" not in ends.client:
            kind, client, server = ("IP4", ends.client, ends.server)
        session = (
            f"v=0\r\no=orch 1 1 IN {kind} {ends.client}\r\ns=call\r\nc=IN {kind} {ends.client}\r\nt=0 0\r\n"
            f"m=audio {ends.ports[0]} RTP/AVP 0\r\n"
        )
        return (
            f"INVITE sip:bob@{server} SIP/2.0\r\n"
            f"Via: SIP/2.0/{transport} {client}:{ends.sport};branch=z9hG4bKorch{ends.ports[0]}\r\n"
            f"From: <sip:alice@{client}>;tag=1\r\nTo: <sip:bob@{server}>\r\nCall-ID: {ends.ports[0]}\r\n"
            f"CSeq: 1 INVITE\r\nContact: <sip:alice@{client}:{ends.sport}>\r\nMax-Forwards: 70\r\n"
            f"Content-Type: application/sdp\r\nContent-Length: {len(session)}\r\n\r\n{session}"
        ).encode()

    return request


_MEDIA = (Opening(SERVER, UDP, announced=0), Opening(SERVER, UDP, announced=1))
_SIP = tuple(Dialogue("INVITE", l4proto, (Say(CLIENT, _invite(l4proto.upper())),), _MEDIA) for l4proto in (UDP, TCP))

# -- questions to many -------------------------------------------------------------------------------------------------


def _to_many(
    name: str, question: Payload, *, groups: Mapping[L3Proto, str], answered_from: int, sport: int = 0
) -> Dialogue:
    return Dialogue(
        name,
        UDP,
        (Say(CLIENT, question),),
        (Opening(SERVER, UDP, announced=None, sport=answered_from),),
        tuple(groups),
        tuple(groups.items()),
        sport,
    )


def _groups(ip: str, ip6: str) -> Mapping[L3Proto, str]:
    return {L3Proto.IP: ip, L3Proto.IP6: ip6}


def _search(ends: Ends) -> bytes:
    host = "[ff02::c]" if ":" in ends.client else "239.255.255.250"
    return f'M-SEARCH * HTTP/1.1\r\nHOST: {host}:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\nST: ssdp:all\r\n\r\n'.encode()


_TO_ALL = {L3Proto.IP: BROADCAST}
_SERVICES = b"\0\0\0\0\0\1\0\0\0\0\0\0\x09_services\x07_dns-sd\x04_udp\x05local\0\0\x0c\0\1"
_SLP_REQUEST = b"\2\1\0\0\x2d\x20\0\0\0\0\0\1\0\2en\0\0\0\x0cservice:test\0\7DEFAULT\0\0\0\0"
_SOLICIT = b"\1orc\0\1\0\x0a\0\3\0\1\2\0\0\0\0\1\0\x08\0\2\0\0"  # RFC 8415: a client identifier, elapsed time
_NAME_QUERY = b"\0\1\1\x10\0\1\0\0\0\0\0\0\x20CKAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\0\0\x21\0\1"
_SNMP_GET = bytes.fromhex("302602010104067075626c6963a019020101020100020100300e300c06082b060102010101000500")
_STEAM_QUERY = bytes.fromhex("ffffffff214c5fa0") + b"\0\0\0\0"

DIALOGUES: Mapping[str, tuple[Dialogue, ...]] = {
    "amanda": _AMANDA,
    "dhcpv6": (_to_many("SOLICIT", _fixed(_SOLICIT), groups={L3Proto.IP6: "ff02::1:2"}, answered_from=547, sport=546),),
    "ftp": _FTP,
    "irc": _IRC,
    "mdns": (_to_many("query", _fixed(_SERVICES), groups=_groups("224.0.0.251", "ff02::fb"), answered_from=5353),),
    "netbios-ns": (_to_many("name query", _fixed(_NAME_QUERY), groups=_TO_ALL, answered_from=137),),
    "rpc": _RPC,
    "sane": _SANE,
    "sip": _SIP,
    "slp": (
        _to_many("SrvRqst", _fixed(_SLP_REQUEST), groups=_groups("239.255.255.253", "ff02::116"), answered_from=427),
    ),
    "snmp": (_to_many("get", _fixed(_SNMP_GET), groups=_TO_ALL, answered_from=161),),
    "ssdp": (_to_many("M-SEARCH", _search, groups=_groups("239.255.255.250", "ff02::c"), answered_from=1900),),
    "steam": (_to_many("query", _fixed(_STEAM_QUERY), groups=_TO_ALL, answered_from=27036),),
    "tftp": _TFTP,
    "tns": _TNS,
}
"""By the name that the helper has in the catalogue; `steam` is the example of a helper of one's own."""
