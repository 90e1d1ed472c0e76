"""The ledger: what the kernel cannot hold, in one SQLite database per host, and the lock around it.

It lives under /run, as the kernel state does: both are gone after a reboot. It is never the truth about the system;
it says whose a registration is, what was loaded, how that listed, and which transaction was under way.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.errors import Interrupted, LedgerVersionError, OrchError, RefusedError
from orchestrator.model import HelperKey, Netns, Registration
from orchestrator.ports import Clock
from orchestrator.serial import from_json, to_json
from orchestrator.state import Applied, CreateRegistration, Mending, Owner, Past, Pending, Step, Unsettled

_PATIENCE_S = 1.0
_LOOK_S = 0.1  # those who only look hold the lock for an instant; that makes nobody wait who would not
_PRIVATE = 0o600  # who can read a file can lock it: anybody could stop every orch, or pass for a watchdog
_FILE = "ledger.sqlite"
_SCHEMA = 2
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE applied (
    profile TEXT NOT NULL, netns TEXT NOT NULL, owner TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (profile, netns));
CREATE TABLE registration (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE use (
    key TEXT NOT NULL, profile TEXT NOT NULL, netns TEXT NOT NULL, PRIMARY KEY (key, profile, netns));
CREATE TABLE stale (
    key TEXT NOT NULL, profile TEXT NOT NULL, netns TEXT NOT NULL, PRIMARY KEY (key, profile, netns));
CREATE TABLE mending (
    profile TEXT NOT NULL, netns TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (profile, netns));
CREATE TABLE namespace (identity TEXT PRIMARY KEY, cookie INTEGER NOT NULL);
CREATE TABLE transaction_ (
    id INTEGER PRIMARY KEY, command TEXT NOT NULL, owner TEXT NOT NULL, pid INTEGER NOT NULL);
CREATE TABLE step (
    tx INTEGER NOT NULL REFERENCES transaction_(id) ON DELETE CASCADE, seq INTEGER NOT NULL, state TEXT NOT NULL,
    value TEXT NOT NULL, PRIMARY KEY (tx, seq));
CREATE TABLE pending (
    profile TEXT NOT NULL, netns TEXT NOT NULL, tx INTEGER REFERENCES transaction_(id) ON DELETE CASCADE,
    value TEXT NOT NULL, PRIMARY KEY (profile, netns));
CREATE TABLE history (
    id INTEGER PRIMARY KEY, profile TEXT NOT NULL, netns TEXT NOT NULL, owner TEXT NOT NULL, command TEXT NOT NULL,
    target TEXT NOT NULL, value TEXT NOT NULL, UNIQUE (profile, netns, target));
"""
_SET_ASIDE = (
    "mv {file} {file}.broken: then apply adopts what it finds, and teardown by profile works; what was half-done or"
    " waits for its confirmation is forgotten"
)
_CURES = {
    sqlite3.SQLITE_FULL: "make room",
    sqlite3.SQLITE_BUSY: "another program holds it: try again",
    sqlite3.SQLITE_IOERR: "the log of the kernel may say why",
    **dict.fromkeys((sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM), "run as root"),
}
_OTHER_USERS = "SELECT key, profile, netns FROM use WHERE key = ? AND NOT (profile = ? AND netns = ?)"
_KEPT = 10  # lines of history for each profile in each namespace


