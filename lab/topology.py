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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    return run("ip", "netns", "exec", netns, *argv, text=text, check=check)


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """The three namespaces, linked and routed, without filter, servers or helpers."""
    made: list[str] = []
    try:
        for name in (CLIENT, ROUTER, SERVER):
            run("ip", "netns", "add", name)
            made.append(name)
            inside(name, "ip", "link", "set", "lo", "up")
            # The ports that tests name are below: no connection takes one of those for its source.
            inside(name, "sysctl", "-qw", "net.ipv4.ip_local_port_range=52000 60999")
        _link(CLIENT, "10.66.1.2/24", "fd66:1::2/64", ROUTER, "lan0", "10.66.1.1/24", "fd66:1::1/64")
        _link(SERVER, "10.66.2.2/24", "fd66:2::2/64", ROUTER, "wan0", "10.66.2.1/24", "fd66:2::1/64")
        for address in ("10.66.1.101/32", "fd66:1::101/128"):
            inside(ROUTER, "ip", "address", "add", address, "dev", "lan0")
        for address in ("10.66.2.101/32", "fd66:2::101/128"):
            inside(ROUTER, "ip", "address", "add", address, "dev", "wan0")
        for key in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            inside(ROUTER, "sysctl", "-qw", f"{key}=1")
        for name, via, via6 in ((CLIENT, "10.66.1.1", "fd66:1::1"), (SERVER, "10.66.2.1", "fd66:2::1")):
            inside(name, "ip", "route", "add", "default", "via", via)
            inside(name, "ip", "-6", "route", "add", "default", "via", via6)
        yield
    finally:
        for name in made:
            run("ip", "netns", "del", name, check=False)


def _link(host: str, ip: str, ip6: str, router: str, interface: str, router_ip: str, router_ip6: str) -> None:
    run("ip", "link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", interface, "netns", router)
    for netns, name, address, address6 in ((host, "eth0", ip, ip6), (router, interface, router_ip, router_ip6)):
        inside(netns, "ip", "address", "add", address, "dev", name)
        inside(netns, "ip", "address", "add", address6, "dev", name, "nodad")
        inside(netns, "ip", "link", "set", name, "up")


# What iptables-nft leaves of a table that it made: base chains without a rule.
_EMPTY_BUILTIN_TABLE = re.compile(r"table ip6? raw \{\n(?:\tchain \w+ \{\n\t\ttype [^\n]*\n\t\}\n\n?)*\}\n")


def ruleset(netns: str) -> str:
    """The nft ruleset of a namespace, without the empty tables of iptables: those are nothing."""
    return _EMPTY_BUILTIN_TABLE.sub("", inside(netns, "nft", "list", "ruleset").stdout)


def load_filter(netns: str, ruleset: str) -> None:
    inside(netns, "nft", "-f", "-", text=ruleset)


@dataclass(frozen=True, slots=True)
class Servers:
    """What the server offers: a file under the same name by FTP and by TFTP."""

    directory: Path


@contextlib.contextmanager
def servers(netns: str = SERVER) -> Iterator[Servers]:
    """vsftpd and tftpd-hpa, both families, in the foreground and out of everybody's way."""
    with tempfile.TemporaryDirectory(prefix="orch-servers-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        public, empty = directory / "public", directory / "empty"
        for path in (public, public / "incoming", empty):
            path.mkdir()
        (public / "incoming").chmod(0o777)
        (public / "file").write_text(CONTENT)
        config = directory / "vsftpd.conf"
        config.write_text(vsftpd_config(public, empty))
        stack.enter_context(daemon(netns, "vsftpd", str(config)))
        tftpd = ("in.tftpd", "-L", "-c", "-u", "nobody", "-a", ":69", "-s", str(public))
        stack.enter_context(daemon(netns, *tftpd))
        wait_listening(netns, "tcp6", 21)
        wait_listening(netns, "udp6", 69)
        yield Servers(public)


def vsftpd_config(public: Path, empty: Path) -> str:
    """Anonymous access to a directory, without a user of its own and without a sandbox that new kernels break."""
    return "\n".join(
        (
            "listen=NO",
            "listen_ipv6=YES",
            "background=NO",
            "anonymous_enable=YES",
            "no_anon_password=YES",
            "ftp_username=daemon",  # vsftpd wants a home that exists before it goes to anon_root
            "nopriv_user=nobody",
            f"anon_root={public}",
            f"secure_chroot_dir={empty}",
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
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline:
        rows = inside(netns, "cat", f"/proc/net/{table}").stdout.splitlines()[1:]
        if any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == state for row in rows):
            return
        time.sleep(_POLL_S)
    raise RuntimeError(f"nobody listens on {table} port {port} in {netns} after {_READY_WITHIN_S:g} s")


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
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline:
        rows = (row.split() for row in inside(netns, "cat", "/proc/net/netlink").stdout.splitlines()[1:])
        if any(row[1] == "12" and int(row[3], 16) & 0b111000 for row in rows):
            return
        time.sleep(_POLL_S)
    raise RuntimeError("conntrack -E expect does not listen")
