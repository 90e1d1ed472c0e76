"""Real FTP and TFTP software for the topology: how each server is started, and how each client is told what to do.

vsftpd (port 21) and tftpd-hpa (69) come with `lab.topology.servers`; these run beside them, in the same namespace.
"""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.topology import (
    CLIENT,
    CONTENT,
    SERVER,
    daemon,
    inside,
    offered,
    run,
    vsftpd_config,
    wait_listening,
)
from orchestrator.kernel.netns import entered, find

FTP_SERVERS = {"vsftpd": 21, "pyftpdlib": 2121, "proftpd": 2122}
TFTP_SERVERS = {"tftpd-hpa": 69, "atftpd": 1069}
TFTP_SERVERS_IP6 = ("tftpd-hpa",)  # atftpd 0.8 listens to IPv4, even where it is given another address
TLS_PORT, TLS_DATA_PORTS = 2123, "30000-30009"
"""Where vsftpd speaks TLS, and where it waits for data connections that nobody on the way can see announced."""

_WITHIN_S = 30
_ETH_P_ALL = 3

Argv = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FtpClient:
    """How to have the file printed, by mode; {url} is where it is. A mode that is missing it cannot be told."""

    ip: dict[str, Argv]
    ip6: dict[str, Argv] = field(default_factory=dict)

    def modes(self, *, ip6: bool) -> dict[str, Argv]:
        return self.ip6 if ip6 else self.ip


_CURL = ("curl", "--silent", "--show-error", "{url}")
_CURL_EXTENDED = {"EPSV": _CURL, "EPRT": (*_CURL, "--ftp-port", "-")}
_WGET = ("wget", "--quiet", "--tries=1", "--output-document=-", "{url}")
_LFTP = "set net:max-retries 1; set cmd:fail-exit yes;"
_LFTP_PASSIVE = ("lftp", "-c", f"{_LFTP} cat {{url}}")
_LFTP_ACTIVE = ("lftp", "-c", f"{_LFTP} set ftp:passive-mode off; cat {{url}}")
_TNFTP = ("tnftp", "-V", "-o", "-", "{url}")
_TNFTP_ACTIVE = ("tnftp", "-V", "-A", "-o", "-", "{url}")

FTP_CLIENTS = {
    "curl": FtpClient(
        ip={
            "PASV": (*_CURL, "--disable-epsv"),
            "PORT": (*_CURL, "--ftp-port", "-", "--disable-eprt"),
            **_CURL_EXTENDED,
        },
        ip6=_CURL_EXTENDED,
    ),
    "lftp": FtpClient(
        ip={
            "PASV": _LFTP_PASSIVE,
            "PORT": _LFTP_ACTIVE,
            "EPSV": ("lftp", "-c", f"{_LFTP} set ftp:prefer-epsv yes; cat {{url}}"),
        },
        ip6={"EPSV": _LFTP_PASSIVE, "EPRT": _LFTP_ACTIVE},
    ),
    "wget": FtpClient(
        ip={"PASV": _WGET, "PORT": (*_WGET, "--no-passive-ftp")},
        ip6={"EPSV": _WGET, "EPRT": (*_WGET, "--no-passive-ftp")},
    ),
    "ncftp": FtpClient(ip={"PASV": ("ncftpget", "-V", "-c", "{url}"), "PORT": ("ncftpget", "-V", "-E", "-c", "{url}")}),
    "tnftp": FtpClient(
        ip={"EPSV": _TNFTP, "EPRT": _TNFTP_ACTIVE},
        ip6={"EPSV": _TNFTP, "EPRT": _TNFTP_ACTIVE},
    ),
}
TLS_CLIENTS: dict[str, Argv] = {
    "curl": (*_CURL, "--ssl-reqd", "--insecure"),
    "lftp": (
        "lftp",
        "-c",
        f"{_LFTP} set ftp:ssl-allow-anonymous yes; set ftp:ssl-force yes; set ssl:verify-certificate no; cat {{url}}",
    ),
}


@dataclass(frozen=True, slots=True)
class TftpClient:
    """How to send the file {local} to {host} {port} as {remote}, and how to fetch it from there into {local}."""

    put: Argv
    get: Argv


TFTP_CLIENTS = {
    "curl": TftpClient(
        put=("curl", "--silent", "--show-error", "--upload-file", "{local}", "tftp://{url_host}:{port}/{remote}"),
        get=("curl", "--silent", "--show-error", "--output", "{local}", "tftp://{url_host}:{port}/{remote}"),
    ),
    "tftp-hpa": TftpClient(
        put=("tftp", "-m", "binary", "{host}", "{port}", "-c", "put", "{local}", "{remote}"),
        get=("tftp", "-m", "binary", "{host}", "{port}", "-c", "get", "{remote}", "{local}"),
    ),
    "atftp": TftpClient(
        put=("atftp", "--put", "--local-file", "{local}", "--remote-file", "{remote}", "{host}", "{port}"),
        get=("atftp", "--get", "--remote-file", "{remote}", "--local-file", "{local}", "{host}", "{port}"),
    ),
}