class Ledger:
    """Open with `Ledger.open`; readers need no lock, writers hold it (`locked`)."""

    def __init__(self, directory: Path, connection: sqlite3.Connection) -> None:
        self.directory = directory
        self._db = connection

    @classmethod
    def open(cls, directory: Path, *, boot_id: str, create: bool) -> Ledger:
        """Open the ledger of a state directory; without `create` a missing one is an empty one in memory.

        A ledger of another boot is emptied, as nothing it speaks of exists any more; so is one of an older schema, and
        then apply adopts what it finds. Raises LedgerVersionError for a newer one, and OrchError for one that cannot be
        read: what it knows of half-done work and of confirmations is not thrown away unasked.
        """
        file = directory / _FILE
        if not create:
            return cls(directory, _open_to_read(file, boot_id))
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            for each in (directory / "lock", file):
                each.touch(mode=_PRIVATE)
            return cls(directory, _open_to_write(file, boot_id))
        except OSError as error:
            hint = "run as root, or set --state-dir" if isinstance(error, PermissionError) else "set --state-dir"
            reason = error.strerror or error
            raise OrchError(f"cannot use the state directory: {reason}", where=str(directory), hint=hint) from error
        except (sqlite3.Error, ValueError) as error:
            raise _broken(error, file, "read") from error

    @property
    def file(self) -> Path:
        return self.directory / _FILE

    def close(self) -> None:
        self._db.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Raises OrchError, as everything below does that reads."""
        try:
            return self._db.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise _broken(error, self.file, "read") from error

    def _value(self, kind: Any, text: str) -> Any:
        return self._decoded(functools.partial(_read, kind), text)

    def _key(self, text: str) -> HelperKey:
        key: HelperKey = self._decoded(HelperKey.parse, text)
        return key

    def _decoded(self, decode: Callable[[str], Any], text: str) -> Any:
        try:
            return decode(text)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _broken(error, self.file, "read") from error

    def applied(self) -> tuple[Applied, ...]:
        rows = self._rows("SELECT value FROM applied ORDER BY netns, profile")
        return tuple(self._value(Applied, value) for (value,) in rows)

    def owners(self) -> tuple[Owner, ...]:
        """Who has something applied; cheaper than `applied` as nothing large is decoded."""
        rows = self._rows("SELECT owner FROM applied ORDER BY netns, profile")
        return tuple(self._value(Owner, value) for (value,) in rows)

    def neighbours(self, owner: Owner) -> tuple[Applied, ...]:
        """Other profiles that are applied in the same namespace."""
        rows = self._rows(
            "SELECT value FROM applied WHERE netns = ? AND profile != ? ORDER BY profile",
            (owner.netns.identity, owner.profile),
        )
        return tuple(self._value(Applied, value) for (value,) in rows)

    def find(self, owner: Owner) -> Applied | None:
        at = (owner.profile, owner.netns.identity)
        rows = self._rows("SELECT value FROM applied WHERE profile = ? AND netns = ?", at)
        return self._value(Applied, rows[0][0]) if rows else None

    def attaches_by_iptables(self, owner: Owner) -> bool:
        applied = self.find(owner)
        return applied is not None and applied.target.attaches_by_iptables

    def recorded(self) -> Mapping[HelperKey, Registration]:
        """Registrations that are ours, as they were applied last."""
        rows = self._rows("SELECT value FROM registration ORDER BY key")
        registrations = [self._value(Registration, value) for (value,) in rows]
        return {r.key: r for r in registrations}

    def users(self) -> Mapping[HelperKey, tuple[Owner, ...]]:
        owners = {(o.profile, o.netns.identity): o for o in self.owners()}
        result: dict[HelperKey, tuple[Owner, ...]] = {}
        for key, profile, netns in self._rows("SELECT key, profile, netns FROM use ORDER BY key, profile, netns"):
            owner = owners.get((profile, netns))
            if owner is not None:
                parsed = self._key(key)
                result[parsed] = (*result.get(parsed, ()), owner)
        return result

    def stale(self, owner: Owner) -> frozenset[HelperKey]:
        """Registrations that somebody else made anew: rules that were loaded before may go on attaching the old one."""
        at = (owner.profile, owner.netns.identity)
        rows = self._rows("SELECT key FROM stale WHERE profile = ? AND netns = ?", at)
        return frozenset(self._key(key) for (key,) in rows)

    def cookie(self, netns: Netns) -> int:
        """What told a namespace from any other when something was applied there last; 0 if unknown."""
        rows = self._rows("SELECT cookie FROM namespace WHERE identity = ?", (netns.identity,))
        return int(rows[0][0]) if rows else 0

    def mending(self, owner: Owner) -> Mending:
        """What watching has done for a profile lately."""
        at = (owner.profile, owner.netns.identity)
        rows = self._rows("SELECT value FROM mending WHERE profile = ? AND netns = ?", at)
        return self._value(Mending, rows[0][0]) if rows else Mending()

    def left_alone(self) -> tuple[Unsettled, ...]:
        """What was not finished, and nobody is at work on."""
        return () if self.is_locked() else self.unsettled()

    def unsettled(self, of: Owner | None = None) -> tuple[Unsettled, ...]:
        """Transactions that are not over, of all or of one owner, oldest first."""
        result = []
        for tx, command, owner in self._rows("SELECT id, command, owner FROM transaction_ ORDER BY id"):
            rows = self._rows("SELECT state, value FROM step WHERE tx = ? ORDER BY seq", (tx,))
            planned: tuple[Step, ...] = tuple(self._decoded(_read_step, value) for _, value in rows)
            begun = tuple((n, step) for n, step in enumerate(planned) if rows[n][0] == "begun")
            result.append(Unsettled(tx, command, self._value(Owner, owner), planned, begun))
        return tuple(unsettled for unsettled in result if of is None or unsettled.is_of(of))

    def pending(self) -> tuple[Pending, ...]:
        """Every apply that waits for its confirmation, or is still under way or was killed before it could wait."""
        rows = self._rows("SELECT value FROM pending ORDER BY netns, profile")
        return tuple(self._value(Pending, value) for (value,) in rows)

    def waiting(self) -> tuple[Pending, ...]:
        """Every apply that is done, and waits for its confirmation."""
        rows = self._rows("SELECT value FROM pending WHERE tx IS NULL ORDER BY netns, profile")
        return tuple(self._value(Pending, value) for (value,) in rows)

    def history(self, owner: Owner) -> tuple[Past, ...]:
        """What was applied, newest first, each state once; what nobody confirmed is not among it."""
        rows = self._rows(
            "SELECT command, value FROM history WHERE profile = ? AND netns = ? ORDER BY id DESC",
            (owner.profile, owner.netns.identity),
        )
        return tuple(Past(command, self._value(Applied, value)) for command, value in rows)

    def remembered(self) -> tuple[Owner, ...]:
        """Who has a history; something need not be applied any more."""
        newest = "SELECT max(id) FROM history GROUP BY netns, profile"
        rows = self._rows(f"SELECT owner FROM history WHERE id IN ({newest}) ORDER BY netns, profile")
        return tuple(self._value(Owner, value) for (value,) in rows)

    def has_strays(self) -> bool:
        """Whether rules of ours are loaded of which this ledger, or the one before it, knows nothing."""
        return bool(self._rows("SELECT 1 FROM meta WHERE key = 'strays'"))

    # -- writing ------------------------------------------------------------------------------------------------------

    def recognise(self, netns: Netns, cookie: int) -> None:
        """Remember by what a namespace is known again; the kernel may give its identity to another one."""
        if self.cookie(netns) != cookie:
            with _write(self._db, self.file):
                self._db.execute("INSERT OR REPLACE INTO namespace VALUES (?, ?)", (netns.identity, cookie))

    def remember_strays(self, *, are_there: bool) -> None:
        if are_there != self.has_strays():
            with _write(self._db, self.file):
                self._db.execute("DELETE FROM meta WHERE key = 'strays'")
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", [("strays", "1")] if are_there else [])

    def begin(
        self,
        command: str,
        owner: Owner,
        steps: Sequence[Step],
        *,
        pending: Pending | None = None,
        instead_of: Sequence[Unsettled] = (),
    ) -> int:
        """A transaction begins with all of its steps, none of them taken; in the same write others are over.

        One that is undone takes along what it would have had to wait for.
        """
        at = (owner.profile, owner.netns.identity)
        with _write(self._db, self.file):
            self._db.executemany("DELETE FROM transaction_ WHERE id = ?", [(other.id,) for other in instead_of])
            cursor = self._db.execute(
                "INSERT INTO transaction_ (command, owner, pid) VALUES (?, ?, ?)",
                (command, to_json(owner), os.getpid()),
            )
            tx = int(cursor.lastrowid or 0)
            rows = [(tx, sequence, to_json(step)) for sequence, step in enumerate(steps)]
            self._db.executemany("INSERT INTO step VALUES (?, ?, 'planned', ?)", rows)
            made = [(str(step.registration.key), *at) for step in steps if isinstance(step, CreateRegistration)]
            if self._db.executemany(f"INSERT OR IGNORE INTO stale {_OTHER_USERS}", made).rowcount > 0:
                (self.directory / "remade").touch(mode=_PRIVATE)  # their supervisors see that at a glance
            if pending is not None:
                # Instead of that of one which was killed and could not be undone.
                self._db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?)", (*at, tx, to_json(pending)))
        return tx

    def intend(self, tx: int, sequence: int) -> None:
        """Record that a step is about to be taken; a kill of this process after that cannot hide it."""
        self._mark(tx, sequence, "begun")

    def undone(self, tx: int, sequence: int) -> None:
        """A step has no effect any more, or never had any."""
        self._mark(tx, sequence, "undone")

    def _mark(self, tx: int, sequence: int, state: str) -> None:
        with _write(self._db, self.file):
            self._db.execute("UPDATE step SET state = ? WHERE tx = ? AND seq = ?", (state, tx, sequence))

    def settle(self, tx: int) -> None:
        """The transaction is finished or undone; nothing of it is remembered."""
        with _write(self._db, self.file):
            self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))

    def claim(self, registrations: Iterable[Registration]) -> None:
        """These are ours, whoever uses them."""
        with _write(self._db, self.file):
            self._db.executemany(
                "INSERT OR IGNORE INTO registration VALUES (?, ?)", [(str(r.key), to_json(r)) for r in registrations]
            )

    def settle_applied(
        self,
        tx: int | None,
        applied: Applied,
        *,
        live: tuple[HelperKey, ...] = (),
        is_rollback: bool = False,
        instead_of: Sequence[Unsettled] = (),
    ) -> None:
        """In one write: the transaction and others are over, and this is what the profile has and uses from now on.

        Registrations that no profile uses are forgotten, but for those that are still `live`: they are still ours.
        What has to be confirmed waits from now on, and is no history yet; a rollback ends the wait.
        """
        owner = applied.owner
        at = (owner.profile, owner.netns.identity)
        mine = {r.key: r for r in applied.registrations}
        value = to_json(applied)
        with _write(self._db, self.file):
            self._db.executemany("DELETE FROM transaction_ WHERE id = ?", [(o.id,) for o in instead_of if o.id != tx])
            if tx is not None:
                self._db.execute("UPDATE pending SET tx = NULL WHERE tx = ?", (tx,))
                self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))
            if is_rollback:
                self._db.execute("DELETE FROM pending WHERE profile = ? AND netns = ?", at)
            self._db.execute("INSERT OR REPLACE INTO applied VALUES (?, ?, ?, ?)", (*at, to_json(owner), value))
            for table in ("use", "stale"):
                self._db.execute(f"DELETE FROM {table} WHERE profile = ? AND netns = ?", at)
            self._db.executemany("INSERT INTO use VALUES (?, ?, ?)", [(str(key), *at) for key in sorted(mine)])
            self._db.executemany(
                "INSERT OR REPLACE INTO registration VALUES (?, ?)",
                [(str(key), to_json(r)) for key, r in mine.items()],
            )
            self._forget_unused(live)
            if not self._db.execute("SELECT 1 FROM pending WHERE profile = ? AND netns = ?", at).fetchone():
                self._remember(applied, value, "rollback" if is_rollback else "apply")

    def reject(self, pending: Pending) -> None:
        """It could not be undone as a whole: from now on every command tries to."""
        at = (pending.owner.profile, pending.owner.netns.identity)
        with _write(self._db, self.file):
            value = to_json(replace(pending, is_rejected=True))
            self._db.execute("UPDATE pending SET value = ? WHERE profile = ? AND netns = ?", (value, *at))

    def confirm(self, owner: Owner) -> None:
        """In one write: nothing waits any more, and what is applied is history."""
        at = (owner.profile, owner.netns.identity)
        applied = self.find(owner)
        with _write(self._db, self.file):
            self._db.execute("DELETE FROM pending WHERE profile = ? AND netns = ?", at)
            if applied is not None:
                self._remember(applied, to_json(applied), "apply")

    def settle_removed(self, tx: int | None, owner: Owner, *, live: tuple[HelperKey, ...] = ()) -> None:
        """In one write: the transaction is over, and the profile has nothing any more; `live` as in settle_applied.

        Without a transaction it is the namespace that is gone, and the history with it.
        """
        at = (owner.profile, owner.netns.identity)
        with _write(self._db, self.file):
            if tx is not None:
                self._db.execute("DELETE FROM transaction_ WHERE id = ?", (tx,))
            for table in ("applied", "use", "stale", "mending", "pending", *(("history",) if tx is None else ())):
                self._db.execute(f"DELETE FROM {table} WHERE profile = ? AND netns = ?", at)
            self._forget_namespaces()
            self._forget_unused(live)

    def forget_history(self, owner: Owner) -> None:
        with _write(self._db, self.file):
            at = (owner.profile, owner.netns.identity)
            self._db.execute("DELETE FROM history WHERE profile = ? AND netns = ?", at)
            self._forget_namespaces()

    def _remember(self, applied: Applied, value: str, command: str) -> None:
        """Put a state on top of the history; one that is on top already stays the line that it is."""
        at = (applied.owner.profile, applied.owner.netns.identity)
        target = hashlib.sha256(to_json((applied.target, applied.helpers)).encode()).hexdigest()
        newest = "SELECT id FROM history WHERE profile = ? AND netns = ? ORDER BY id DESC"
        row = self._db.execute(
            f"SELECT command FROM history WHERE id = ({newest} LIMIT 1) AND target = ?", (*at, target)
        )
        command = next((known for (known,) in row), command)
        self._db.execute("DELETE FROM history WHERE profile = ? AND netns = ? AND target = ?", (*at, target))
        self._db.execute(
            "INSERT INTO history (profile, netns, owner, command, target, value) VALUES (?, ?, ?, ?, ?, ?)",
            (*at, to_json(applied.owner), command, target, value),
        )
        self._db.execute(f"DELETE FROM history WHERE id IN ({newest} LIMIT -1 OFFSET {_KEPT})", at)

    def _forget_namespaces(self) -> None:
        known = "SELECT netns FROM applied UNION SELECT netns FROM history"
        self._db.execute(f"DELETE FROM namespace WHERE identity NOT IN ({known})")

    def remember_mending(self, owner: Owner, mending: Mending) -> None:
        with _write(self._db, self.file):
            self._db.execute(
                "INSERT OR REPLACE INTO mending VALUES (?, ?, ?)",
                (owner.profile, owner.netns.identity, to_json(mending)),
            )

    def forget_mending(self, owner: Owner) -> None:
        """Somebody has applied the profile: it is mended from the start again."""
        if self.mending(owner) != Mending():
            self.remember_mending(owner, Mending())

    def forget_unused(self, live: tuple[HelperKey, ...]) -> None:
        """Registrations that no profile uses are forgotten, but for those that are `live`."""
        with _write(self._db, self.file):
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
        self,
        command: str,
        *,
        wait_s: float,
        clock: Clock,
        interrupted: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[None]:
        """Hold the one lock of the host; waits up to `wait_s`, then RefusedError says who holds it.

        Who waits for a second says for whom, once. The kernel drops the lock when its holder dies, so a lock of a dead
        process is none.
        """
        file = self.directory / "lock"
        with file.open("a+", encoding="utf-8", errors="backslashreplace") as handle:
            start = clock.monotonic()
            has_said = False
            while not _try_lock(handle.fileno(), fcntl.LOCK_EX):
                if number := interrupted():
                    raise Interrupted(number)
                waited_s = clock.monotonic() - start
                holder = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0] or "another orch"
                if waited_s >= max(wait_s, _LOOK_S):
                    raise RefusedError(f"busy: {holder} holds the lock of this host", hint="try again, or use --wait")
                if waited_s >= _PATIENCE_S and not has_said:
                    say(f"waiting for {holder}, at most {wait_s:g} s")
                    has_said = True
                clock.sleep(0.05)
            handle.truncate(0)
            with contextlib.suppress(OSError):  # a full disk: who waits is not told for whom
                os.write(handle.fileno(), f"orch {command} (pid {os.getpid()})".encode(errors="backslashreplace"))
            try:
                yield
            finally:
                handle.truncate(0)

    def is_locked(self) -> bool:
        """True while another orch is at work."""
        return self._is_held("lock")

    @contextlib.contextmanager
    def watched(self, ready: Callable[[], None]) -> Iterator[None]:
        """Be the one who undoes what nobody confirms; waits for as long as somebody else is, which is `ready` too."""
        file = self.directory / "watchdog"
        file.touch(mode=_PRIVATE)
        with file.open("a+") as handle:
            is_first = _try_lock(handle.fileno(), fcntl.LOCK_EX)
            ready()
            if not is_first:
                fcntl.flock(handle.fileno(), fcntl.LOCK_EX)
            handle.truncate(0)
            handle.write(f"{os.getpid()}\n")
            handle.flush()
            yield

    def is_watched(self) -> bool:
        """Whether somebody is there who undoes what nobody confirms."""
        return self._is_held("watchdog")

    def _is_held(self, name: str) -> bool:
        try:
            with (self.directory / name).open() as handle:
                return not _try_lock(handle.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def note_child(directory: Path, pid: int) -> None:
    """Add a program that is run under the lock to who holds it: what it does to rules is not somebody else's doing."""
    with contextlib.suppress(OSError), (directory / "lock").open("r+") as file:
        file.seek(0, os.SEEK_END)
        file.write(f"\n(pid {pid})")


