"""Download the kernels and the sysroot of the lab with a private apt; nothing is installed, no host setting changes."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.layout import CACHE, PROMTOOL, SYSROOT, SYSROOT_PACKAGES_FILE, Kernel, LabError

DEBIAN = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

# What demo and tests run, unpacked even if the host has it: the host may lose it again. Some are servers, and no
# package script ever starts them here. busybox-static is for the initramfs that virtme-ng builds.
SYSROOT_PACKAGES = (
    "atftp",
    "busybox-static",
    "conntrack",
    "conntrackd",
    "firewalld",
    "iptables",
    "iptables-persistent",
    "lftp",
    "libip6tc2",
    "libnetfilter-conntrack3",
    "libnetfilter-cthelper0",
    "libnetfilter-queue1",
    "libnetfilter-cttimeout1",
    "libnfnetlink0",
    "libnftables1",
    "libnftnl11",
    "libpcap0.8",
    "libwrap0",
    "lowdown",
    "ncftp",
    "netfilter-persistent",
    "nfct",
    "nftables",
    "python3-pyftpdlib",
    "tcpdump",
    "tftp-hpa",
    "tftpd-hpa",
    "tnftp",
    "vsftpd",
    "wget",
)
# Servers that refuse to be installed beside one of the above; unpacked they have no file in common.
SYSROOT_RIVALS = ("atftpd", "proftpd-core")
# Common tools, unpacked with what they need only if the host has none.
SYSROOT_PACKAGES_IF_MISSING = ("curl", "iproute2", "kmod", "openssl", "procps", "systemd")

# Debian's kernels were one package until 7.x and are several since; these parts make up what we boot.
KERNEL_PART = re.compile(r"linux-(image|binary|modules|base)-\d")

# The names that update-alternatives would make in the postinst of the package iptables, which never runs here.
IPTABLES_NAMES = tuple(
    f"{family}{action}" for family in ("iptables", "ip6tables") for action in ("", "-save", "-restore")
)


@dataclass(frozen=True, slots=True)
class Suite:
    """One line of a sources.list."""

    uri: str
    name: str


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Where a kernel comes from: a metapackage, which names the newest image, and the suites to look in."""

    metapackage: str
    suites: tuple[Suite, ...]


def release_suites(codename: str) -> tuple[Suite, ...]:
    return (Suite(DEBIAN, codename), Suite(SECURITY, f"{codename}-security"))


KERNEL_SOURCES = {
    Kernel.V6_1: KernelSource("linux-image-amd64", release_suites("bookworm")),
    Kernel.V6_12: KernelSource("linux-image-6.12-amd64", release_suites("bookworm")),
    Kernel.BACKPORTS: KernelSource("linux-image-amd64", (Suite(DEBIAN, "trixie-backports"),)),
}


