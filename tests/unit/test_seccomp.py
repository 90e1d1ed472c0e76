"""What is left to the code of a helper: every way out fails, in Python and past it, while it is loaded and after."""

from __future__ import annotations

import ctypes.util
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.engine import seccomp
from orchestrator.errors import PreflightError
from orchestrator.supervise import filters

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to begin with privileges")

# Who runs this has one capability, as a helper process has. `action` is one expression; errno 0 is done, -1 unheard.
_PROGRAM = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading
phase, action, root = sys.argv[1:4]
loading, serving = (bytes.fromhex(text) for text in sys.stdin.read().split())
sys.path.append(root)
from orchestrator.engine import attempts, privileges, seccomp
libc = ctypes.CDLL(None, use_errno=True)
call, signed = libc.syscall, ctypes.c_long
call.restype = signed
parent, stdin = os.getppid(), os.dup(0)
def raw(number, *arguments):
    ctypes.set_errno(0)
    return ctypes.get_errno() if call(signed(number), *arguments) == -1 else 0
def python(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
    return 0
if os.geteuid() == 0:
    privileges.drop(privileges.own_user("/test", "hostile"), mask=privileges.NET_ADMIN)
privileges.limit()
denied = []
seccomp.load(loading)
if phase != "loading":
    privileges.start_no_more()
    seccomp.load(serving)
if phase == "told":
    attempts.refuse(denied.append)
number = eval(action)
os.write(1, json.dumps([number, denied]).encode())
os._exit(0)
"""


def attempt(phase: str, action: str, program: str = _PROGRAM) -> tuple[int, list[str], int]:
    """The errno of an action, what was told of it, and how the process ended."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, phase, action, str(ROOT)],
        input=f"{filters.loading().hex()}\n{filters.serving().hex()}",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        return -1, [], done.returncode
    assert not done.stderr
    number, denied = json.loads(done.stdout)
    return number, denied, done.returncode


_IN_PYTHON = {
    "read a file": "python(open, '/etc/passwd')",
    "write a file": "python(open, '/tmp/hostile', 'w')",
    "list a directory": "python(os.listdir, '/')",
    "remove a file": "python(os.unlink, '/tmp/hostile')",
    "open a socket": "python(socket.socket, socket.AF_INET, socket.SOCK_STREAM)",
    "open a netlink socket": "python(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, 12)",
    "execute": "python(os.execv, '/bin/true', ['true'])",
    "start a process": "python(subprocess.run, ['/bin/true'])",
    "fork": "python(os.fork)",
    "kill a process": "python(os.kill, parent, 9)",
    "become root": "python(os.setuid, 0)",
    "load a library": "python(ctypes.CDLL, 'libm.so.6')",
    "import a module": "python(__import__, 'http')",
}

_TOLD_ELSEWHERE = {"become root"}  # Python has no event for it; the kernel refuses it all the same

# Numbers of x86-64, as nobody who is hostile needs a library for them.
_PAST_PYTHON = {
    "open": ("raw(2, b'/etc/passwd', 0)", errno.EPERM),
    "openat": ("raw(257, -100, b'/etc/passwd', 0)", errno.EPERM),
    "openat2": ("raw(437, -100, b'/etc/passwd', ctypes.c_char_p(bytes(24)), 24)", errno.EPERM),
    "own memory": ("raw(257, -100, b'/proc/self/mem', 2)", errno.EPERM),
    "socket": ("raw(41, 2, 1, 0)", errno.EPERM),
    "connect": ("raw(42, stdin, ctypes.c_char_p(bytes(16)), 16)", errno.EPERM),
    "bind": ("raw(49, stdin, ctypes.c_char_p(bytes(16)), 16)", errno.EPERM),
    "fork": ("raw(57)", errno.EPERM),
    "vfork": ("raw(58)", errno.EPERM),
    "clone": ("raw(56, 17, 0, 0, 0, 0)", errno.EPERM),
    "a thread": ("raw(56, 0x10900, 0, 0, 0, 0)", errno.EPERM),
    "clone3": ("raw(435, ctypes.c_char_p(bytes(64)), 64)", errno.EPERM),
    "kill": ("raw(62, parent, 9)", errno.EPERM),
    "tgkill": ("raw(234, parent, parent, 9)", errno.EPERM),
    "pidfd_open": ("raw(434, parent, 0)", errno.EPERM),
    "setuid": ("raw(105, 0)", errno.EPERM),
    "setresuid": ("raw(117, 0, 0, 0)", errno.EPERM),
    "capset": ("raw(126, 0, 0)", errno.EPERM),
    "prctl": ("raw(157, 23, 0)", errno.EPERM),
    "prlimit": ("raw(302, 0, 9, 0, 0)", errno.EPERM),
    "mount": ("raw(165, b'none', b'/tmp', b'tmpfs', 0, 0)", errno.EPERM),
    "chroot": ("raw(161, b'/')", errno.EPERM),
    "unshare": ("raw(272, 0x10000000)", errno.EPERM),
    "setns": ("raw(308, 0, 0)", errno.EPERM),
    "bpf": ("raw(321, 0, 0, 0)", errno.EPERM),
    "io_uring_setup": ("raw(425, 1, 0)", errno.EPERM),
    "perf_event_open": ("raw(298, 0, 0, -1, -1, 0)", errno.EPERM),
    "userfaultfd": ("raw(323, 0)", errno.EPERM),
    "keyctl": ("raw(250, 0, 0)", errno.EPERM),
    "memfd_create": ("raw(319, b'x', 0)", errno.EPERM),
    "ioctl": ("raw(16, stdin, 0x5412, 0)", errno.EPERM),
    "seccomp": ("raw(317, 1, 0, 0)", errno.EPERM),
    "memory that runs": ("raw(9, 0, 4096, 7, 0x22, -1, 0)", errno.EPERM),
    "memory made to run": ("raw(10, 0, 4096, 5)", errno.EPERM),
}

_FATAL = {
    "execve": "raw(59, b'/bin/true', 0, 0)",
    "execveat": "raw(322, -100, b'/bin/true', 0, 0, 0)",
    "ptrace": "raw(101, 16, parent, 0, 0)",
    "process_vm_readv": "raw(310, parent, 0, 0, 0, 0, 0)",
    "process_vm_writev": "raw(311, parent, 0, 0, 0, 0, 0)",
    "pidfd_getfd": "raw(438, 0, 0, 0)",
    "32-bit or x32 numbers": "raw(0x40000000 | 39)",
}

x86_64 = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="the numbers of the system calls are those of x86-64"
)