@functools.lru_cache(maxsize=64)
def _read_step(text: str) -> Step:
    """Those of the few plans that are under way."""
    step: Step = from_json(Step, text)
    return step


@functools.lru_cache(maxsize=1024)
def _read(kind: Any, text: str) -> Any:
    """Decoded again only when it changed: an exporter reads the same large texts at every scrape."""
    return from_json(kind, text)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_to_write(file: Path, boot_id: str) -> sqlite3.Connection:
    db = sqlite3.connect(file, isolation_level=None)
    # It must outlive this process, not the machine: the kernel state it speaks of dies with the machine too.
    db.execute("PRAGMA synchronous=OFF")
    db.execute("PRAGMA foreign_keys=ON")
    if not _is_current(db, file, boot_id):
        with _write(db, file):
            if _is_current(db, file, boot_id):
                return db  # another one that starts at boot was quicker: what is there is its work
            _begin_anew(db, boot_id)
    return db


def _begin_anew(db: sqlite3.Connection, boot_id: str) -> None:
    """Empty tables of ours, whatever was there before."""
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        db.execute(f'DROP TABLE "{name}"')
    for statement in _TABLES.split(";"):
        db.execute(statement)
    origin = {"boot_id": boot_id, "schema": str(_SCHEMA), "version": __version__}
    db.executemany("INSERT INTO meta VALUES (?, ?)", list(origin.items()))


