"""Where the lab keeps its files, and which kernels it knows."""

from enum import StrEnum
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"
SYSROOT = CACHE / "sysroot"
SYSROOT_PACKAGES_FILE = SYSROOT / "usr/share/lab/packages"
PROMTOOL = CACHE / "promtool" / "promtool"

# Environment variable that tells a command that the sysroot is visible: "guest" in a guest, "host" in a namespace.
INSIDE_VARIABLE = "LAB_INSIDE"

# Environment variable that is set where tests run on all kernels, one after the other: some of them take turns then.
TURNS_VARIABLE = "LAB_TURNS"


class LabError(Exception):
    """The lab cannot go on; the message says why and what to do."""


class Kernel(StrEnum):
    """The kernels that tests boot, by the key that the command line takes."""

    V6_1 = "6.1"
    V6_12 = "6.12"
    BACKPORTS = "backports"

    @property
    def directory(self) -> Path:
        return CACHE / "kernels" / self.value

    @property
    def is_fetched(self) -> bool:
        return (self.directory / "version").exists()

    @property
    def version(self) -> str:
        """The release as uname -r prints it. Raises LabError if the kernel was not fetched."""
        try:
            return (self.directory / "version").read_text().strip()
        except FileNotFoundError:
            raise LabError(f"kernel {self} is not here; run: python3 -m lab.fetch kernels") from None

    @property
    def image(self) -> Path:
        """The bzImage, which Debian's packages keep in /boot up to 6.x and beside the modules since."""
        in_boot = self.directory / "boot" / f"vmlinuz-{self.version}"
        return in_boot if in_boot.exists() else self.modules / self.version / "vmlinuz"

    @property
    def modules(self) -> Path:
        """Directory of the modules, to be mounted on /lib/modules."""
        return self.directory / "lib/modules"
