"""The main job where everybody can watch it: FTP through a stateful router without a helper, with it, and with NAT.

python3 -m lab.demo [--backend nftables|iptables]; in a virtual machine where this kernel lacks nfnetlink_cthelper.
Everything happens in namespaces of its own and in a state directory of its own; nothing is left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lab import topology
from lab.layout import REPOSITORY, Kernel, LabError
from lab.nat import OUTSIDE_IP, SERVICE_IP, Nat, load_nat
from lab.topology import ACTIVE, EXTENDED_ACTIVE, EXTENDED_PASSIVE, PASSIVE, ROUTER
from lab.vm import boot

PROFILE = REPOSITORY / "profiles/ftp.yaml"

# Command lines of everything that orch starts and leaves running.
PROCESSES = "conntrackd|supervise/supervisor.py|engine/process.py"

# Options of curl by what it then asks for. On IPv6 the extended ones are all there are.
EXTENDED = {"EPSV": EXTENDED_PASSIVE, "EPRT": EXTENDED_ACTIVE}
MODES = {False: {"PASV": PASSIVE, "PORT": ACTIVE, **EXTENDED}, True: EXTENDED}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m lab.demo", description=__doc__)
    parser.add_argument("--backend", choices=("nftables", "iptables"), default="nftables")
    parser.add_argument("--kernel", choices=[k.value for k in Kernel], default=Kernel.V6_1.value)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        return demonstrate(arguments.backend)
    again = [sys.executable, "-m", "lab.demo", "--here", "--backend", arguments.backend]
    if has_cthelper():
        return subprocess.run([sys.executable, "-m", "lab.inside", "--", *again], cwd=REPOSITORY).returncode
    kernel = Kernel(arguments.kernel)
    print(f"This kernel ({os.uname().release}) lacks nfnetlink_cthelper: the demo runs in a virtual machine, ", end="")
    print(f"Linux {kernel.version}. It is emulated, so give it a minute.", flush=True)
    return boot(kernel, again)


def has_cthelper() -> bool:
    """True if this kernel has the subsystem, loaded or not, and we may use it."""
    if os.geteuid() != 0:
        raise LabError("the demo makes network namespaces: run it as root")
    found = subprocess.run(["modprobe", "--dry-run", "--quiet", "nfnetlink_cthelper"]).returncode == 0
    return found or Path("/sys/module/nfnetlink_cthelper").exists()


def demonstrate(backend: str) -> int:
    """Run the demo; whatever becomes of it, nothing that it applied stays."""
    with tempfile.TemporaryDirectory(prefix="orch-demo-") as state:
        demo = Demo(backend, state)
        try:
            return demo.run()
        finally:
            subprocess.run(
                [sys.executable, "-m", "orchestrator", "teardown", "--all", "--yes", "--quiet"],
                env={**os.environ, "ORCH_STATE_DIR": state},
                stdin=subprocess.DEVNULL,
            )


class Demo:
    """One run; `failures` are the things that did not happen as they should."""

    def __init__(self, backend: str, state: str) -> None:
        self.backend = backend
        self.state = state
        self.failures: list[str] = []

    def run(self) -> int:
        self.title("a client, a router and a server; the router drops all but port 21 and what belongs to it")
        with topology.routed(), topology.servers():
            topology.load_filter(ROUTER, topology.ROUTER_FILTER)
            load_nat(Nat.NONE)
            print("    " + topology.ROUTER_FILTER.strip().replace("\n", "\n    "))
            before = self.system()
            self.title("without a helper: FTP hangs, the router knows nothing of the data connection")
            self.transfer("PASV", Nat.NONE, ip6=False, works=False)
            self.transfer("EPSV", Nat.NONE, ip6=True, works=False)
            profile = self.profile()
            self.orch("apply", profile, "--netns", ROUTER)
            self.rules()
            with topology.expectation_events(ROUTER) as events:
                self.title("with it, on IPv4 and IPv6, in every mode")
                transfers = self.transfers(Nat.NONE)
                self.title(f"behind NAT: the server sees {OUTSIDE_IP} as its client, the client {SERVICE_IP} as server")
                transfers += self.transfers(Nat.BOTH)
            load_nat(Nat.NONE)
            self.title("the expectations that came (conntrack -E expect)")
            print("    " + "\n    ".join(events))
            self.check(sum("[NEW]" in line for line in events) >= transfers, "every transfer was expected")
            self.orch("status")
            self.orch("diff", profile, "--netns", ROUTER)
            self.orch("apply", profile, "--netns", ROUTER)
            self.orch("teardown", profile, "--netns", ROUTER, "--yes")
            self.orch("status")
            self.title("what is left")
            after = self.system()
            print("    registrations, rules, queues and processes are as before" if after == before else after)
            self.check(after == before, "the system is as it was before")
        print(f"\n{'The demo failed: ' + '; '.join(self.failures) if self.failures else 'The demo went as it should.'}")
        return 1 if self.failures else 0

    def transfers(self, nat: Nat) -> int:
        """Fetch the file in every mode; returns how many there are."""
        load_nat(nat)
        for ip6, modes in MODES.items():
            for mode in modes:
                self.transfer(mode, nat, ip6=ip6, works=True)
        return sum(map(len, MODES.values()))

    def title(self, text: str) -> None:
        print(f"\n== {text}", flush=True)

    def check(self, is_good: bool, what: str) -> None:  # noqa: FBT001 (it reads as an assertion)
        if not is_good:
            self.failures.append(f"not so: {what}")

    def profile(self) -> str:
        if self.backend == "nftables":
            return str(PROFILE)
        copy = Path(self.state) / "ftp.yaml"
        copy.write_text(PROFILE.read_text() + f"\nbackend: {self.backend}\n")
        return str(copy)

    def orch(self, *argv: str) -> None:
        self.title(f"orch {' '.join(argv)}")
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *argv],
            env={**os.environ, "ORCH_STATE_DIR": self.state},
            stdin=subprocess.DEVNULL,
        )
        sys.stdout.flush()
        self.check(done.returncode == 0, f"orch {argv[0]} exits with 0, but with {done.returncode}")

    def rules(self) -> None:
        argv = ["nft", "list", "table", "inet", "orch-ftp"]
        if self.backend == "iptables":
            argv = ["iptables-save", "-t", "raw"]
        self.title(" ".join(argv))
        print("    " + topology.inside(ROUTER, *argv).stdout.strip().replace("\n", "\n    "), flush=True)

    def transfer(self, mode: str, nat: Nat, *, ip6: bool, works: bool) -> None:
        done = topology.ftp(*MODES[ip6][mode], address=nat.server(ip6=ip6))
        is_done = done.returncode == 0 and done.stdout == topology.CONTENT
        family = "IPv6" if ip6 else "IPv4"
        print(f"    curl, {family}, {mode}: {done.stdout.strip() or done.stderr.strip()}", flush=True)
        self.check(is_done is works, f"{mode} on {family} with NAT {nat} {'works' if works else 'hangs'}")

    def system(self) -> str:
        """Everything that orch touches, as text: equal texts mean that nothing is left."""
        looks: dict[str, Callable[[], str]] = {
            "helpers": lambda: topology.run("nfct", "helper", "list", check=False).stdout,
            "rules": lambda: topology.ruleset(ROUTER),
            "queues": lambda: topology.inside(ROUTER, "cat", "/proc/net/netfilter/nfnetlink_queue", check=False).stdout,
            "processes": lambda: topology.run("pgrep", "-af", PROCESSES, check=False).stdout,
        }
        return "\n".join(f"{name}: {look().strip()}" for name, look in looks.items())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"error: {error}")
