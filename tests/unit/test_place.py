"""A namespace that is given up while processes of ours are in it: by its names, by its last inhabitant."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from orchestrator.kernel.netns import entered, find
from orchestrator.model import Netns, ProcessSpec
from orchestrator.ports import Launch
from orchestrator.supervise import place
from orchestrator.supervise.place import VARIABLE, has_name, inhabitants, is_out_of_sight
from orchestrator.supervise.reactor import Reactor
from tests.namespaces import named_netns
from tests.processes import NAME, PROFILE, local_processes
from tests.waiting import until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)"),
    pytest.mark.slow,  # what was given up stays so for a second before it is said
]

ROOT = str(Path(__file__).parents[2])
SLEEP = ("sleep", "1000")
LOOK_OUT = """
import os, sys
sys.path.append(sys.argv[1])
from orchestrator.supervise import place
from orchestrator.supervise.reactor import Reactor

class Told(place.LookOut):
    def _is_held(self):
        is_held = super()._is_held()
        print("held" if is_held else "not held", flush=True)
        return is_held

place.LookOut = Told
reactor = Reactor()

def given_up():
    print("given up", flush=True)
    reactor.end()

place.watch(reactor, os.environ, given_up)
reactor.loop(())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def netns() -> Iterator[Netns]:
    with named_netns() as name:
        yield find(name)