class PrivateApt:
    """An apt with its own state, cache and sources. Proxy and certificate settings of the host still apply."""

    def __init__(self, name: str, suites: Iterable[Suite], *, dpkg_status: str = "") -> None:
        self._base = CACHE / "apt" / name
        for directory in ("state/lists/partial", "cache/archives/partial"):
            (self._base / directory).mkdir(parents=True, exist_ok=True)
        status = self._base / "status"
        status.write_text(dpkg_status)
        sources = self._base / "sources.list"
        sources.write_text("".join(f"deb [signed-by={KEYRING}] {s.uri} {s.name} main\n" for s in suites))
        self._config = self._base / "apt.conf"
        # A file given with -c is read after the host's settings; the hooks that it clears would refresh host caches.
        self._config.write_text(
            "#clear APT::Update::Post-Invoke;\n"
            "#clear APT::Update::Post-Invoke-Success;\n"
            f'Dir::State "{self._base}/state";\n'
            f'Dir::State::status "{status}";\n'
            f'Dir::Cache "{self._base}/cache";\n'
            f'Dir::Cache::archives "{self.archives}";\n'
            f'Dir::Etc::sourcelist "{sources}";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            'Acquire::Languages "none";\n'
            'APT::Sandbox::User "root";\n'
            'APT::Get::List-Cleanup "true";\n'
        )

    @property
    def archives(self) -> Path:
        return self._base / "cache" / "archives"

    def update(self) -> None:
        self._run(["apt-get", "-qq", "update"])

    def kernel_parts(self, metapackage: str) -> list[str]:
        """Every package that the metapackage needs to boot and to load modules, the metapackage not included."""
        found: list[str] = []
        waiting = [metapackage]
        while waiting:
            for package in self._depends(waiting.pop()):
                if KERNEL_PART.match(package) and package not in found:
                    found.append(package)
                    waiting.append(package)
        if not found:
            raise LabError(f"{metapackage} names no kernel image: has Debian renamed its kernel packages?")
        return sorted(found)

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download exactly these packages, hashes checked by apt, into the archives directory."""
        self._clear_archives()
        self._run(["apt-get", "-qq", "download", *packages], cwd=self.archives)
        return self._debs()

    def download_missing(self, *groups: Sequence[str]) -> list[Path]:
        """Download what installing each group would add to the recorded dpkg status, and nothing it has."""
        self._clear_archives()
        choices = ("--download-only", "--fix-broken", "--no-install-recommends", "--no-upgrade")
        for packages in groups:
            self._run(["apt-get", "-qq", "-y", "install", *choices, *packages])
        return self._debs()

    def _depends(self, package: str) -> list[str]:
        listing = self._run(["apt-cache", "depends", "--important", package])
        return re.findall(r"(?:Pre)?Depends: ([^<\s]+)", listing)

    def _clear_archives(self) -> None:
        for deb in self.archives.glob("*.deb"):
            deb.unlink()

    def _debs(self) -> list[Path]:
        return sorted(self.archives.glob("*.deb"))

    def _run(self, argv: Sequence[str], *, cwd: Path | None = None) -> str:
        tool, *arguments = argv
        return run([tool, "-c", str(self._config), *arguments], cwd=cwd)


def run(argv: Sequence[str], *, cwd: Path | None = None) -> str:
    """Run a tool to its end and return its output; raise LabError with its messages if it fails."""
    environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(argv, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"{argv[0]} failed with code {done.returncode}: {' '.join(argv)}\n{done.stderr.strip()}")
    return done.stdout


def fetch_kernel(kernel: Kernel) -> None:
    if kernel.is_fetched:
        say(f"kernel {kernel}: {kernel.version} is here already")
        return
    source = KERNEL_SOURCES[kernel]
    apt = PrivateApt(f"kernel-{kernel}", source.suites)
    apt.update()
    parts = apt.kernel_parts(source.metapackage)
    debs = apt.download(parts)
    replace_directory(kernel.directory, lambda target: unpack_kernel(debs, target))
    shutil.rmtree(apt.archives)
    say(f"kernel {kernel}: {kernel.version} unpacked into {kernel.directory}")


def unpack_kernel(debs: Iterable[Path], target: Path) -> None:
    unpack(debs, target)
    # Modules lived in /lib until 6.x and live in /usr/lib since; kmod and virtme-ng look for lib/modules.
    if not (target / "lib").exists():
        (target / "lib").symlink_to("usr/lib")
    versions = [path.name for path in (target / "lib/modules").iterdir()]
    if len(versions) != 1:
        raise LabError(f"expected the modules of one kernel, found {versions}")
    run(["depmod", "-b", str(target), versions[0]])
    (target / "version").write_text(versions[0] + "\n")


def fetch_sysroot() -> None:
    here, wanted = sysroot_packages(), (*SYSROOT_PACKAGES, *SYSROOT_RIVALS)
    if here.issuperset(wanted):
        say(f"sysroot: {len(here)} packages are here already")
        return
    # The host's own release, because programs and libraries of the two trees are mixed.
    apt = PrivateApt("sysroot", release_suites(host_codename()), dpkg_status=host_status_without(wanted))
    apt.update()
    debs = apt.download_missing([*SYSROOT_PACKAGES, *SYSROOT_PACKAGES_IF_MISSING], SYSROOT_RIVALS)
    replace_directory(SYSROOT, lambda target: unpack_sysroot(debs, target))
    shutil.rmtree(apt.archives)
    say(f"sysroot: {len(debs)} packages unpacked into {SYSROOT}")


def fetch_promtool() -> None:
    """promtool alone out of Debian's prometheus: the server, what it needs and what it starts are of no use here."""
    if PROMTOOL.exists():
        say(f"{PROMTOOL.name}: it is here already")
        return
    apt = PrivateApt("promtool", release_suites(host_codename()))
    apt.update()
    (deb,) = apt.download(["prometheus"])
    replace_directory(PROMTOOL.parent, lambda target: unpack_program(deb, "usr/bin/promtool", target))
    shutil.rmtree(apt.archives)
    say(f"{PROMTOOL.name}: unpacked into {PROMTOOL.parent}")


