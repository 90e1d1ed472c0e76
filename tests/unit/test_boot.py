"""The units that `orch enable` writes: golden files, and what they never overwrite. ORCH_UPDATE_GOLDEN=1 renews them.

Under a real systemd they are in tests/kernel/test_boot.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import boot, cli
from orchestrator.errors import OrchError, RefusedError, UsageError
from orchestrator.kernel import machine
from orchestrator.supervise.service import END_WITHIN_S

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "boot"
SHIPPED = {
    "orch.service": (
        "orch@.service",
        "# One profile as a service: orch@ftp.service applies /etc/orch/ftp.yaml, keeps its processes running, and"
        " takes it away.\n# To change something: systemctl edit orch@ftp.service\n\n",
    ),
    "orch_again.service": ("orch_again@.service", "# Enabled with orch@.service.\n\n"),
}
ARGV = ("/usr/bin/orch", "run", "/etc/orch/ftp.yaml")
CASES = {
    "host": boot.service("ftp", argv=ARGV, netns="", is_named=False),
    "blue": boot.service("ftp", argv=(*ARGV, "--netns", "blue"), netns="blue", is_named=True),
    "of-the-profile": boot.service("ftp", argv=ARGV, netns="/run/docker/netns/4f1c", is_named=False),
}


def check(rendered: dict[str, str], directory: Path) -> None:
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in rendered.items():
            (directory / name).write_text(text)
    assert rendered == {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_units_are_as_expected(case: str) -> None:
    check({unit.name: unit.text for unit in boot.documents(CASES[case])}, GOLDEN / case)


def test_the_shipped_units_are_the_same_for_any_profile() -> None:
    for template, (name, heading) in SHIPPED.items():
        file = ROOT / "contrib" / "systemd" / name
        text = heading + boot.render(template, boot.SHIPPED)
        if os.environ.get("ORCH_UPDATE_GOLDEN"):
            file.write_text(text)
        assert file.read_text() == text


def test_a_start_is_tried_again_for_as_long_as_it_fails_and_a_stop_is_not_cut_short() -> None:
    """Another profile may be on trial for an hour; what starts it without a pause (a path) is still limited."""
    text = boot.render("orch.service", boot.SHIPPED)
    told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert told["StartLimitIntervalSec"] == told["TimeoutStopSec"] == "2min"
    assert 120 / int(told["RestartSec"]) < int(told["StartLimitBurst"])
    assert END_WITHIN_S <= 120 - 30, "the last attempt takes time, too"


@pytest.mark.parametrize("case", CASES)
def test_a_unit_is_ours_until_somebody_changes_it(case: str) -> None:
    for unit in boot.documents(CASES[case]):
        assert boot.is_ours(unit.text)
        assert not boot.is_ours(unit.text + "# mine\n")
        assert not boot.is_ours(unit.text.partition("\n")[2])


def test_names_of_units_tell_profile_and_namespace_apart() -> None:
    """A profile's name has neither _ nor @."""
    assert boot.names("ftp", "") == ("orch-ftp.service", "orch-ftp_again.service", "orch-ftp.path")
    assert boot.names("ftp", "blue") == ("orch-ftp@blue.service", "orch-ftp_again@blue.service", "orch-ftp@blue.path")


@pytest.mark.parametrize("netns", ["/proc/7/ns/net", "a b", "a%i", "a\nb"])
def test_a_namespace_that_cannot_be_waited_for_is_refused(netns: str) -> None:
    with pytest.raises(UsageError):
        boot.service("ftp", argv=ARGV, netns=netns, is_named=True)


def test_the_unit_of_the_exporter_is_not_that_of_a_profile() -> None:
    with pytest.raises(UsageError, match=r"orch-exporter\.service"):
        boot.service("exporter", argv=ARGV, netns="", is_named=False)
    assert boot.service("exporter", argv=ARGV, netns="blue", is_named=True)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), min_size=1))
def test_a_command_line_is_one_line_that_says_the_same_words(words: list[str]) -> None:
    command = boot.service("ftp", argv=words, netns="", is_named=False).command
    assert "\n" not in command
    assert list(split(command)) == words


def split(command: str) -> list[str]:
    """As systemd.service(5) and systemd.syntax(7) read it, as far as it is used."""
    words, word, is_quoted, rest = [], "", False, iter(command)
    for character in rest:
        if character == "\\" and is_quoted:
            character = {"n": "\n"}.get(following := next(rest), following)
        elif character in "%$":
            assert next(rest) == character
        elif character == '"':
            is_quoted = not is_quoted
            continue
        elif character == " " and not is_quoted:
            words.append(word)
            word = ""
            continue
        word += character
    return [*words, word]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "ftp.yaml"
    file.write_text("profile: ftp\nhelpers: {ftp: {engine: kernel}}\n")
    return file


