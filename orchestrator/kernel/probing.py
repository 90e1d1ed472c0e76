"""Ask the kernel for what orch needs of it, in a namespace made for that; the kernel may load modules to answer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing

from orchestrator.engine.netlink import answer, open_control_socket
from orchestrator.engine.nfqueue import encode_config
from orchestrator.errors import OrchError, errno_name
from orchestrator.kernel.netlink import dump_request, exchange
from orchestrator.kernel.netns import scratch
from orchestrator.kernel.nft import NftSession

_TABLE = "inet orch-probe"
_QUEUE = 1
_NFTABLES = {
    "nft_ct": "ct state new ct label set 1",
    "nft_queue": "queue flags bypass to 1",
    "nft_fib": "fib daddr type multicast",
    "nf_tables match on inner headers (@ih)": "@ih,0,8 >= 0",
}


def probe() -> dict[str, str]:
    """What each part of the kernel answered, empty if it is there, by the name of its module."""
    asked: dict[str, Callable[[], None]] = {
        "nfnetlink_cthelper": lambda: _dump(9),
        "nf_conntrack_netlink": lambda: _dump(1),
        "nfnetlink_queue": _bind,
        **{name: lambda rule=rule: _load(rule) for name, rule in _NFTABLES.items()},  # type: ignore[misc]
    }
    return {name: _answer_of(ask) for name, ask in asked.items()}


def _answer_of(ask: Callable[[], None]) -> str:
    try:
        with scratch():
            ask()
    except OrchError as error:
        return error.cause or error.what
    except OSError as error:
        return errno_name(error.errno or 0)
    return ""


def _dump(subsystem: int) -> None:
    with closing(exchange(dump_request(subsystem=subsystem, command=1))) as messages:
        for _ in messages:
            pass


def _bind() -> None:
    """A queue with the connection of each packet, which needs ctnetlink too. Source: nfqnl_recv_config."""
    with open_control_socket() as channel:
        channel.bind((0, 0))
        channel.send(encode_config(_QUEUE, is_fail_open=True, max_len=1))
        said = answer(channel.recv(4096))
    number = said[1] if said else errno.EBADMSG
    if number:
        raise OSError(number, os.strerror(number))


def _load(rule: str) -> None:
    session = NftSession()
    chain = "chain c { type filter hook postrouting priority 0; "
    session.text(f"table {_TABLE} {{ {chain} {rule}; }}; }}", operation="load rules", key=_TABLE)
