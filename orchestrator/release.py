"""What kernels do differently, to judge by their release."""

from __future__ import annotations

import re
from collections.abc import Sequence

OLDEST = (6, 1)
_NAMED = 3  # of a thousand namespaces


def version(release: str) -> tuple[int, int]:
    """Major and minor of a kernel release; what does not begin with them counts as the oldest."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else OLDEST


def drops_waiting_packets(release: str) -> bool:
    """Whether to unregister a helper makes the kernel drop every packet that waits in any queue of the host."""
    return version(release) < (7, 3)


def idles_iptables(release: str) -> bool:
    """Whether to unregister any helper makes all iptables rules of the host that attach one idle, without a word.

    `-j CT` keeps what it attaches in a connection that is never confirmed, and since 5.19 such a connection loses its
    helper then (nf_conntrack_extend.c, nf_ct_ext_bump_genid). A rule that is idle no longer counts as a user of its
    helper; removed, it never lets go of it. Tried: 6.1 does that, 6.12 and 7.3 do not; what is between was not tried.
    """
    return (5, 19) <= version(release) < (6, 12)


def stays_for(registration: object, places: Sequence[str], *, until: str = "apply or teardown") -> str:
    """A sentence of a registration that would go but for iptables rules in these places."""
    named, more = places[:_NAMED], len(places) - _NAMED
    whose = ", ".join(named) + (f", and {more} more" if more > 0 else "")
    return (
        f"{registration} stays, disabled: this kernel would make iptables rules idle, those of {whose}; "
        f"the next {until} without those removes it"
    )