def _open_to_read(file: Path, boot_id: str) -> sqlite3.Connection:
    """The ledger, or an empty one where there is none, none of this boot, or one of an older schema.

    A write in which a command was killed is rolled back by whoever opens the ledger next; only who may write can.
    """
    if not file.exists():
        return _in_memory()
    if not os.access(file, os.R_OK):
        raise OrchError(f"cannot read {file}", hint="run as root")
    try:
        return _opened(file, "ro", boot_id)
    except sqlite3.OperationalError:
        pass
    except (sqlite3.Error, ValueError) as error:
        raise _broken(error, file, "read") from error
    try:
        return _opened(file, "rw", boot_id)
    except (sqlite3.Error, ValueError) as error:
        raise _broken(error, file, "read") from error


def _opened(file: Path, mode: str, boot_id: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
    try:
        if _is_current(db, file, boot_id):
            return db
    except BaseException:
        db.close()
        raise
    db.close()
    return _in_memory()


def _broken(error: Exception, file: Path, doing: str) -> OrchError:
    """What SQLite says of a ledger, or what is said of a value in it that is none, and what to do."""
    result = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # the rest is of the extended code
    return OrchError(
        f"the ledger cannot be {doing}: {error}", where=str(file), hint=_CURES.get(result, _SET_ASIDE.format(file=file))
    )


def _in_memory() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(_TABLES)
    return db


def _is_current(db: sqlite3.Connection, file: Path, boot_id: str) -> bool:
    """Whether a ledger is of this boot and this schema. Raises LedgerVersionError for a newer one of this boot."""
    boot, schema = _origin(db)
    if boot == boot_id and schema > _SCHEMA:
        raise LedgerVersionError(
            f"the ledger is of a newer orch: {_meta(db).get('version', '')}".rstrip(": "),
            where=f"{file}, schema {schema}; orch {__version__} has schema {_SCHEMA}",
            hint="use that one, also to tear down everything before this one is used",
        )
    return (boot, schema) == (boot_id, _SCHEMA)


def _origin(db: sqlite3.Connection) -> tuple[str, int]:
    """The boot and the schema that a ledger was written in; "" and 0 before anything was."""
    values = _meta(db)
    return values.get("boot_id", ""), int(values.get("schema", 0))


def _meta(db: sqlite3.Connection) -> dict[str, str]:
    if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        return {}
    return dict(db.execute("SELECT key, value FROM meta").fetchall())


@contextlib.contextmanager
def _write(db: sqlite3.Connection, file: Path) -> Iterator[None]:
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except sqlite3.Error as error:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise _broken(error, file, "written") from error
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
