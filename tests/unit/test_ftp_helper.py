"""The FTP helper: the forms that RFCs and real software use, and those that must not open anything."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import chain

import pytest

from orchestrator.engine.api import L4, Direction, Expect, Flow, Policy, Source
from orchestrator.helpers.ftp import Ftp
from tests.fuzz import FLOW, FLOW6
from tests.packets import CLIENT, CLIENT6, SERVER

FTP = Ftp()


@dataclass
class Session:
    """An FTP session as the engine drives the helper: private data goes from one payload to the next."""

    flow: Flow = FLOW
    private: bytes = bytes(FTP.private_len)
    expects: list[Expect] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    is_finished: bool = False

    def client(self, *lines: bytes) -> Session:
        return self._feed(Direction.ORIGINAL, lines)

    def server(self, *lines: bytes) -> Session:
        return self._feed(Direction.REPLY, lines)

    def _feed(self, direction: Direction, lines: tuple[bytes, ...]) -> Session:
        answer = FTP.inspect(b"".join(line + b"\r\n" for line in lines), direction, self.flow, self.private)
        self.private = self.private if answer.private is None else answer.private
        self.expects += answer.expects
        self.refused += [answer.refused] if answer.refused else []
        self.is_finished = self.is_finished or answer.is_finished
        return self

    @property
    def ports(self) -> list[int | None]:
        return [expect.port for expect in self.expects]


def test_it_declares_what_the_kernel_helper_has() -> None:
    """net/netfilter/nf_conntrack_ftp.c, nf_conntrack_ftp_init and help; the engine adds its own bytes on TCP."""
    assert FTP.policies == (Policy("ftp", 1, 300),)
    assert [(s.l4proto, s.ports) for s in FTP.serves] == [(L4.TCP, (21,))]
    assert FTP.private_len <= 15


def test_a_port_command_is_expected_from_the_peer_and_points_at_its_text() -> None:
    (expect,) = Session().client(b"PORT 10,0,0,1,4,5").expects
    assert expect == Expect(L4.TCP, 1029, CLIENT, (5, 17), Source.PEER, source_port=0, policy=0)


@pytest.mark.parametrize(
    "line", [b"port 10,0,0,1,4,5", b"PoRt 10,0,0,1,4,5", b"PORT  10,0,0,1,4,5  ", b" PORT 10,0,0,1,4,5"]
)
def test_a_command_in_any_case_and_with_blanks(line: bytes) -> None:
    (expect,) = Session().client(line).expects
    assert (expect.port, expect.address) == (1029, CLIENT)
    assert line[slice(*expect.text or ())] == b"10,0,0,1,4,5"


@pytest.mark.parametrize("delimiter", [b"|", b"!", b"/", b"~", b"a", b"\\", b"$", b"["])
def test_an_eprt_command_with_any_delimiter(delimiter: bytes) -> None:
    argument = delimiter + delimiter.join((b"1", b"10.0.0.1", b"1029")) + delimiter
    (expect,) = Session().client(b"EPRT " + argument).expects
    assert (expect.port, expect.address, expect.text) == (1029, CLIENT, (5, 5 + len(argument)))


def test_an_eprt_command_of_ipv6() -> None:
    (expect,) = Session(FLOW6).client(b"eprt |2|2001:db8::1|65535|").expects
    assert (expect.port, expect.address) == (65535, CLIENT6)


@pytest.mark.parametrize(
    "line",
    [
        b"227 Entering Passive Mode (192,0,2,7,4,5).",  # vsftpd, proftpd, pyftpdlib
        b"227 Entering Passive Mode (192,0,2,7,4,5)",  # pure-ftpd
        b"227 Entering Passive Mode. 192,0,2,7,4,5",
        b"227 192,0,2,7,4,5",
        b"227 =192,0,2,7,4,5",
        b"227 Entering Passive Mode,192,0,2,7,4,5,",
        b"227 at 12:30 on port 9, (192,0,2,7,4,5)",
    ],
)
def test_a_227_reply_as_servers_write_it(line: bytes) -> None:
    (expect,) = Session().client(b"PASV").server(line).expects
    assert (expect.port, expect.address) == (1029, SERVER)
    assert line[slice(*expect.text or ())] == b"192,0,2,7,4,5"


@pytest.mark.parametrize("flow", [FLOW, FLOW6], ids=["ip", "ip6"])
@pytest.mark.parametrize("text", [b"|||1029|", b"!!!1029!", b"(((1029("])
def test_a_229_reply_has_no_address(flow: Flow, text: bytes) -> None:
    line = b"229 Entering Extended Passive Mode (" + text + b")."
    (expect,) = Session(flow).client(b"EPSV").server(line).expects
    assert (expect.port, expect.address) == (1029, None)
    assert line[slice(*expect.text or ())] == text


@pytest.mark.parametrize("command", [b"EPSV", b"epsv", b"EPSV 1", b"EPSV 2"])
def test_every_form_of_epsv_asks(command: bytes) -> None:
    assert Session().client(command).server(b"229 (|||1029|)").ports == [1029]


@pytest.mark.parametrize(
    "line",
    [
        b"PORT",
        b"PORT 10,0,0,1,4",
        b"PORT 10,0,0,1,4,5,6",
        b"PORT 10, 0,0,1,4,5",
        b"PORT 256,0,0,1,4,5",
        b"PORT 10,0,0,1,4,256",
        b"PORT 10,0,0,1,4,0005",
        b"PORT 10,0,0,1,0,0",
        b"PORT 10,0,0,1,4,5\rPORT",
        b"EPRT",
        b"EPRT |1|10.0.0.1|0|",
        b"EPRT |1|10.0.0.1|65536|",
        b"EPRT |1|10.0.0.1|000080|",
        b"EPRT |1|10.0.0.256|1029|",
        b"EPRT |1|10.0.0.1\0|1029|",
        b"EPRT |1|10.0.0.1|1029",
        b"EPRT |1|10.0.0.1|1029|0|",
        b"EPRT |3|10.0.0.1|1029|",
        b"EPRT |2|2001:db8::1|1029|",
        b"EPRT 111110.0.0.1110291",
        b"EPRT \xa71\xa710.0.0.1\xa71029\xa7",
    ],
)
def test_a_command_that_announces_nonsense_is_refused(line: bytes) -> None:
    session = Session().client(line)
    assert session.expects == []
    assert session.refused[0].startswith(line[:4].decode())


@pytest.mark.parametrize("line", [b"PORT 10,0,0,1,4,5", b"EPRT |1|10.0.0.1|1029|", b"EPRT :2:2001:db8::1:1029:"])
def test_what_ipv6_cannot_mean_is_refused(line: bytes) -> None:
    session = Session(FLOW6).client(line)
    assert (session.expects, len(session.refused)) == ([], 1)


@pytest.mark.parametrize(
    "line",
    [
        b"227 Entering Passive Mode",
        b"227 (192,0,2,7,4)",
        b"227 (1192,0,2,7,4,5)",
        b"227 (192,0,2,7,4,5,6)",
        b"227 (192,0,2,300,4,5)",
        b"227 (192,0,2,7,0,0)",
        b"229 |||1029|",
        b"229 (||1029|)",
        b"229 (|||1029)",
        b"229 (|||0|)",
        b"229 (|||65536|)",
        b"229 (|||102900|)",
        b"229 (555510295)",
    ],
)
def test_a_reply_that_announces_nonsense_is_refused_and_is_the_answer_all_the_same(line: bytes) -> None:
    session = Session().client(b"PASV", b"EPSV").server(line)
    assert session.expects == []
    assert session.refused[0].startswith(line[:3].decode())
    unanswered = b"\0\1\0\0" if line.startswith(b"227") else b"\1\0\0\0"
    assert session.private == unanswered


@pytest.mark.parametrize(
    "line", [b"SPORT 10,0,0,1,4,5", b"PORTS 10,0,0,1,4,5", b"STOR PORT 10,0,0,1,4,5", b"227 (10,0,0,1,4,5)", b""]
)
def test_another_command_says_nothing(line: bytes) -> None:
    session = Session().client(line)
    assert (session.expects, session.refused, session.private) == ([], [], bytes(4))


def test_a_reply_that_nobody_asked_for_is_refused() -> None:
    session = Session().server(b"227 (192,0,2,7,4,5)").server(b"229 (|||1029|)")
    assert (session.expects, len(session.refused)) == ([], 2)


def test_each_question_has_one_answer() -> None:
    session = Session().client(b"PASV", b"PASV").client(b"EPSV")
    session.server(b"227 (192,0,2,7,4,1)", b"229 (|||1026|)", b"227 (192,0,2,7,4,3)")
    session.server(b"227 (192,0,2,7,4,4)", b"229 (|||1029|)")
    assert session.ports == [1025, 1026, 1027]


def test_questions_beyond_the_counter_are_forgotten() -> None:
    session = Session().client(*[b"PASV"] * 300)
    assert session.private == b"\xff\0\0\0"
    assert len(session.server(*[b"227 192,0,2,7,4,5"] * 300).expects) == 255


@pytest.mark.parametrize("last", [b"213 End", b"213"])
def test_text_of_a_longer_reply_is_no_reply(last: bytes) -> None:
    """A directory with a file named like a reply, in the answer to STAT, cut where it hurts most."""
    session = Session().client(b"STAT", b"PASV").server(b"213-Status", b"227 (192,0,2,7,0,22)")
    session.server(b"229 (|||23|)", b"227-more", b"234 no").server(
        b"213-", b"2133 files", b"227 (192,0,2,7,0,22)", last
    )
    assert session.expects == []
    assert session.server(b"227 (192,0,2,7,4,5)").ports == [1029]


def test_a_line_without_a_reply_code_opens_no_longer_reply() -> None:
    session = Session().client(b"PASV").server(b"999-hello", b"000-", b"227 (192,0,2,7,4,5)")
    assert session.ports == [1029]


def test_the_last_line_of_a_longer_227_reply_is_the_reply() -> None:
    session = Session().client(b"PASV").server(b"227-Entering (192,0,2,7,4,4)", b" passive", b"227 (192,0,2,7,4,5)")
    assert session.ports == [1029]


def test_after_epsv_all_nothing_else_counts() -> None:
    session = Session().client(b"EPSV ALL", b"PASV", b"PORT 10,0,0,1,4,5", b"EPSV").client(b"EPRT |1|10.0.0.1|1029|")
    session.server(b"200 Only EPSV now", b"227 (192,0,2,7,4,5)", b"229 (|||1029|)")
    assert session.ports == [1029]
    assert session.expects[0].address is None


@pytest.mark.parametrize("command", [b"AUTH TLS", b"auth ssl", b"AUTH TLS-C"])
@pytest.mark.parametrize("reply", [b"234 AUTH TLS successful", b"334 Go on"])
def test_after_the_answer_to_auth_nothing_can_be_read(command: bytes, reply: bytes) -> None:
    session = Session().client(command, b"PASV")
    assert not session.is_finished
    assert session.server(reply, b"227 (192,0,2,7,4,5)").is_finished
    assert session.expects == []


@pytest.mark.parametrize(
    ("command", "reply"), [(b"AUTH TLS", b"534 No"), (b"AUTH GSSAPI", b"334 Go on"), (b"NOOP", b"234")]
)
def test_a_session_without_tls_goes_on(command: bytes, reply: bytes) -> None:
    session = Session().client(command, b"PASV").server(reply, b"227 (192,0,2,7,4,5)")
    assert (session.is_finished, session.ports) == (False, [1029])


def test_commands_in_one_payload_are_expected_in_order() -> None:
    session = Session().client(b"PORT 10,0,0,1,4,1", b"RETR a", b"PORT 10,0,0,1,4,2", b"EPRT |1|10.0.0.1|1027|")
    assert session.ports == [1025, 1026, 1027]


@pytest.mark.parametrize(
    ("text", "address", "announced"),
    [
        (b"192,0,2,7,4,5", CLIENT, b"10,0,0,1,255,255"),
        (b"|1|192.0.2.7|1|", CLIENT, b"|1|10.0.0.1|65535|"),
        (b"!1!192.0.2.7!1!", CLIENT, b"!1!10.0.0.1!65535!"),
        (b"|2|::|1|", CLIENT6, b"|2|2001:db8::1|65535|"),
        (b"b2b::b1b", CLIENT6, b"|2|2001:db8::1|65535|"),  # a delimiter that the new address contains
        (b"|||1029|", CLIENT, b"|||65535|"),
        (b"$$$1029$", CLIENT6, b"$$$65535$"),
    ],
)
def test_announcing_keeps_the_form(text: bytes, address: bytes, announced: bytes) -> None:
    assert FTP.announce(text, address, 65535) == announced


def test_six_numbers_cannot_announce_ipv6() -> None:
    with pytest.raises(ValueError, match="IPv6"):
        FTP.announce(b"192,0,2,7,4,5", CLIENT6, 1029)


def test_every_line_that_opens_something_begins_with_a_trigger() -> None:
    lines = [b"PORT 1", b"eprt", b"PASV", b"EPSV ALL", b"auth tls", b"227 x", b"229 x", b"234 x"]
    assert all(line.startswith(FTP.triggers) for line in chain(lines, map(bytes.lower, lines)))
    assert all(1 <= len(trigger) <= 4 for trigger in FTP.triggers)
    assert not b"Port 10,0,0,1,4,5".startswith(FTP.triggers)


@pytest.mark.parametrize(
    "unit", [b"1", b"1,", b" ", b"(", b"(|||1", b"|", b"\n", b"\r", b"PORT ", b"227 1,1", b"220-\n"]
)
def test_no_text_is_slow(unit: bytes) -> None:
    """64 KiB take milliseconds; were a pattern quadratic, it would be minutes."""
    begun = time.process_time()
    for head in (b"", b"PORT ", b"EPRT |1|", b"227 ", b"229 ("):
        text = (head + unit * 65536)[:65536]
        Session(private=b"\1\1\0\0").client(text).server(text)
    assert time.process_time() - begun < 5