def test_a_dry_run_prints_the_files(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "UNSEEN", ())
    assert cli.run(["enable", str(profile), "--netns", "blue", "--dry-run", "--unit-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in boot.names("ftp", "blue"):
        assert f"# {tmp_path}/{name}\n# Written by orch enable" in printed
    assert f" run {profile} --netns blue\n" in printed
    assert sorted(tmp_path.iterdir()) == [profile]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_what_a_service_does_not_see_is_refused(
    profile: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert profile.is_relative_to("/tmp")
    assert cli.run(["enable", str(profile), *options]) == 1
    said = capsys.readouterr()
    assert (said.out, f"a service does not see {profile}" in said.err) == ("", True)


def test_without_systemd_it_says_what_a_boot_script_applies_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The profile may say that an apply has to be confirmed."""
    monkeypatch.setattr(machine, "has_systemd", lambda: False)
    monkeypatch.setattr(boot, "UNSEEN", ())
    file = tmp_path / "ftp.yaml"
    file.write_text("profile: ftp\nconfirm_within_s: 60\nhelpers: {ftp: {engine: kernel}}\n")
    assert cli.run(["enable", str(file), "--netns", "blue", "--unit-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(f": orch apply {file} --netns blue --confirm-within 0\n")


def test_standard_input_is_no_profile_of_a_boot(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["enable", "-"]) == 64
    assert "takes a file" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[Unit]\n", boot.documents(CASES["host"])[0].text + "# mine\n"])
def test_what_somebody_wrote_is_neither_overwritten_nor_removed(text: str, tmp_path: Path) -> None:
    units = boot.documents(CASES["host"])
    file = tmp_path / units[1].name
    file.write_text(text)
    with pytest.raises(RefusedError, match="is not as orch wrote it"):
        boot.enable(units, tmp_path, is_now=False)
    with pytest.raises(RefusedError, match="is not as orch wrote it"):
        boot.disable([unit.name for unit in units], tmp_path, is_now=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {file.name: text}


def test_what_was_not_enabled_is_not_disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "orch-ftp@blue.service").write_text(boot.documents(CASES["blue"])[0].text)
    assert cli.run(["disable", "ftp", "--unit-dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == "orch-ftp.service was not enabled.\n"
    assert "orch-ftp@blue.service is enabled: give its namespace with --netns" in said.err


@pytest.fixture
def unit_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where units go, with a systemctl that agrees to everything."""
    programs, units = tmp_path / "bin", tmp_path / "units"
    programs.mkdir()
    units.mkdir()
    (programs / "systemctl").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return units


def written(profile: str, file: str, unit_dir: Path, netns: str = "", *, is_named: bool = False) -> tuple[str, ...]:
    argv = ("/usr/bin/orch", "run", file)
    unit = boot.service(profile, argv=argv, netns=netns, is_named=is_named)
    return boot.enable(boot.documents(unit), unit_dir, is_now=False)


def test_a_disk_that_is_full_leaves_nothing(unit_dir: Path) -> None:
    units = boot.documents(CASES["host"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(units[0].text) // 2, hard))
    try:
        with pytest.raises(OrchError, match=f"cannot write {unit_dir}/orch-ftp.service: File too large"):
            boot.enable(units, unit_dir, is_now=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(unit_dir.iterdir()) == []


@pytest.mark.parametrize("first, second", [("blue", "red"), ("", "blue"), ("blue", ""), ("/a/blue", "/b/blue")])
@pytest.mark.parametrize("is_named", [True, False])
def test_of_two_namespaces_the_second_does_not_take_the_units_of_the_first(
    unit_dir: Path, first: str, second: str, *, is_named: bool
) -> None:
    written("ftp", "/etc/orch/first.yaml", unit_dir, first, is_named=is_named and bool(first))
    before = {path.name: path.read_text() for path in unit_dir.iterdir()}
    if is_named and Path(first).name != Path(second).name:
        written("ftp", "/etc/orch/second.yaml", unit_dir, second, is_named=bool(second))
    else:
        with pytest.raises(RefusedError, match=r" already$") as caught:
            written("ftp", "/etc/orch/second.yaml", unit_dir, second, is_named=is_named and bool(second))
        assert caught.value.hint.startswith("--netns gives another namespace units of its own")
        assert len(list(unit_dir.iterdir())) == len(before)
    assert {name: (unit_dir / name).read_text() for name in before} == before


def test_another_file_of_the_same_profile_and_namespace_takes_over(unit_dir: Path) -> None:
    written("ftp", "/etc/orch/first.yaml", unit_dir, "blue")
    assert written("ftp", "/etc/orch/second.yaml", unit_dir, "/run/netns/blue") == ("orch-ftp.service",)
    assert written("ftp", "/etc/orch/second.yaml", unit_dir, "blue") == ()


@pytest.mark.parametrize("of_first, of_second", [("blue", "red"), ("", "red"), ("blue", "")])
def test_the_file_of_another_namespace_does_not_disable_it(unit_dir: Path, of_first: str, of_second: str) -> None:
    names = boot.names("ftp", "")
    written("ftp", "/etc/orch/first.yaml", unit_dir, of_first)
    before = sorted(path.name for path in unit_dir.iterdir())
    with pytest.raises(RefusedError, match=r"orch-ftp\.service is for "):
        boot.disable(names, unit_dir, is_now=False, netns_path=boot.path_of(of_second))
    assert sorted(path.name for path in unit_dir.iterdir()) == before
    assert boot.disable(names, unit_dir, is_now=False, netns_path=boot.path_of(of_first))
    assert not list(unit_dir.iterdir())


def test_who_names_a_namespace_of_the_same_label_is_told_which_one_to_name(unit_dir: Path) -> None:
    names = boot.names("ftp", "blue")
    written("ftp", "/etc/orch/first.yaml", unit_dir, "/a/blue", is_named=True)
    with pytest.raises(RefusedError) as caught:
        boot.disable(names, unit_dir, is_now=False, netns_path="/b/blue")
    assert caught.value.hint == "orch disable with the name of the profile and --netns /a/blue takes it away"
    assert boot.disable(names, unit_dir, is_now=False, netns_path="/a/blue")


def test_a_profile_is_disabled_by_name_whatever_its_namespace(unit_dir: Path) -> None:
    written("ftp", "/etc/orch/first.yaml", unit_dir, "blue")
    assert boot.disable(boot.names("ftp", ""), unit_dir, is_now=False)
    assert not list(unit_dir.iterdir())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """`systemd-analyze verify` of a host with the programs that the units name."""
    for unit in boot.documents(replace(CASES["blue"], command="/bin/true")):
        (tmp_path / unit.name).write_text(unit.text)
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *files], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