@needs_root
@pytest.mark.parametrize("name", _IN_PYTHON)
def test_python_refuses_it_and_it_is_told(name: str) -> None:
    number, denied, _ = attempt("told", _IN_PYTHON[name])
    assert number == errno.EPERM
    assert bool(denied) is (name not in _TOLD_ELSEWHERE)


@needs_root
@x86_64
@pytest.mark.parametrize("name", _PAST_PYTHON)
def test_the_kernel_refuses_it(name: str) -> None:
    action, wanted = _PAST_PYTHON[name]
    assert attempt("serving", action) == (wanted, [], 0)


@needs_root
@x86_64
@pytest.mark.parametrize("name", _FATAL)
def test_the_kernel_kills_who_tries(name: str) -> None:
    assert attempt("serving", _FATAL[name]) == (-1, [], -signal.SIGSYS)


@needs_root
@pytest.mark.parametrize(
    "action, wanted",
    [
        ("python(open, '/etc/passwd')", 0),
        ("python(os.listdir, '/usr')", 0),
        ("python(__import__, 'sqlite3')", 0),
        ("python(threading.Thread(target=int).start)", 0),
        ("python(open, '/etc/shadow')", errno.EACCES),
        ("python(open, '/tmp/hostile', 'w')", errno.EPERM),
        ("python(open, '/dev/null', 'a')", errno.EPERM),
        ("python(os.unlink, '/tmp/hostile')", errno.EPERM),
        ("python(socket.socket, socket.AF_UNIX)", errno.EPERM),
        ("python(os.fork)", errno.EPERM),
        ("python(os.execv, '/bin/true', ['true'])", errno.EPERM),
        ("python(os.kill, parent, 9)", errno.EPERM),
        ("python(os.setuid, 0)", errno.EPERM),
    ],
)
def test_while_it_is_loaded_files_are_read_and_nothing_is_changed(action: str, wanted: int) -> None:
    assert attempt("loading", action)[0] == wanted