@contextmanager
def running(*argv: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """It ends with the block, whatever becomes of that."""
    process = subprocess.Popen(
        argv, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def inside(path: str, *argv: str, **environment: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return running("nsenter", f"--net={path}", *argv, **environment)


@contextmanager
def looked_out_for(path: str, *before: str) -> Iterator[Iterator[str]]:
    """What a look-out in a namespace says at each look, and when it was given up."""
    marks = {VARIABLE: path, "ORCH_SUPERVISOR": "one of ours"}
    with inside(path, *before, sys.executable, "-I", "-S", "-c", LOOK_OUT, ROOT, **marks) as process:
        assert process.stdout is not None
        yield (line.strip() for line in process.stdout)


def test_a_namespace_is_given_up_with_its_last_name(netns: Netns) -> None:
    second = f"{netns.label}-too"
    with looked_out_for(netns.path) as said:
        assert next(said) == "held"
        Path("/run/netns", second).touch()
        subprocess.run(["mount", "--bind", netns.path, f"/run/netns/{second}"], check=True)
        ip("netns", "delete", netns.label)
        assert next(said) == "held"
        assert has_name("/run/netns", netns.identity)
        ip("netns", "delete", second)
        assert list(said) == ["not held", "not held", "given up"]


def test_what_cannot_be_told_now_is_looked_at_again(netns: Netns, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    refusals = [OSError(errno.EMFILE, "Too many open files")] * 2
    list_ = os.listdir

    def listdir(path: str) -> list[str]:
        if refusals:
            raise refusals.pop()
        return list_(path)

    monkeypatch.setattr(os, "listdir", listdir)
    monkeypatch.setattr(place, "_LOOK_EVERY_S", 0.01)
    reactor = Reactor()
    with entered(netns):
        place.watch(reactor, {VARIABLE: netns.path}, lambda: told.append("given up"))
        ip("netns", "delete", netns.label)
        while refusals:
            assert not told
            reactor._turn()
        while not told:
            reactor._turn()


def test_however_often_it_cannot_be_told_it_is_looked_at_again_once(
    netns: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listdir(_path: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", listdir)
    reactor = Reactor()
    with entered(netns):
        look_out = place.LookOut(reactor, netns.path, lambda: None)
        reactor._turn()
        (again,) = reactor._timers
        for _ in range(5):  # as many names have gone
            look_out._look()
    assert reactor._timers == [again]


def test_a_name_that_leads_to_another_namespace_holds_nothing(netns: Netns) -> None:
    with looked_out_for(netns.path) as said:
        assert next(said) == "held"
        ip("netns", "delete", netns.label)
        ip("netns", "add", netns.label)
        assert list(said)[-1] == "given up"


def test_a_name_that_leads_nowhere_tells_nothing(netns: Netns) -> None:
    assert not is_out_of_sight(netns.path)
    subprocess.run(["umount", netns.path], check=True)
    assert is_out_of_sight(netns.path)
    Path(netns.path).unlink()
    assert not is_out_of_sight(netns.path)


def test_a_namespace_of_a_process_is_given_up_with_its_last_inhabitant() -> None:
    with running("unshare", "--net", *SLEEP) as first:
        path = f"/proc/{first.pid}/ns/net"
        here = find("").identity
        while find(path).identity == here:
            pass
        identity = find(path).identity
        with looked_out_for(path) as said, inside(path, *SLEEP) as second:
            assert next(said) == "held"
            while set(inhabitants(identity)) != {first.pid, second.pid}:
                pass
            for process in (first, second):
                process.kill()
                process.wait()
            seen = list(said)
    assert seen[-3:] == ["not held", "not held", "given up"]
    assert set(seen[:-3]) <= {"held"}


def test_a_namespace_that_a_process_elsewhere_has_open_is_given_up_with_that_process(netns: Netns) -> None:
    """Nobody lives there: `orch verify` makes namespaces so."""
    hold = f"import os, time; print(os.open({netns.path!r}, os.O_RDONLY), flush=True); time.sleep(1000)"
    with running(sys.executable, "-c", hold) as holder:
        assert holder.stdout is not None
        path = f"/proc/{holder.pid}/fd/{int(holder.stdout.readline())}"
        ip("netns", "delete", netns.label)
        with looked_out_for(path) as said:
            assert next(said) == "held"
            holder.kill()
            holder.wait()
            assert list(said)[-3:] == ["not held", "not held", "given up"]


def test_a_namespace_that_is_named_by_way_of_a_process_is_given_up_with_that_process(
    netns: Netns, tmp_path: Path
) -> None:
    """Its name is in the file system of a container."""
    name = tmp_path / "name"
    name.touch()
    subprocess.run(["mount", "--bind", netns.path, name], check=True)
    try:
        with running(*SLEEP) as holder:
            ip("netns", "delete", netns.label)
            with looked_out_for(f"/proc/{holder.pid}/root{name}") as said:
                assert next(said) == "held"
                holder.kill()
                holder.wait()
                assert list(said)[-3:] == ["not held", "not held", "given up"]
    finally:
        subprocess.run(["umount", name], check=True)


def test_a_name_that_is_a_link_to_a_process_is_given_up_with_its_last_inhabitant(tmp_path: Path) -> None:
    """So are containers made known to ip(8); nobody tells of a link that leads nowhere."""
    with running("unshare", "--net", *SLEEP) as first:
        path = f"/proc/{first.pid}/ns/net"
        while find(path).identity == find("").identity:
            pass
        name = tmp_path / "name"
        name.symlink_to(path)
        with looked_out_for(str(name)) as said:
            assert next(said) == "held"
            first.kill()
            first.wait()
            assert list(said)[-3:] == ["not held", "not held", "given up"]


def test_the_namespace_of_process_1_is_never_given_up(tmp_path: Path) -> None:
    """Somebody may have given it a name for a while: ip netns attach."""
    name = tmp_path / "name"
    name.touch()
    host = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
    script = 'mount --bind /proc/1/ns/net "$1" && shift && env "ORCH_SUPERVISOR=one of ours" "$@"; true'
    look_out = (sys.executable, "-I", "-S", "-c", LOOK_OUT, ROOT)
    with running(*host, script, "sh", str(name), *look_out, **{VARIABLE: str(name)}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        name.unlink()
        assert process.stdout.readline() == "held\n"


def test_where_no_names_are_to_be_seen_the_last_inhabitant_counts() -> None:
    with running("unshare", "--net", *SLEEP) as first:
        path = f"/proc/{first.pid}/ns/net"
        while find(path).identity == find("").identity:
            pass
        hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh")
        with looked_out_for(path, *hidden) as said:
            assert next(said) == "held"
            first.kill()
            first.wait()
            assert list(said)[-3:] == ["not held", "not held", "given up"]


def test_what_a_profile_has_goes_with_its_namespace(tmp_path: Path, netns: Netns) -> None:
    """The supervisor has orch tear down, which ends it in turn."""
    with local_processes(tmp_path) as processes:
        spec = ProcessSpec(NAME, SLEEP, (), (), (), ready_within_s=1)
        pid = processes.start(Launch(PROFILE, netns, spec, {}, "digest"))
        ip("netns", "delete", netns.label)
        until(lambda: not processes.runtime_dir(PROFILE, netns).exists(), "its directory is removed", within_s=60)
        until(lambda: not processes.supervisors(PROFILE, netns.identity), "its supervisor has ended")
        assert not processes.running()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
