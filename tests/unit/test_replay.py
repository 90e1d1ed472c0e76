"""`orch replay`: captures in all formats, what is told of each packet, and the process that runs somebody's code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import cli
from orchestrator.replay import report
from orchestrator.replay.report import Failure, Line, PacketReport, Request, Summary
from orchestrator.replay.worker import replay
from orchestrator.session import ExitCode
from orchestrator.views import replay as view
from orchestrator.views.human import Paint
from tests.golden.replay import make

pytestmark = pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning:pcapng")

GOLDEN = Path(__file__).parents[1] / "golden" / "replay"
CAPTURES = GOLDEN / "captures"
STEAM = Path(__file__).parents[2] / "profiles" / "steam.py"
FTP, TFTP = Request("named", "ftp"), Request("named", "tftp")

# Name of the golden files -> what is replayed, and which capture.
CASES = {
    "ftp": (FTP, "ftp.pcap"),
    "ftp-verbose": (Request("named", "ftp", is_verbose=True), "ftp.pcap"),
    "ftp-nat": (Request("named", "ftp", snat="192.0.2.1", dnat="198.51.100.1"), "ftp.pcap"),
    "ftp-cut": (FTP, "ftp-cut.pcap"),
    "ftp-snaplen": (FTP, "ftp-snaplen.pcap"),
    "ftp-ipv6": (FTP, "ftp-ipv6.pcapng"),
    "ftp-ipv6-nat": (Request("named", "ftp", snat="2001:db8:9::1"), "ftp-ipv6.pcapng"),
    "ftp-hostile": (FTP, "ftp-hostile.pcap"),
    "ftp-loosened": (
        Request("named", "ftp", is_any_destination=True, ports_expected=(1, 65535)),
        "ftp-hostile.pcap",
    ),
    "ftp-segments": (FTP, "ftp-segments.pcap"),
    "ftp-tls": (FTP, "ftp-tls.pcap"),
    "ftp-other-port": (Request("named", "ftp", ports=(2121,)), "ftp.pcap"),
    "vsftpd-curl": (FTP, "vsftpd-curl.pcap"),
    "tftp": (TFTP, "tftp.pcap"),
    "steam": (Request("file", str(STEAM)), "steam.pcapng"),
    "wireless": (FTP, "wireless.pcap"),
}


def lines_of(request: Request, content: bytes) -> list[Line]:
    source = Path(request.name).read_bytes() if request.kind == "file" else b""
    return list(replay(request, source, io.BytesIO(content)))


def human_text(lines: list[Line]) -> str:
    paint = Paint(is_on=False)
    text = "".join(view.packet_text(line, paint) for line in lines if isinstance(line, PacketReport))
    (summary,) = (line for line in lines if isinstance(line, Summary))
    return text + "".join(f"warning: {warning}\n" for warning in summary.warnings) + view.summary_text(summary)


@pytest.mark.parametrize("name", CASES)
def test_replays_are_as_expected(name: str) -> None:
    request, file = CASES[name]
    lines = lines_of(request, (CAPTURES / file).read_bytes())
    for suffix, text in (("txt", human_text(lines)), ("jsonl", "".join(report.encode(x) + "\n" for x in lines))):
        expected = GOLDEN / f"{name}.{suffix}"
        if os.environ.get("ORCH_UPDATE_GOLDEN"):
            expected.write_text(text, encoding="utf-8")
        assert text == expected.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_lines_cross_the_border_unchanged(name: str) -> None:
    request, file = CASES[name]
    for line in lines_of(request, (CAPTURES / file).read_bytes()):
        assert report.decode(report.encode(line)) == line


def test_the_captures_are_those_that_are_made() -> None:
    for name, content in make.captures().items():
        assert (CAPTURES / name).read_bytes() == content, name


# -- formats ---------------------------------------------------------------------------------------------------------

WRAPPED = [
    (1, make.ethernet),
    (1, lambda packet: make.ethernet(packet, vlans=(5,))),
    (113, make.cooked),
    (276, make.cooked2),
    (0, make.loopback),
    (108, make.loopback),
    (101, bytes),
    (12, bytes),
]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("link_type, wrap", WRAPPED, ids=lambda value: str(value) if isinstance(value, int) else "")
@pytest.mark.parametrize("talk", [make.ftp, make.ftp_ipv6], ids=lambda talk: talk.__name__)
def test_every_format_tells_the_same(talk: object, link_type: int, wrap: object, order: str) -> None:
    assert callable(talk)
    assert callable(wrap)
    packets = talk().packets
    frames = [(time_s, wrap(packet)) for time_s, packet in packets]
    plain = lines_of(FTP, make.pcap(packets, link_type=101))
    for is_nano in (False, True):
        assert lines_of(FTP, make.pcap(frames, link_type=link_type, order=order, is_nano=is_nano)) == plain
    assert lines_of(FTP, make.pcapng([(0, frame) for frame in frames], link_types=(link_type,), order=order)) == plain


@pytest.mark.parametrize("name, headers", [("ftp.pcap", 1), ("ftp-ipv6.pcapng", 3)])
def test_a_capture_that_ends_early_tells_the_beginning(name: str, headers: int) -> None:
    """And a warning, unless it ends just behind one of its headers or frames."""
    content = (CAPTURES / name).read_bytes()
    *whole, summary = lines_of(FTP, content)
    assert isinstance(summary, Summary)
    seamless = 0
    for length in range(len(content)):
        *packets, last = lines_of(FTP, content[:length])
        assert packets == whole[: len(packets)]
        assert isinstance(last, (Summary, Failure))
        damage = (
            [w for w in last.warnings if w.startswith("the capture is damaged")]
            if isinstance(last, Summary)
            else [last]
        )
        seamless += not damage
    assert seamless == headers + summary.frames - 1


def test_a_simple_block_has_no_time() -> None:
    ((_, packet),) = list(make.tftp())[:1]
    blocks = make.pcapng([], link_types=(101,)) + make.block("<", 3, len(packet).to_bytes(4, "little") + packet)
    (told, _) = lines_of(TFTP, blocks)
    assert isinstance(told, PacketReport)
    assert told.time_s is None
    assert view.packet_text(told, Paint(is_on=False)).startswith("#1 - original udp 192.0.2.1:1024")


@given(st.data())
def test_any_bytes_are_a_capture_or_none(data: st.DataObject) -> None:
    """Random bytes, and good captures with some bytes changed: all is read, or up to where it makes no sense."""
    content = bytearray(data.draw(st.sampled_from([b"", *make.captures().values()]) | st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 8)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    *packets, last = lines_of(data.draw(st.sampled_from([FTP, TFTP])), bytes(content))
    assert all(isinstance(packet, PacketReport) for packet in packets)
    assert isinstance(last, (Summary, Failure))


# -- connections -----------------------------------------------------------------------------------------------------


def directions(packets: list[make.Timed]) -> list[tuple[int, str]]:
    lines = lines_of(Request("named", "ftp", is_verbose=True), make.pcap(packets, link_type=101))
    return [(line.connection, line.direction) for line in lines if isinstance(line, PacketReport)]


def test_a_capture_may_begin_in_the_middle_of_a_connection() -> None:
    packets = make.Talk("10.0.0.1", "10.0.0.2").answers("200 ok").says("PASV").packets
    assert directions(packets) == [(1, "reply"), (1, "original")]


def test_the_same_ports_again_are_another_connection() -> None:
    first = make.Talk("10.0.0.1", "10.0.0.2").open().says("PASV")
    again = make.Talk("10.0.0.1", "10.0.0.2", first_seq=77).open().answers("227 (10,0,0,2,195,82)")
    assert directions(first.packets + again.packets) == [(1, "original"), (2, "reply")]


def test_a_syn_that_is_sent_twice_is_one_connection() -> None:
    talk = make.Talk("10.0.0.1", "10.0.0.2").open().says("PASV")
    assert directions([talk.packets[0], *talk.packets]) == [(1, "original")]


def test_translation_concerns_its_own_family_alone() -> None:
    request = Request("named", "ftp", snat="2001:db8::5")
    content = (CAPTURES / "ftp.pcap").read_bytes()
    assert lines_of(request, content) == lines_of(FTP, content)


# -- the process -----------------------------------------------------------------------------------------------------

HELPER = """
from orchestrator.engine.api import *

