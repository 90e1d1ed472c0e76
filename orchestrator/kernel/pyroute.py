"""The parts of pyroute2 that we use, without the front of its package, which imports all of it: 0.1 s and 18 MiB.

The front is put in place as an empty package while the parts are imported, and taken away again: whoever imports
pyroute2 later in this process gets the whole of it. tests/unit/test_imports.py says when this can go.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_front(package: str) -> Iterator[None]:
    """Import submodules of a package in the block without running the `__init__` of the package itself."""
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None:
        yield
        return
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        del sys.modules[package]


with _without_front("pyroute2"):
    from pyroute2.netlink import NLA_F_NESTED, NetlinkDecodeError, nla
    from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_CTHELPER, nfgen_msg
    from pyroute2.netns import setns

__all__ = ["NFNL_SUBSYS_CTHELPER", "NLA_F_NESTED", "NetlinkDecodeError", "nfgen_msg", "nla", "setns"]