def fetch(argv: Argv, host: str, port: int) -> str:
    """Have a client print the file; what it says instead where it does not."""
    return _run(word.format(url=f"ftp://{url_host(host)}:{port}/file") for word in argv)


def exchange(client: TftpClient, host: str, port: int) -> str:
    """Have a TFTP client write the file to the server and read it back; returns what came back."""
    with tempfile.TemporaryDirectory(prefix="orch-tftp-") as name:
        sent, received = Path(name, "sent"), Path(name, "received")
        sent.write_text(CONTENT)
        for argv, local in ((client.put, sent), (client.get, received)):
            words = {"local": local, "remote": "incoming/file", "host": host, "url_host": url_host(host), "port": port}
            _run(word.format(**words) for word in argv)
        return received.read_text()


def _run(argv: Iterable[str]) -> str:
    # Some clients ask a name server who they are; there is none, and five seconds is a long time to find out.
    return inside(CLIENT, "env", "RES_OPTIONS=timeout:1 attempts:1", "timeout", str(_WITHIN_S), *argv).stdout


def url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def more_servers() -> Iterator[None]:
    """pyftpdlib, proftpd, a vsftpd that wants TLS, and atftpd, on the server."""
    with offered() as directory, contextlib.ExitStack() as stack:
        public = directory / "public"
        for argv in (_pyftpdlib(public), _proftpd(directory, public), _vsftpd_with_tls(directory), _atftpd(public)):
            stack.enter_context(daemon(SERVER, *argv))
        for port in (*FTP_SERVERS.values(), TLS_PORT):
            wait_listening(SERVER, "tcp6", port)
        wait_listening(SERVER, "udp", TFTP_SERVERS["atftpd"])
        yield


def _pyftpdlib(public: Path) -> Argv:
    # The host's own interpreter sees the sysroot's packages, that of a virtual environment does not.
    return ("/usr/bin/python3", "-m", "pyftpdlib", "-i", "::", "-p", str(FTP_SERVERS["pyftpdlib"]), "-d", str(public))


def _proftpd(directory: Path, public: Path) -> Argv:
    config = directory / "proftpd.conf"
    config.write_text(
        f"""
        ServerType standalone
        ServerName lab
        DefaultAddress ::
        DefaultServer on
        UseIPv6 on
        Port {FTP_SERVERS["proftpd"]}
        User nobody
        Group nogroup
        AuthOrder mod_auth_unix.c
        UseFtpUsers off
        UseReverseDNS off
        WtmpLog off
        TransferLog none
        SystemLog none
        ScoreboardFile {directory}/scoreboard
        PidFile {directory}/proftpd.pid
        <Anonymous {public}>
            User daemon
            Group daemon
            UserAlias anonymous daemon
            RequireValidShell off
        </Anonymous>
        """
    )
    return ("proftpd", "--nodaemon", "--quiet", "--config", str(config))


def _vsftpd_with_tls(directory: Path) -> Argv:
    key, certificate, config = (directory / name for name in ("key.pem", "certificate.pem", "vsftpd-tls.conf"))
    subject = ("-subj", "/CN=lab", "-days", "2")
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", str(key))
    run("openssl", "req", "-x509", *new_key, *subject, "-out", str(certificate))
    first, _, last = TLS_DATA_PORTS.partition("-")
    config.write_text(
        vsftpd_config(directory)
        + "\n".join(
            (
                f"listen_port={TLS_PORT}",
                f"pasv_min_port={first}",
                f"pasv_max_port={last}",
                "ssl_enable=YES",
                "allow_anon_ssl=YES",
                "force_anon_logins_ssl=YES",
                "force_anon_data_ssl=YES",
                "require_ssl_reuse=NO",
                "ssl_ciphers=HIGH",
                f"rsa_cert_file={certificate}",
                f"rsa_private_key_file={key}",
                "",
            )
        )
    )
    return ("vsftpd", str(config))


def _atftpd(public: Path) -> Argv:
    port = str(TFTP_SERVERS["atftpd"])
    return ("atftpd", "--daemon", "--no-fork", "--user", "nobody.nogroup", "--port", port, str(public))


_ASKED = re.compile(rb"(PORT|EPRT)(?= )|(PASV|EPSV)(?=( 2)?\r\n)")  # wget says "EPSV 2"


def verb(packet: bytes) -> str:
    """The mode that a TCP packet asks for, from its IP header on; empty if it does not begin with such a command."""
    transport = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
    payload = packet[transport + (packet[transport + 12] >> 4) * 4 :] if len(packet) > transport + 12 else b""
    asked = _ASKED.match(payload)
    return asked[0].decode() if asked else ""


class Verbs:
    """The modes that FTP clients asked for since the last look, as the server hears them."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def take(self) -> set[str]:
        found: set[str] = set()
        while True:
            try:
                found.add(verb(self._channel.recv(1 << 16)))
            except BlockingIOError:
                return found - {""}


@contextlib.contextmanager
def verbs_heard() -> Iterator[Verbs]:
    """Listen at the server, so that a client which silently falls back to another mode is found out."""
    with entered(find(SERVER)):
        channel = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    with channel:
        channel.settimeout(0)
        yield Verbs(channel)