@needs_root
def test_a_thread_that_was_there_before_is_held_too() -> None:
    program = _PROGRAM.replace(
        "seccomp.load(loading)\n",
        "seccomp.load(loading)\n"
        "begun, seen = threading.Event(), []\n"
        "def wait():\n"
        "    begun.wait()\n"
        "    seen.append(python(open, '/etc/passwd'))\n"
        "thread = threading.Thread(target=wait)\n"
        "thread.start()\n",
    )
    assert attempt("serving", "begun.set() or thread.join() or seen[0]", program) == (errno.EPERM, [], 0)


@needs_root
@pytest.mark.parametrize(
    "raises",
    [
        "type('Own', (), {'__del__': lambda self: json.loads('x')})()",
        "try:\n    json.loads('x')\nexcept ValueError:\n"
        "    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), None)))",
    ],
    ids=["while it is deleted", "in a thread of its own"],
)
def test_that_an_exception_is_shown_is_no_attempt(raises: str) -> None:
    """The interpreter would read the source of what raised it."""
    show = f"import io\nsys.stderr = shown = io.StringIO()\n{raises}\nnumber = 'JSONDecodeError' in shown.getvalue()\n"
    program = _PROGRAM.replace("number = eval(action)\n", show)
    assert attempt("told", "", program) == (True, [], 0)


@needs_root
def test_a_process_that_hangs_can_end_itself() -> None:
    assert attempt("serving", "os.abort()")[2] == -signal.SIGABRT


@needs_root
@pytest.mark.parametrize(
    "action", ["bytearray(256 << 20)", "__import__('mmap').mmap(-1, 256 << 20)"], ids=["of its own", "shared"]
)
def test_memory_has_an_end(action: str) -> None:
    caught = f"try:\n    {action}\n    number = 0\nexcept (MemoryError, OSError):\n    number = {errno.ENOMEM}\n"
    program = _PROGRAM.replace("import ctypes, errno", "import mmap, ctypes, errno").replace(
        "number = eval(action)\n", caught
    )
    assert attempt("serving", "", program) == (errno.ENOMEM, [], 0)


def test_a_filter_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A supervisor may start another process at the same time: whoever opens the file has all of one filter."""
    filters.write(tmp_path)
    for name in (seccomp.LOADING_FILTER, seccomp.SERVING_FILTER):
        before = (tmp_path / name).stat().st_ino
        with (tmp_path / name).open("rb") as opened:
            filters.write(tmp_path)
            assert (tmp_path / name).stat().st_ino != before
            assert opened.read() == (tmp_path / name).read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {seccomp.LOADING_FILTER, seccomp.SERVING_FILTER}


def test_what_is_no_filter_is_refused() -> None:
    for program in (b"", bytes(4), bytes(11), bytes(4 + 8 * 4097)):
        with pytest.raises(seccomp.FilterError, match="not a filter"):
            seccomp.load(program)


def test_without_libseccomp_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes.util, "find_library", lambda _name: None)
    monkeypatch.delitem(sys.modules, "pyseccomp", raising=False)
    monkeypatch.setitem(sys.modules, "seccomp", None)
    filters.loading.cache_clear()
    with pytest.raises(PreflightError, match="Unable to find libseccomp") as caught:
        filters.loading()
    assert caught.value.hint == "install libseccomp2"