class Mine(Helper):
    serves = (Serves(L4.TCP, (21,)),)
    policies = (Policy("mine", 1, 10),)

    def inspect(self, payload, direction, flow, private):
        {body}
        return NOTHING
"""


class Terminal:
    """`orch("replay", ...)` -> (code, out, err), what its process writes included."""

    def __init__(self, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self._directory = directory
        self._capfd = capfd

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        code = cli.run(["replay", *argv])
        out, err = self._capfd.readouterr()
        return code, out, err

    def helper(self, body: str) -> str:
        file = self._directory / "mine.py"
        file.write_text(HELPER.format(body=body))
        return str(file)


@pytest.fixture
def orch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path, capfd)


FTP_PCAP = str(CAPTURES / "ftp.pcap")


def test_people_read_what_is_expected(orch: Terminal) -> None:
    code, out, err = orch("ftp", FTP_PCAP, "--snat", "192.0.2.1", "--dnat", "198.51.100.1")
    assert (code, out, err) == (0, (GOLDEN / "ftp-nat.txt").read_text(), "")


def test_programs_read_the_same_lines(orch: Terminal) -> None:
    code, out, err = orch("ftp", str(CAPTURES / "ftp-cut.pcap"), "--json")
    *packets, result = map(json.loads, out.splitlines())
    *expected, summary = map(json.loads, (GOLDEN / "ftp-cut.jsonl").read_text().splitlines())
    assert packets == expected
    assert result["summary"] | {"type": "summary"} == summary
    assert (code, result["exit_code"], err) == (0, 0, f"warning: {summary['warnings'][0]}\n")


def test_options_of_the_guard_loosen_it(orch: Terminal) -> None:
    _, out, _ = orch("ftp", str(CAPTURES / "ftp-hostile.pcap"), "--any-destination", "--guard-ports", "1-65535")
    assert out == (GOLDEN / "ftp-loosened.txt").read_text()


def test_quiet_says_nothing(orch: Terminal) -> None:
    assert orch("ftp", FTP_PCAP, "-q") == (0, "", "")


def test_a_helper_of_the_users_own_runs_elsewhere_and_without_privilege(orch: Terminal) -> None:
    """Not in this process, and as nobody where this one is root; what it prints is no part of the result."""
    file = orch.helper("import os; print('I am', os.getpid(), os.getuid())")
    code, out, err = orch(file, FTP_PCAP)
    assert code == 0
    assert out.splitlines() == [
        "15 frames, 1 connection with the helper, 12 packets with a payload: "
        "0 expectations, 0 rewritten, 0 refused, 0 errors."
    ]
    ran = {tuple(map(int, line.split()[2:4])) for line in err.splitlines()}
    assert len(ran) == 1
    ((pid, uid),) = ran
    assert pid != os.getpid()
    assert uid != 0


@pytest.fixture
def site() -> Iterator[Path]:
    """A directory that everybody may read, as packages are installed in; those of pytest are for its user alone."""
    with tempfile.TemporaryDirectory(prefix="orch-site-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_an_installed_helper_is_found(orch: Terminal, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "their_helper.py").write_text(HELPER.format(body="raise ValueError('from the package')"))
    (site / "theirs-1.dist-info").mkdir()
    (site / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (site / "theirs-1.dist-info" / "entry_points.txt").write_text("[orch.helpers]\ntheirs = their_helper:Mine\n")
    monkeypatch.syspath_prepend(str(site))
    code, out, _ = orch("theirs", FTP_PCAP)
    assert code == 0
    assert "from the package" in out


def test_what_a_helper_raises_is_told_with_its_line(orch: Terminal) -> None:
    file = orch.helper("raise ValueError('\\x1b[31mred')")
    code, out, _ = orch(file, FTP_PCAP)
    assert code == 0
    assert f"    error: ValueError: \\x1b[31mred (line 9 of {file})\n" in out
    assert out.endswith("12 errors.\n")


@pytest.mark.parametrize(
    "body, what",
    [
        ("__import__('os')._exit(3)", "the process of the replay ended before the capture did"),
        ("__import__('os').abort()", "the process of the replay ended before"),
    ],
)
def test_a_process_that_ends_is_an_error(orch: Terminal, body: str, what: str) -> None:
    code, out, err = orch(orch.helper(body), FTP_PCAP)
    assert (code, out) == (1, "")
    assert what in err


@pytest.mark.skipif(os.getuid() != 0, reason="not everybody may make a user namespace")
def test_a_user_namespace_that_has_root_alone_is_enough(orch: Terminal) -> None:
    """Such as `unshare -r` makes, and containers of users."""
    status = "[line for line in open('/proc/self/status') if line.startswith('CapEff')]"
    argv = ["unshare", "-r", sys.executable, "-m", "orchestrator", "replay", orch.helper(f"print({status})"), FTP_PCAP]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, set(done.stderr.splitlines())) == (0, {r"['CapEff:\t0000000000000000\n']"})


@pytest.mark.parametrize(
    "forged",
    [
        b"\xff",
        b"5",
        b"[" * 100_000,
        b'{"type": "summary", "frames": "\\u001b[31m"}',
        b'{"type": "summary", "warnings": ["\\u001b[31m"]}',
        b'{"type": "failure", "what": "\\u001b[31m"}',
        b'{"type": "failure", "what": "it", "hint": 5}',
    ],
)
def test_a_helper_that_writes_into_the_answer_is_found_out(orch: Terminal, forged: bytes) -> None:
    write = f"try: os.write(n, {forged!r} + bytes((10,)))"
    body = f"import os\n        for n in range(3, 9):\n            {write}\n            except OSError: pass"
    code, out, err = orch(orch.helper(body), FTP_PCAP)
    assert (code, out) == (1, "")
    assert err.startswith("error: the helper wrote into the answer of its process\n")


@pytest.mark.parametrize("further", ["pass", "raise KeyboardInterrupt"], ids=["at its end", "at an exception"])
def test_threads_that_a_helper_leaves_hold_nobody_up(orch: Terminal, further: str) -> None:
    body = f"import threading; threading.Thread(target=threading.Event().wait).start()\n        {further}"
    argv = [sys.executable, "-m", "orchestrator", "replay", orch.helper(body), FTP_PCAP]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if further == "pass" else 1), done.stderr


def test_a_helper_that_declares_nonsense_is_an_error(orch: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from orchestrator.engine.api import *\nclass Mine(Helper):\n    summary = 'without serves'\n")
    code, out, err = orch(str(file), FTP_PCAP)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: what {file} declares cannot be read: AttributeError: ")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_the_process_ends_with_orch(orch: Terminal, number: signal.Signals, code: int) -> None:
    """Standard error, which the process has too, ends only if both have ended."""
    file = orch.helper("print('here', flush=True)\n        while True: pass")
    argv = [sys.executable, "-m", "orchestrator", "replay", file, FTP_PCAP]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "here\n"
        (os.killpg if number is signal.SIGINT else os.kill)(process.pid, number)
        process.communicate(timeout=20)
        assert process.returncode == code


@pytest.mark.parametrize(
    "source, what",
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name' (line 1)"),
        ("def", "SyntaxError"),
        ("x = 1", "there is no subclass of orchestrator.engine.api.Helper in it"),
        ("raise SystemExit(5)", "SystemExit: 5"),
    ],
)
def test_a_helper_that_cannot_be_loaded_is_an_error(orch: Terminal, tmp_path: Path, source: str, what: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    code, out, err = orch(str(file), FTP_PCAP)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: cannot load {file}: ")
    assert what in err


@pytest.mark.parametrize(
    "argv, what",
    [
        (
            ("ftp", "/nowhere.pcap"),
            "error: cannot read the capture: No such file or directory\n  where: /nowhere.pcap\n",
        ),
        (
            ("./nowhere.py", FTP_PCAP),
            "error: cannot read the helper: No such file or directory\n  where: ./nowhere.py\n",
        ),
        (("ftp", str(CAPTURES)), f"error: cannot read the capture: Is a directory\n  where: {CAPTURES}\n"),
        (("ftp", __file__), f"error: cannot read the capture: it is neither pcap nor pcapng\n  where: {__file__}\n"),
        (("ftq", FTP_PCAP), "error: cannot load ftq: 0 installed packages offer a helper 'ftq'\n  hint:  orch helpers"),
        (("a.b", FTP_PCAP), "error: cannot load a.b: 0 installed packages offer a helper 'a.b'\n"),
    ],
)
def test_what_cannot_be_read_is_an_error(orch: Terminal, argv: tuple[str, ...], what: str) -> None:
    code, out, err = orch(*argv)
    assert (code, out) == (1, "")
    assert err.startswith(what)


@pytest.mark.parametrize(
    "options",
    [("--snat", "10.0.0"), ("--dnat", "host"), ("--guard-ports", "5-1"), ("--guard-ports", "x"), ("--port", "0")],
)
def test_wrong_options_are_wrong_usage(orch: Terminal, options: tuple[str, ...]) -> None:
    code, out, err = orch("ftp", FTP_PCAP, *options)
    assert (code, out) == (ExitCode.USAGE, "")
    assert options[0] in err
