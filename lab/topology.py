"""A client, a router and a server in three network namespaces, with real FTP and TFTP servers; nothing of it stays.

client 10.66.1.2, fd66:1::2  --  10.66.1.1 router 10.66.2.1  --  server 10.66.2.2, fd66:2::2
The router also has the addresses that lab.nat translates to: 10.66.1.101 and 10.66.2.101, fd66:1::101 and fd66:2::101.
"""

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nftables

from orchestrator.kernel.netns import entered, find

CLIENT, ROUTER, SERVER = "orch-client", "orch-router", "orch-server"
CLIENT_IP, CLIENT_IP6 = "10.66.1.2", "fd66:1::2"
SERVER_IP, SERVER_IP6 = "10.66.2.2", "fd66:2::2"
CONTENT = "the transfer works\n"
_READY_WITHIN_S = 30.0
_POLL_S = 0.05

# The filter of a careful router: new connections to the control ports only, and what belongs to them.
ROUTER_FILTER = """
table inet filter {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        ct state new tcp dport { 21, 2121-2123 } accept
        ct state new udp dport { 69, 1069 } accept
    }
}
"""

# The filter of a careful host that opens connections itself: nothing comes in that it did not ask for.
HOST_FILTER = """
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
    chain output {
        type filter hook output priority filter; policy drop;
        ct state established,related accept
        ct state new tcp dport 21 accept
        ct state new udp dport 69 accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
}
"""


