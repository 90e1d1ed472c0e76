"""Network namespaces of this machine; most of it needs root."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import PreflightError
from orchestrator.kernel import netns
from orchestrator.model import Netns
from tests.namespaces import named_netns

root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") is None, reason="needs root and ip(8)"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def where() -> str:
    return os.readlink("/proc/thread-self/ns/net")  # noqa: PTH115 (a link to nowhere: only its text counts)


@pytest.fixture
def name() -> Iterator[str]:
    with named_netns() as made:
        yield made


def test_the_own_namespace_needs_no_path() -> None:
    assert netns.find("").path == ""
    assert netns.find("/proc/thread-self/ns/net") == netns.find("")
    with netns.entered(netns.find("")):
        pass


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(PreflightError, match="no network namespace orch-nowhere") as caught:
        netns.find("orch-nowhere")
    assert "ip netns list" in caught.value.hint


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_namespace_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "stale"
    path.touch() if kind == "file" else path.mkdir()
    with pytest.raises(PreflightError, match="is not a network namespace"):
        netns.find(str(path))


@root
def test_a_name_and_its_path_are_the_same_namespace(name: str) -> None:
    found = netns.find(name)
    assert found == netns.find(f"/run/netns/{name}")
    assert found.label == name
    assert found in netns.known()


@root
def test_the_own_namespace_comes_first_and_stale_files_are_left_out(name: str) -> None:
    stale = Path("/run/netns", f"{name}-stale")
    stale.touch()
    try:
        assert netns.known()[0] == netns.own()
        assert stale.name not in {known.label for known in netns.known()}
    finally:
        stale.unlink()


@root
def test_a_second_name_does_not_make_a_second_namespace(name: str) -> None:
    ip("netns", "attach", f"{name}-too", str(os.getpid()))
    try:
        assert netns.own().label == f"{name}-too"
        identities = [known.identity for known in netns.known()]
        assert len(identities) == len(set(identities))
    finally:
        ip("netns", "delete", f"{name}-too")


@root
def test_the_caller_comes_back_after_an_error(name: str) -> None:
    home, found = where(), netns.find(name)

    def fail() -> None:
        with netns.entered(found):
            assert where() != home
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert where() == home


@root
def test_entered_namespaces_nest(name: str) -> None:
    home, found = where(), netns.find(name)
    with netns.entered(found):
        inside = where()
        with netns.entered(found):
            assert where() == inside
        with netns.scratch():
            assert where() not in (home, inside)
        assert where() == inside
    assert where() == home


@root
def test_procfs_and_sockets_follow(name: str) -> None:
    with netns.entered(netns.find(name)):
        interfaces = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
        channel = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    with channel, pytest.raises(OSError, match="unreachable"):
        channel.connect(("127.0.0.1", 9))  # the loopback device is down there


@root
def test_only_the_calling_thread_moves(name: str) -> None:
    home, seen, inside = where(), [], threading.Event()

    def look() -> None:
        inside.wait()
        seen.append(where())

    thread = threading.Thread(target=look)
    thread.start()
    with netns.entered(netns.find(name)):
        inside.set()
        thread.join()
    assert seen == [home]


@root
def test_a_namespace_that_went_away_or_was_replaced_is_refused(name: str) -> None:
    found = netns.find(name)
    replaced = Netns(label=name, path=found.path, identity=found.identity + "0")
    with pytest.raises(PreflightError, match="replaced"), netns.entered(replaced):
        pass
    ip("netns", "delete", name)
    with pytest.raises(PreflightError, match="there is no network namespace"), netns.entered(found):
        pass
    assert not Path("/run/netns", name).exists()


@root
def test_a_namespace_of_another_kind_is_refused() -> None:
    found = netns.find("/proc/self/ns/uts")
    home = where()
    with pytest.raises(PreflightError, match="cannot enter") as caught, netns.entered(found):
        pass
    assert caught.value.cause == "EINVAL, setns"
    assert where() == home


def refuse_setns(_descriptor: int) -> None:
    """As pyroute2 does, without the privilege."""
    raise OSError(errno.EPERM, "failed to open netns", _descriptor)


@root
def test_a_namespace_that_may_not_be_entered_is_said_to_be_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = netns.find(name)
    monkeypatch.setattr(netns, "setns", refuse_setns)
    with pytest.raises(PreflightError, match=f"^cannot enter network namespace {name}$") as caught:
        netns.cookie(found)
    assert (caught.value.hint, caught.value.cause) == ("run as root", "EPERM, setns")


@root
def test_who_could_not_come_back_makes_no_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root of a user namespace may make one, and not return from there."""
    home, causes = where(), []

    def look() -> None:
        try:
            with netns.scratch():
                pass
        except PreflightError as error:
            causes.append((error.what, error.cause, where()))

    monkeypatch.setattr(netns, "setns", refuse_setns)
    thread = threading.Thread(target=look)  # which would be lost there
    thread.start()
    thread.join()
    assert causes == [("cannot make a network namespace", "EPERM, setns", home)]


@root
def test_a_scratch_namespace_is_new_and_gone_afterwards() -> None:
    home = where()
    with netns.scratch():
        first = where()
        assert first != home
        assert netns.own().label == "self"
    with netns.scratch():
        assert where() != home
    assert where() == home


@root
def test_no_descriptor_is_left_open(name: str) -> None:
    found = netns.find(name)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with netns.entered(found), netns.scratch():
            pass
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@root
def test_a_cookie_is_one_namespace_even_when_its_inode_is_given_to_another(name: str) -> None:
    found = netns.find(name)
    cookie = netns.cookie(found)
    assert netns.cookie(netns.own()) not in (0, cookie)
    ip("netns", "attach", f"{name}-too", str(os.getpid()))
    try:
        assert netns.cookie(netns.find(f"{name}-too")) == netns.cookie(netns.own())
    finally:
        ip("netns", "delete", f"{name}-too")
    cookies = [cookie]
    for _ in range(5):
        ip("netns", "delete", name)
        ip("netns", "add", name)
        cookies.append(netns.cookie(netns.find(name)))
    assert len(set(cookies)) == len(cookies)
    assert netns.cookie(netns.find(name)) == cookies[-1]


@root
def test_a_namespace_that_is_gone_has_no_cookie(name: str) -> None:
    found = netns.find(name)
    ip("netns", "delete", name)
    with pytest.raises(PreflightError, match="there is no network namespace"):
        netns.cookie(found)


@root
def test_a_host_that_is_short_of_descriptors_does_not_say_that_a_namespace_is_gone(name: str) -> None:
    found = netns.find(name)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"), netns.entered(found):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with netns.entered(found):
        pass
