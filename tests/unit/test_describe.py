"""Helpers that are not ours: described by a process without privilege, and refused if root should not run them."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyseccomp
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.catalogue.description import parse
from orchestrator.engine import loading
from orchestrator.engine.api import Helper
from orchestrator.engine.describe import declaration
from orchestrator.errors import OrchError
from orchestrator.supervise.describe import describe
from tests.examples import many

ROOT = Path(__file__).parents[2]
STEAM = ROOT / "profiles" / "steam.py"
IS_ROOT = os.geteuid() == 0

HELPER = """
import os
from orchestrator.engine.api import L4, NOTHING, Helper, Policy, Serves

class Own(Helper):
    summary = {summary}
    serves = (Serves(L4.UDP, (5000,)),)
    policies = (Policy("own", 1, 30),)

    def inspect(self, payload, direction, flow, private):
        return NOTHING
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that root trusts, if the tests run as root: pytest's own is below /tmp, which anybody can write."""
    path = Path(tempfile.mkdtemp(dir="/run" if IS_ROOT else None))
    yield path
    shutil.rmtree(path)


def write(file: Path, *, summary: str = "'own'", before: str = "") -> str:
    file.write_text(before + HELPER.format(summary=summary))
    return str(file)


def refusal(use: str, **options: float) -> str:
    with pytest.raises(OrchError) as caught:
        describe(use, **options)
    return caught.value.what


