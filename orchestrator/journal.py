"""The ledger: what the kernel cannot hold, in one SQLite database per host, and the lock around it.

It lives under /run, as the kernel state does: both are gone after a reboot. It is never the truth about the system;
it says whose a registration is, what was loaded, how that listed, and which transaction was under way.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import Interrupted, OrchError, RefusedError
from orchestrator.model import HelperKey, Registration
from orchestrator.ports import Clock
from orchestrator.serial import from_json, to_json
from orchestrator.state import Applied, Owner, Step

_SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS applied (
    profile TEXT NOT NULL, netns TEXT NOT NULL, owner TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (profile, netns));
CREATE TABLE IF NOT EXISTS registration (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS use (
    key TEXT NOT NULL, profile TEXT NOT NULL, netns TEXT NOT NULL, PRIMARY KEY (key, profile, netns));
CREATE TABLE IF NOT EXISTS transaction_ (
    id INTEGER PRIMARY KEY, command TEXT NOT NULL, owner TEXT NOT NULL, pid INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS step (
    tx INTEGER NOT NULL REFERENCES transaction_(id) ON DELETE CASCADE, seq INTEGER NOT NULL, state TEXT NOT NULL,
    value TEXT NOT NULL, PRIMARY KEY (tx, seq));
"""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A transaction that a killed command left: its steps that were begun, in order, with True for finished ones."""

    id: int
    command: str
    owner: Owner
    begun: tuple[tuple[Step, bool], ...]


class Ledger:
    """Open with `Ledger.open`; readers need no lock, writers hold it (`locked`)."""

    def __init__(self, directory: Path, connection: sqlite3.Connection) -> None:
        self.directory = directory
        self._db = connection

    @classmethod
    def open(cls, directory: Path, *, boot_id: str, create: bool) -> Ledger:
        """Open the ledger of a state directory; without `create` a missing one is an empty one in memory.

        A ledger of another boot is emptied, as nothing it speaks of exists any more; so is one of another schema, and
        then apply adopts what it finds.
        """
        file = directory / "ledger.sqlite"
        if not create:
            return cls(directory, _open_to_read(file, boot_id))
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            (directory / "lock").touch()
            return cls(directory, _open_to_write(file, boot_id))
        except OSError as error:
            raise OrchError(
                f"cannot use the state directory {directory}: {error}", hint="run as root, or set --state-dir"
            ) from error
        except sqlite3.Error as error:
            raise _broken(error, str(file)) from error

    def close(self) -> None:
        self._db.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def applied(self) -> tuple[Applied, ...]:
        rows = self._db.execute("SELECT value FROM applied ORDER BY netns, profile").fetchall()
        return tuple(_decode_applied(value) for (value,) in rows)

    def owners(self) -> tuple[Owner, ...]:
        """Who has something applied; cheaper than `applied` as nothing large is decoded."""
        rows = self._db.execute("SELECT owner FROM applied ORDER BY netns, profile").fetchall()
        return tuple(from_json(Owner, value) for (value,) in rows)

    def neighbours(self, owner: Owner) -> tuple[Applied, ...]:
        """Other profiles that are applied in the same namespace."""
        rows = self._db.execute(
            "SELECT value FROM applied WHERE netns = ? AND profile != ? ORDER BY profile",
            (owner.netns.identity, owner.profile),
        ).fetchall()
        return tuple(from_json(Applied, value) for (value,) in rows)

    def find(self, owner: Owner) -> Applied | None:
        row = self._db.execute(
            "SELECT value FROM applied WHERE profile = ? AND netns = ?", (owner.profile, owner.netns.identity)
        ).fetchone()
        return from_json(Applied, row[0]) if row else None

    def recorded(self) -> Mapping[HelperKey, Registration]:
        """Registrations that are ours, as they were applied last."""
        rows = self._db.execute("SELECT value FROM registration ORDER BY key").fetchall()
        registrations = [from_json(Registration, value) for (value,) in rows]
        return {r.key: r for r in registrations}

    def users(self) -> Mapping[HelperKey, tuple[Owner, ...]]:
        owners = {(o.profile, o.netns.identity): o for o in self.owners()}
        result: dict[HelperKey, tuple[Owner, ...]] = {}
        for key, profile, netns in self._db.execute("SELECT key, profile, netns FROM use ORDER BY key, profile, netns"):
            owner = owners.get((profile, netns))
            if owner is not None:
                parsed = HelperKey.parse(key)
                result[parsed] = (*result.get(parsed, ()), owner)
        return result

    def unsettled(self) -> tuple[Unsettled, ...]:
        result = []
        for tx, command, owner in self._db.execute(
            "SELECT id, command, owner FROM transaction_ ORDER BY id"
        ).fetchall():
            rows = self._db.execute("SELECT state, value FROM step WHERE tx = ? ORDER BY seq", (tx,)).fetchall()
            begun = tuple((from_json(Step, value), state == "done") for state, value in rows)
            result.append(Unsettled(tx, command, from_json(Owner, owner), begun))
        return tuple(result)

    # -- writing ------------------------------------------------------------------------------------------------------

    def begin(self, command: str, owner: Owner) -> int:
        with _write(self._db):
            cursor = self._db.execute(
                "INSERT INTO transaction_ (command, owner, pid) VALUES (?, ?, ?)",
                (command, to_json(owner), os.getpid()),
            )
        return int(cursor.lastrowid or 0)

    def intend(self, tx: int, sequence: int, step: Step) -> None:
        """Record that a step is about to be taken; durable before this returns."""
        with _write(self._db):
            self._db.execute("INSERT INTO step VALUES (?, ?, 'intent', ?)", (tx, sequence, to_json(step)))

    def done(self, tx: int, sequence: int) -> None:
        with _write(self._db):
            self._db.execute("UPDATE step SET state = 'done' WHERE tx = ? AND seq = ?", (tx, sequence))

    def undone(self, tx: int, sequence: int) -> None:
        with _write(self._db):
            self._db.execute("DELETE FROM step WHERE tx = ? AND seq = ?", (tx, sequence))

    def settle(self, tx: int) -> None:
        """The transaction is finished or undone; nothing of it is remembered."""
        with _write(self._db):
            self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))

    def settle_applied(self, tx: int | None, applied: Applied, *, live: tuple[HelperKey, ...] = ()) -> None:
        """In one write: the transaction is over, and this is what the profile has and uses from now on.

        Registrations that no profile uses are forgotten, but for those that are still `live`: they are still ours.
        """
        owner = applied.owner
        mine = {r.key: r for r in applied.registrations}
        with _write(self._db):
            if tx is not None:
                self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))
            self._db.execute(
                "INSERT OR REPLACE INTO applied VALUES (?, ?, ?, ?)",
                (owner.profile, owner.netns.identity, to_json(owner), to_json(applied)),
            )
            self._db.execute("DELETE FROM use WHERE profile = ? AND netns = ?", (owner.profile, owner.netns.identity))
            self._db.executemany(
                "INSERT INTO use VALUES (?, ?, ?)",
                [(str(key), owner.profile, owner.netns.identity) for key in sorted(mine)],
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO registration VALUES (?, ?)",
                [(str(key), to_json(r)) for key, r in mine.items()],
            )
            self._forget_unused(live)

    def settle_removed(self, tx: int | None, owner: Owner, *, live: tuple[HelperKey, ...] = ()) -> None:
        """In one write: the transaction is over, and the profile has nothing any more; `live` as in settle_applied."""
        with _write(self._db):
            if tx is not None:
                self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))
            at = (owner.profile, owner.netns.identity)
            self._db.execute("DELETE FROM applied WHERE profile = ? AND netns = ?", at)
            self._db.execute("DELETE FROM use WHERE profile = ? AND netns = ?", at)
            self._forget_unused(live)

    def _forget_unused(self, live: tuple[HelperKey, ...]) -> None:
        marks = ", ".join("?" for _ in live)
        self._db.execute(
            f"DELETE FROM registration WHERE key NOT IN (SELECT key FROM use) AND key NOT IN ({marks})",
            [str(key) for key in live],
        )

    # -- the lock -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(
        self, command: str, *, wait_s: float, clock: Clock, interrupted: Callable[[], int] = lambda: 0
    ) -> Iterator[None]:
        """Hold the one lock of the host; waits up to `wait_s`, then RefusedError says who holds it.

        The kernel drops it when its holder dies, so a lock of a dead process is none.
        """
        file = self.directory / "lock"
        with file.open("a+") as handle:
            deadline = clock.monotonic() + wait_s
            while not _try_lock(handle.fileno()):
                if number := interrupted():
                    raise Interrupted(number)
                if clock.monotonic() >= deadline:
                    holder = file.read_text().strip() or "another orch"
                    raise RefusedError(f"busy: {holder} holds the lock of this host", hint="try again, or use --wait")
                clock.sleep(0.05)
            handle.truncate(0)
            handle.write(f"orch {command} (pid {os.getpid()})")
            handle.flush()
            try:
                yield
            finally:
                handle.truncate(0)

    def is_locked(self) -> bool:
        """True while another orch is at work."""
        try:
            with (self.directory / "lock").open() as handle:
                return not _try_lock(handle.fileno())
        except FileNotFoundError:
            return False


@functools.lru_cache(maxsize=1024)
def _decode_applied(text: str) -> Applied:
    """Decoded again only when it changed: an exporter reads the same large texts at every scrape."""
    applied: Applied = from_json(Applied, text)
    return applied


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_to_write(file: Path, boot_id: str) -> sqlite3.Connection:
    db = sqlite3.connect(file, isolation_level=None)
    # It must outlive this process, not the machine: the kernel state it speaks of dies with the machine too.
    db.execute("PRAGMA synchronous=OFF")
    db.execute("PRAGMA foreign_keys=ON")
    db.executescript(_TABLES)
    if _origin(db) != (boot_id, _SCHEMA):
        with _write(db):
            for table in ("applied", "registration", "use", "transaction_", "step"):
                db.execute(f"DELETE FROM {table}")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?), ('schema', ?)", (boot_id, str(_SCHEMA)))
    return db


def _open_to_read(file: Path, boot_id: str) -> sqlite3.Connection:
    """The ledger, or an empty one where there is none, none of this boot, or none that can be read."""
    if file.exists():
        db = sqlite3.connect(f"file:{file}?mode=ro", uri=True, isolation_level=None)
        with contextlib.suppress(sqlite3.Error, ValueError):
            if _origin(db) == (boot_id, _SCHEMA):
                return db
        db.close()
    return _in_memory()


def _broken(error: sqlite3.Error, where: str = "") -> OrchError:
    return OrchError(
        f"the ledger cannot be written: {error}",
        where=where,
        hint="make room, or remove it: apply adopts what it finds, and teardown by profile still works",
    )


def _in_memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(_TABLES)
    return db


def _origin(db: sqlite3.Connection) -> tuple[str, int]:
    """The boot and the schema that a ledger was written in."""
    values = dict(db.execute("SELECT key, value FROM meta").fetchall())
    return values.get("boot_id", ""), int(values.get("schema", 0))


@contextlib.contextmanager
def _write(db: sqlite3.Connection) -> Iterator[None]:
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise _broken(error) from error
    except BaseException:
        db.execute("ROLLBACK")
        raise
