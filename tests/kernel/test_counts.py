"""Connections and expectations of a real FTP session with the in-kernel helper, through both sources."""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path

import pytest

from orchestrator.kernel import conntrack, netns
from orchestrator.kernel.modules import KernelModules
from orchestrator.kernel.procfs import parse_expectations

pytestmark = pytest.mark.kernel

RULES = """
table inet t {
    ct helper ftp { type "ftp" protocol tcp; }
    chain output { type filter hook output priority -150; tcp dport 21 ct helper set "ftp"; }
}
"""


def announce(client: socket.socket, server: socket.socket) -> None:
    """An active FTP client names port 51210; the helper reads commands only after it saw the end of a line."""
    for line in (b"USER a\r\n", b"PORT 127,0,0,1,200,10\r\n"):
        client.sendall(line)
        assert server.recv(100) == line


def elsewhere() -> tuple[dict[str, int], dict[str, int]]:
    """What another namespace has, asked from a thread of its own."""
    seen: list[tuple[dict[str, int], dict[str, int]]] = []

    def look() -> None:
        with netns.scratch():
            seen.append((conntrack.connections(netns.own()), conntrack.expectations(netns.own())))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen[0]


def test_an_expectation_is_counted_in_its_namespace_only() -> None:
    for module in ("nf_conntrack_ftp", "nf_conntrack_netlink"):
        KernelModules().load(module)
    with netns.scratch():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)
        with socket.create_server(("127.0.0.1", 21)) as listener, socket.create_connection(("127.0.0.1", 21)) as client:
            server, _ = listener.accept()
            with server:
                announce(client, server)
                assert conntrack.connections(netns.own()) == {"ftp": 1}
                assert conntrack.expectations(netns.own()) == {"ftp": 1}
                text = Path("/proc/thread-self/net/nf_conntrack_expect").read_text()
                assert parse_expectations(text) == {"ftp": 1}, text
                assert elsewhere() == ({}, {})