def ends(pid: int) -> bool:
    """Whether a process that is no child of this one has ended, or does so within some seconds."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


def test_a_file_is_described_with_what_it_contained(directory: Path) -> None:
    file = write(directory / "own.py")
    described = describe(file)
    assert described is not None
    assert (described.file, described.summary) == (file, "own")
    assert described.source.encode() == Path(file).read_bytes()
    assert [(p.l4proto, p.ports[0].first) for p in described.protocols] == [("udp", 5000)]


def test_a_file_must_be_text_that_a_document_can_hold(directory: Path) -> None:
    file = directory / "own.py"
    file.write_bytes(b"# coding: latin-1\r\n# \xe4\n" + HELPER.format(summary="'own'").encode())
    assert refusal(str(file)) == "line 2 is not UTF-8"


def test_the_code_of_others_never_runs_in_orch(directory: Path) -> None:
    """Neither in its process nor with its rights: the file tells who ran it."""
    status = "dict(line.split(':') for line in open('/proc/self/status'))"
    facts = f"[os.getpid(), os.getuid()] + [{status}[key].strip() for key in ('CapPrm', 'CapBnd', 'NoNewPrivs')]"
    described = describe(write(directory / "own.py", summary=f"' '.join(map(str, {facts}))"))
    assert described is not None
    pid, uid, permitted, bounding, no_new_privileges = described.summary.split()
    assert int(pid) != os.getpid()
    if IS_ROOT:
        assert int(uid) != 0
        assert (int(permitted, 16), int(bounding, 16), no_new_privileges) == (0, 0, "1")


def test_what_a_file_prints_is_not_the_answer(directory: Path) -> None:
    described = describe(write(directory / "own.py", before="print('{\"declared\": {}}', flush=True)\n"))
    assert described is not None
    assert described.summary == "own"


def test_code_that_does_not_end_is_ended(directory: Path) -> None:
    file = write(directory / "own.py", before="while True: pass\n")
    assert refusal(file, within_s=0.5) == "its code did not end within 0.5 s"


def test_threads_that_it_leaves_hold_nobody_up(directory: Path) -> None:
    described = describe(
        write(directory / "own.py", before="import threading as t\nt.Thread(target=t.Event().wait).start()\n")
    )
    assert described is not None
    assert described.summary == "own"


def test_the_code_starts_nothing(directory: Path) -> None:
    said = refusal(write(directory / "own.py", before="import os\nos.fork()\n"))
    assert said == "PermissionError: [Errno 1] Operation not permitted (line 2)"


def test_what_the_code_writes_is_limited(directory: Path) -> None:
    before = "import os, sys\nwhile os.write(int(sys.stderr.fileno()), bytes(1 << 16)): pass\n"
    assert refusal(write(directory / "own.py", before=before)) == "OSError: [Errno 27] File too large (line 2)"


def test_the_code_ends_with_orch(directory: Path) -> None:
    started = directory / "started"
    os.mkfifo(started)
    started.chmod(0o644)
    file = write(directory / "own.py", before=f"open({str(started)!r}).read()\nwhile True: pass\n")
    script = f"from orchestrator.supervise.describe import describe; describe({file!r})"
    directory.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as orch:
        started.write_text("it waits until this is read")
        (pid,) = map(int, Path(f"/proc/{orch.pid}/task/{orch.pid}/children").read_text().split())
        orch.kill()
    assert ends(pid)


def test_a_path_that_cannot_be_printed_is_refused(directory: Path) -> None:
    odd = directory / os.fsdecode(b"\xff")
    odd.mkdir()
    assert refusal(write(odd / "own.py")).startswith("its path has a character that cannot be printed")


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("raise ValueError('no')\n", "ValueError: no (line 1)"),
        ("raise SystemExit('out')\n", "SystemExit: out (line 1)"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
        ("import os\nos.abort()\n", "loading it ended without an answer"),
        ("raise ValueError('\\x1b[2J\\n' * 500)\n", "ValueError:  [2J"),
    ],
)
def test_what_goes_wrong_in_the_file_is_told(directory: Path, before: str, message: str) -> None:
    said = refusal(write(directory / "own.py", before=before))
    assert said.startswith(message)
    assert said.isprintable()
    assert len(said) <= 500


def test_no_file_no_helper(directory: Path) -> None:
    assert refusal(str(directory / "nosuch.py")) == "cannot be read: No such file or directory"
    assert refusal(str(directory)) == "cannot be read: Is a directory"
    os.mkfifo(directory / "pipe")
    assert refusal(str(directory / "pipe")) == "not a regular file"
    assert describe("nobody-offers-this") is None


@pytest.mark.skipif(not IS_ROOT, reason="only root has something to lose")
def test_root_refuses_what_others_could_change(directory: Path) -> None:
    file = Path(write(directory / "own.py"))
    link = directory / "link.py"
    link.symlink_to(file)
    for path, spoil, mend in (
        (file, lambda p: p.chmod(0o666), lambda p: p.chmod(0o644)),
        (file, lambda p: p.chmod(0o664), lambda p: p.chmod(0o644)),
        (directory, lambda p: p.chmod(0o777), lambda p: p.chmod(0o755)),
        (file, lambda p: os.chown(p, 65534, 0), lambda p: os.chown(p, 0, 0)),
        (directory, lambda p: os.chown(p, 65534, 0), lambda p: os.chown(p, 0, 0)),
    ):
        spoil(path)
        for name in (file, link):
            assert refusal(str(name)) == f"{path} can be changed by others than root"
        mend(path)
    described = describe(str(link))
    assert described is not None
    assert described.file == str(file)


def test_an_installed_package_offers_a_helper() -> None:
    """In a virtual environment of its own: the package is found through site-packages, which -S leaves out."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
        (packages,) = home.glob("venv/lib/python3*/site-packages")
        (packages / "orch.pth").write_text(f"{ROOT}\n")
        (packages / "pyseccomp.py").symlink_to(pyseccomp.__file__)
        (packages / "yaml").symlink_to(Path(yaml.__file__).parent)
        (packages / "own_helper.py").write_text(HELPER.format(summary="'installed'"))
        info = packages / "own_helper-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-helper\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            "[orch.helpers]\nown = own_helper:Own\nwhole = own_helper\nno = json:loads\n"
        )
        script = """
import sys
from orchestrator.errors import OrchError
from orchestrator.supervise.describe import describe, installed
print([(entry.name, entry.summary) for entry in installed(print)])
for use in ("own", "whole", "other"):
    found = describe(use)
    print(found and (found.summary, found.file))
try:
    describe("no")
except OrchError as error:
    print(error.what)
assert "own_helper" not in sys.modules
"""
        done = subprocess.run(
            [home / "venv" / "bin" / "python", "-I", "-c", script], capture_output=True, text=True, check=True
        )
    assert done.stdout.splitlines() == [
        "no: json:loads is not a subclass of Helper",
        "[('own', 'installed'), ('whole', 'installed')]",
        "('installed', '')", "('installed', '')", "None", "json:loads is not a subclass of Helper",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ftp", "tftp"])
def test_a_description_is_json_and_back(name: str) -> None:
    helper = loading.builtin(name)
    described = parse(json.loads(json.dumps(declaration(helper))))
    assert described.summary == helper.summary
    assert described.triggers == helper.triggers
    assert [(p.name, p.expect_max, p.expect_timeout_s) for p in described.policies] == [
        (p.name, p.expect_max, p.expect_timeout_s) for p in helper.policies
    ]


@pytest.mark.parametrize("name", ["nosuch", "no.such"])
def test_there_is_no_other_helper_of_ours(name: str) -> None:
    with pytest.raises(loading.LoadError, match=f"there is no helper '{name}'"):
        loading.builtin(name)


GOOD = declaration(loading.from_source(HELPER.format(summary="'own'").encode(), "own.py"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary": 5}, "summary: str expected, not 5"),
        ({"summary": "two\nlines"}, "summary: one line"),
        ({"serves": []}, "serves: at least one transport"),
        ({"serves": [{"l4proto": "udp", "ports": []}]}, "serves: at least one transport"),
        ({"serves": [{"l4proto": "sctp", "ports": [5]}]}, "'sctp' is not a valid L4Proto"),
        ({"serves": [{"l4proto": "udp", "ports": [0]}]}, "not a port range: 0-0"),
        ({"serves": [{"l4proto": "udp", "ports": [True]}]}, "ports: int expected"),
        ({"serves": [{"l4proto": "udp", "ports": [5]}] * 2}, "serves: one entry for each transport"),
        ({"policies": []}, "policies: 1 to 4"),
        ({"policies": [{"name": "a b", "expect_max": 1, "expect_timeout_s": 1}]}, "not a policy name"),
        ({"policies": [{"name": "a", "expect_max": 0, "expect_timeout_s": 1}]}, "expect_max must be 1..255"),
        ({"policies": [{"name": "a", "expect_max": 1, "expect_timeout_s": 1}] * 2}, "of different names"),
        ({"families": []}, "families: ip, ip6, or both"),
        ({"families": ["ipx"]}, "'ipx' is not a valid L3Proto"),
        ({"outgoing_only": 1}, "outgoing_only: bool expected"),
        ({"private_len": 33}, "private_len: 0 to 32 bytes, not 33"),
        ({"private_len": -1}, "private_len: 0 to 32 bytes"),
        ({"bounds": {}}, "first_port: int expected"),
        ({"bounds": {**GOOD["bounds"], "first_port": 2, "last_port": 1}}, "not a port range: 2-1"),
        ({"triggers": ["00" * 5]}, "triggers: 1 to 4 bytes each"),
        ({"triggers": ["xx"]}, "non-hexadecimal"),
        ({"triggers": "00"}, "triggers: list expected"),
    ],
)
def test_what_a_class_declares_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse({**GOOD, **changes})


def test_private_data_leaves_room_for_the_engine_on_tcp() -> None:
    tcp = [{"l4proto": "tcp", "ports": [5]}]
    assert parse({**GOOD, "private_len": 15, "serves": tcp}).private_len == 15
    with pytest.raises(ValueError, match="private_len: 0 to 15 bytes, not 16"):
        parse({**GOOD, "private_len": 16, "serves": tcp})


ANSWERS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.one_of(
        ANSWERS, st.sampled_from(sorted(GOOD)).flatmap(lambda key: ANSWERS.map(lambda value: {**GOOD, key: value}))
    )
)
@settings(deadline=None, max_examples=many(300))
def test_any_answer_is_a_description_or_a_value_error(answer: object) -> None:
    with suppress(ValueError):
        parse(answer)


def test_the_example_for_authors_is_a_helper() -> None:
    helper = loading.from_source(STEAM.read_bytes(), str(STEAM))
    assert issubclass(helper, Helper)
    assert parse(declaration(helper)).is_outgoing_only
