"""The host-wide helper registry of the kernel."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import KernelError
from orchestrator.kernel import cthelper_codec as codec
from orchestrator.kernel import netlink
from orchestrator.kernel.modules import module_present
from orchestrator.model import HelperKey, Registration

MODULE = "nfnetlink_cthelper"

_RELEASED_WITHIN_S = 2.0
_POLL_S = 0.02

log = logging.getLogger(__name__)


class KernelRegistry:
    """ports.Registry over nfnetlink_cthelper. Works from any network namespace of the initial user namespace."""

    def is_present(self) -> bool:
        return module_present(MODULE)

    def dump(self) -> tuple[Registration, ...]:
        """All registrations that orch could have made, by key; others cannot have a key of ours and are left out."""
        if not self.is_present():
            return ()
        with _refusals("list helpers", "of this host"):
            found = netlink.dump(codec.encode_dump(), lambda messages: [codec.decode(m) for m in messages])
        foreign = [entry for entry in found if not isinstance(entry, Registration)]
        log.debug("%d helpers registered, and foreign ones: %s", len(found) - len(foreign), foreign)
        return tuple(sorted((entry for entry in found if isinstance(entry, Registration)), key=lambda r: r.key))

    def create(self, registration: Registration) -> None:
        self._perform("register helper", registration.key, codec.encode_create(registration))

    def update(self, registration: Registration, *, keeps_status: bool = False) -> None:
        self._require("update helper", registration.key)
        self._perform("update helper", registration.key, codec.encode_update(registration, keeps_status=keeps_status))

    def delete(self, key: HelperKey) -> None:
        """Unregister. EBUSY counts only if it lasts: nf_tables lets go of the objects of a batch in a worker, after it.

        Source: nf_tables_api.c, nf_tables_commit_release.
        """
        self._require("unregister helper", key)
        deadline = time.monotonic() + _RELEASED_WITHIN_S
        while True:
            try:
                return self._perform("unregister helper", key, codec.encode_delete(key))
            except KernelError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)

    def _require(self, operation: str, key: HelperKey) -> None:
        """Raise ENOENT for a key that is not there: NEW would register it, and DEL of an empty registry answers 0.

        So does GET of an empty registry (6.1 to 7.3): what counts is whether it sent an entry.
        """
        with _refusals(operation, str(key)):
            if not self.is_present() or not list(netlink.exchange(codec.encode_get(key))):
                raise OSError(errno.ENOENT, "")

    def _perform(self, operation: str, key: HelperKey, request: bytes) -> None:
        log.debug("%s %s: %s", operation, key, request.hex())
        with _refusals(operation, str(key)):
            netlink.perform(request)


@contextmanager
def _refusals(operation: str, key: str) -> Iterator[None]:
    """Turn the kernel's errno into a KernelError of that operation."""
    try:
        yield
    except OSError as error:
        raise KernelError(operation, key, error.errno or 0, detail=error.strerror or "") from error