def unpack_program(deb: Path, program: str, target: Path) -> None:
    """One file of a package, without its directories."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        unpack([deb], Path(name))
        Path(name, program).rename(target / Path(program).name)


def sysroot_packages() -> set[str]:
    """Names of the packages in the sysroot; empty if there is none."""
    if not SYSROOT_PACKAGES_FILE.exists():
        return set()
    return {line.partition(" ")[0] for line in SYSROOT_PACKAGES_FILE.read_text().splitlines()}


def unpack_sysroot(debs: Sequence[Path], target: Path) -> None:
    unpack(debs, target)
    merge_usr(target)
    link_iptables(target / "usr/sbin")
    for directory in ("usr", "etc"):
        (target / directory).mkdir(exist_ok=True)
    # Mount point for the modules of a guest: a host without a kernel of its own has no such directory.
    (target / "usr/lib/modules").mkdir(parents=True, exist_ok=True)
    names = (run(["dpkg-deb", "--show", str(deb)]).strip().replace("\t", " ") for deb in debs)
    marker = target / SYSROOT_PACKAGES_FILE.relative_to(SYSROOT)
    marker.parent.mkdir(parents=True)
    marker.write_text("".join(f"{name}\n" for name in names))


def merge_usr(target: Path) -> None:
    """Move bin, sbin and lib below usr, where a merged-/usr host has them, so that one overlay shows everything."""
    for name in ("bin", "sbin", "lib", "lib64"):
        split = target / name
        if split.is_dir() and not split.is_symlink():
            shutil.copytree(split, target / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(split)


def link_iptables(sbin: Path) -> None:
    """Point iptables and its kin at the nft backend, the Debian default; the -legacy names come with the package."""
    for name in IPTABLES_NAMES:
        backend = name.replace("tables", "tables-nft", 1)
        if (sbin / backend).is_symlink() and not (sbin / name).is_symlink():
            (sbin / name).symlink_to(backend)


def unpack(debs: Iterable[Path], target: Path) -> None:
    for deb in debs:
        run(["dpkg-deb", "--extract", str(deb), str(target)])


def replace_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new directory and rename it to `target`, so that an interrupted fetch never looks complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        partial.chmod(0o755)
        fill(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def host_status_without(packages: Iterable[str]) -> str:
    """What dpkg has installed on the host, as if `packages` were not, so that apt offers them again."""
    absent = {f"Package: {package}" for package in packages}
    paragraphs = Path("/var/lib/dpkg/status").read_text(errors="replace").split("\n\n")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph.partition("\n")[0] not in absent)


def host_codename() -> str:
    match = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not match:
        raise LabError("/etc/os-release names no Debian release; the lab needs a Debian host")
    return match.group(1)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.fetch", description=__doc__)
    parser.add_argument("what", choices=("kernels", "sysroot", "promtool", "all"))
    what = parser.parse_args().what
    try:
        if what in ("sysroot", "all"):
            fetch_sysroot()
        if what in ("promtool", "all"):
            fetch_promtool()
        if what in ("kernels", "all"):
            for kernel in Kernel:
                fetch_kernel(kernel)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