def run(*argv: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command; its output is kept. Raises CalledProcessError with what it said on stderr."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def inside(netns: str, *argv: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in one of the namespaces."""
    with entered(find(netns)):  # `ip netns exec` would be one program more, which takes a guest a tenth of a second
        return run(*argv, text=text, check=check)


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """The three namespaces, linked and routed, without filter, servers or helpers."""
    made: list[str] = []
    try:
        for name in (CLIENT, ROUTER, SERVER):
            run("ip", "netns", "add", name)
            made.append(name)
        _ip("link add eth0 netns orch-client type veth peer name lan0 netns orch-router")
        _ip("link add eth0 netns orch-server type veth peer name wan0 netns orch-router")
        for name, lines in _INTERFACES.items():
            with entered(find(name)):
                # The ports that tests name are below: no connection takes one of those for its source.
                Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("52000 60999")
                if name == ROUTER:
                    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
                    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
                _ip(*lines)
        yield
    finally:
        for name in made:
            run("ip", "netns", "del", name, check=False)


_INTERFACES = {
    ROUTER: (
        "link set lo up",
        "link set lan0 up",
        "link set wan0 up",
        "address add 10.66.1.1/24 dev lan0",
        "address add fd66:1::1/64 dev lan0 nodad",
        "address add 10.66.2.1/24 dev wan0",
        "address add fd66:2::1/64 dev wan0 nodad",
        "address add 10.66.1.101/32 dev lan0",
        "address add fd66:1::101/128 dev lan0 nodad",
        "address add 10.66.2.101/32 dev wan0",
        "address add fd66:2::101/128 dev wan0 nodad",
    ),
    **{
        name: (
            "link set lo up",
            "link set eth0 up",
            f"address add 10.66.{number}.2/24 dev eth0",
            f"address add fd66:{number}::2/64 dev eth0 nodad",
            f"route add default via 10.66.{number}.1",
            f"route add default via fd66:{number}::1",
        )
        for number, name in ((1, CLIENT), (2, SERVER))
    },
}


def _ip(*lines: str) -> None:
    """Commands for ip(8), in the namespace of this thread."""
    run("ip", "-batch", "-", text="".join(f"{line}\n" for line in lines))


# What iptables-nft leaves of a table that it made: base chains without a rule.
_EMPTY_BUILTIN_TABLE = re.compile(r"table ip6? raw \{\n(?:\tchain \w+ \{\n\t\ttype [^\n]*\n\t\}\n\n?)*\}\n")


def ruleset(netns: str) -> str:
    """The nft ruleset of a namespace, without the empty tables of iptables: those are nothing."""
    return _EMPTY_BUILTIN_TABLE.sub("", nft(netns, "list ruleset"))


def load_filter(netns: str, ruleset: str) -> None:
    nft(netns, ruleset)


def proc_net(netns: str, table: str) -> list[str]:
    """The lines of a file in /proc/net as a namespace has it, without the first, which names the columns."""
    with entered(find(netns)):
        return Path("/proc/thread-self/net", table).read_text().splitlines()[1:]


def nft(netns: str, commands: str) -> str:
    """What nft(8) says to some commands in a namespace: the library that it is made of. Raises RuntimeError."""
    with entered(find(netns)):
        code, output, error = nftables.Nftables().cmd(commands)
    if code:
        raise RuntimeError(f"nft in {netns}: {error.strip()}")
    return str(output)


@contextlib.contextmanager
def servers() -> Iterator[None]:
    """vsftpd and tftpd-hpa, both families, in the foreground and out of everybody's way: one file, by FTP and TFTP."""
    with offered() as directory, contextlib.ExitStack() as stack:
        public = directory / "public"
        config = directory / "vsftpd.conf"
        config.write_text(vsftpd_config(directory))
        stack.enter_context(daemon(SERVER, "vsftpd", str(config)))
        tftpd = ("in.tftpd", "-L", "-c", "-u", "nobody", "-a", ":69", "-s", str(public))
        stack.enter_context(daemon(SERVER, *tftpd))
        wait_listening(SERVER, "tcp6", 21)
        wait_listening(SERVER, "udp6", 69)
        yield


@contextlib.contextmanager
def offered() -> Iterator[Path]:
    """A directory with what servers offer in `public`, a place for uploads in `public/incoming`, and `empty`."""
    with tempfile.TemporaryDirectory(prefix="orch-servers-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for path in ("public", "public/incoming", "empty"):
            (directory / path).mkdir()
        (directory / "public/incoming").chmod(0o777)
        (directory / "public/file").write_text(CONTENT)
        yield directory


def vsftpd_config(directory: Path) -> str:
    """Anonymous access to what is offered, without a user of its own and without a sandbox that new kernels break."""
    return "\n".join(
        (
            "listen=NO",
            "listen_ipv6=YES",
            "background=NO",
            "anonymous_enable=YES",
            "no_anon_password=YES",
            "ftp_username=daemon",  # vsftpd wants a home that exists before it goes to anon_root
            "nopriv_user=nobody",
            f"anon_root={directory}/public",
            f"secure_chroot_dir={directory}/empty",
            "seccomp_sandbox=NO",  # its filter kills it on new kernels
            "connect_from_port_20=YES",
            "xferlog_enable=NO",
            "",
        )
    )


@contextlib.contextmanager
def daemon(netns: str, *argv: str) -> Iterator[None]:
    """Run a program in a namespace for as long as the block runs."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_listening(netns: str, table: str, port: int) -> None:
    """Wait until somebody listens (tcp) or is bound (udp); 0A is TCP_LISTEN, 07 an unconnected UDP socket."""
    state = "0A" if table.startswith("tcp") else "07"
    _wait_for_row(
        netns,
        table,
        lambda row: row[1].endswith(f":{port:04X}") and row[3] == state,
        f"nobody listens on {table} port {port}",
    )


def _wait_for_row(netns: str, table: str, fits: Callable[[list[str]], bool], otherwise: str) -> None:
    """Wait for a row, by its columns, in a file of /proc/net. Raises RuntimeError with what is so without it."""
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline:
        if any(fits(row.split()) for row in proc_net(netns, table)):
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"{otherwise} in {netns} after {_READY_WITHIN_S:g} s")


def ftp(
    *options: str, address: str = SERVER_IP, netns: str = CLIENT, within_s: int = 8
) -> subprocess.CompletedProcess[str]:
    """Fetch the file by FTP with curl; its exit code tells, 28 is a time-out. Options choose the mode."""
    return inside(
        netns, "curl", "-sS", "--max-time", str(within_s), *options, f"ftp://{_host(address)}/file", check=False
    )


PASSIVE = ("--disable-epsv",)
ACTIVE = ("--ftp-port", "-", "--disable-eprt")
EXTENDED_PASSIVE: Sequence[str] = ()
EXTENDED_ACTIVE = ("--ftp-port", "-")


def tftp(address: str = SERVER_IP, netns: str = CLIENT, within_s: int = 8) -> subprocess.CompletedProcess[str]:
    """Fetch the file by TFTP with curl."""
    return inside(netns, "curl", "-sS", "--max-time", str(within_s), f"tftp://{_host(address)}/file", check=False)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@contextlib.contextmanager
def expectation_events(netns: str) -> Iterator[list[str]]:
    """What `conntrack -E expect` says while the block runs; the list is filled when it ends."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns, "conntrack", "-E", "expect"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "LANG": "C"},
    )
    lines: list[str] = []
    try:
        _wait_subscribed(netns)
        yield lines
    finally:
        process.terminate()
        lines += [line.strip() for line in process.communicate()[0].splitlines()]


def _wait_subscribed(netns: str) -> None:
    """Wait until a netfilter netlink socket of the namespace listens to the groups of expectation events (4, 5, 6)."""
    _wait_for_row(
        netns,
        "netlink",
        lambda row: row[1] == "12" and bool(int(row[3], 16) & 0b111000),
        "conntrack -E expect does not listen",
    )
