"""The values everything else speaks in; their constructors reject what the kernel would reject."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

NAME_MAX_BYTES = 15
POLICIES_MAX = 4
EXPECT_MAX_LIMIT = 255
PRIV_DATA_MAX = 32
INTERFACE_MAX_BYTES = 15
TRIGGER_MAX_BYTES = 4

_PROFILE_NAME = re.compile(r"[a-z][a-z0-9-]{0,17}")
_HELPER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.@:-]{1,15}")


class L3Proto(StrEnum):
    IP = "ip"
    IP6 = "ip6"

    @property
    def number(self) -> int:
        return 2 if self is L3Proto.IP else 10


class L4Proto(StrEnum):
    TCP = "tcp"
    UDP = "udp"

    @property
    def number(self) -> int:
        return 6 if self is L4Proto.TCP else 17


class Status(StrEnum):
    DISABLED = "disabled"
    ENABLED = "enabled"


class Backend(StrEnum):
    """How rules are written. `iptables` takes the variant that the host's alternatives name."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    IPTABLES_LEGACY = "iptables-legacy"
    IPTABLES_NFT = "iptables-nft"

    @property
    def is_nftables(self) -> bool:
        return self is Backend.NFTABLES


class Engine(StrEnum):
    """Who inspects the packets of a helper."""

    NATIVE = "native"
    CONNTRACKD = "conntrackd"
    KERNEL = "kernel"


class Queueing(StrEnum):
    """Who sends packets to the helper process: rules of ours, with the registration disabled, or the registration.

    Without a listener, rules let a connection pass as if it had no helper; an enabled registration leaves new ones
    unconfirmed, which a stateful filter blocks.
    """

    RULES = "rules"
    REGISTRATION = "registration"


class Restart(StrEnum):
    """Whether a helper process is started again when it has ended and nobody wanted that."""

    ON_FAILURE = "on-failure"
    NEVER = "never"


class Inspect(StrEnum):
    """Which packets rules queue: all with a payload, or only those that begin with a trigger of the helper."""

    PAYLOAD = "payload"
    TRIGGERS = "triggers"


class Path(StrEnum):
    """Which connections a rule sees: forwarded or to this host (prerouting), or made by this host (output)."""

    INCOMING = "incoming"
    OUTGOING = "outgoing"


def is_profile_name(text: str) -> bool:
    return _PROFILE_NAME.fullmatch(text) is not None


def is_helper_name(text: str) -> bool:
    """True for a name that the kernel, nft and iptables all take unquoted: at most 15 bytes of ASCII."""
    return _HELPER_NAME.fullmatch(text) is not None


def is_interface_name(text: str) -> bool:
    return _INTERFACE.fullmatch(text) is not None and text not in (".", "..")


@dataclass(frozen=True, slots=True, order=True)
class HelperKey:
    """Identity of a registration, printed `ftp/ip/tcp`. Source: nf_conntrack_helper.c, __nf_conntrack_helper_find."""

    name: str
    l3proto: L3Proto
    l4proto: L4Proto

    def __post_init__(self) -> None:
        if not is_helper_name(self.name):
            raise ValueError(f"not a helper name of at most {NAME_MAX_BYTES} bytes: {self.name!r}")

    def __str__(self) -> str:
        return f"{self.name}/{self.l3proto}/{self.l4proto}"

    @classmethod
    def parse(cls, text: str) -> HelperKey:
        """The inverse of `str`; raises ValueError."""
        name, l3proto, l4proto = text.split("/")
        return cls(name, L3Proto(l3proto), L4Proto(l4proto))


@dataclass(frozen=True, slots=True)
class Policy:
    """One expectation class: at most `expect_max` (1..255) expectations per connection, each for `expect_timeout_s`."""

    name: str
    expect_max: int
    expect_timeout_s: int

    def __post_init__(self) -> None:
        if not is_helper_name(self.name):
            raise ValueError(f"not a policy name of at most {NAME_MAX_BYTES} bytes: {self.name!r}")
        if not 1 <= self.expect_max <= EXPECT_MAX_LIMIT:
            raise ValueError(f"expect_max must be 1..{EXPECT_MAX_LIMIT}, not {self.expect_max}")
        if not 1 <= self.expect_timeout_s <= 0xFFFFFFFF:
            raise ValueError(f"expect_timeout must be at least 1 s, not {self.expect_timeout_s}")

    def __str__(self) -> str:
        return f"policy {self.name}: expect_max {self.expect_max}, expect_timeout {self.expect_timeout_s} s"


@dataclass(frozen=True, slots=True)
class Registration:
    """A helper as the kernel holds it, host-wide. `priv_data_len` in bytes, 0..32; 1 to 4 policies, in class order."""

    key: HelperKey
    queue_num: int
    status: Status
    policies: tuple[Policy, ...]
    priv_data_len: int

    def __post_init__(self) -> None:
        if not 0 <= self.queue_num <= 0xFFFF:
            raise ValueError(f"queue number must be 0..65535, not {self.queue_num}")
        if not 1 <= len(self.policies) <= POLICIES_MAX:
            raise ValueError(f"a helper has 1 to {POLICIES_MAX} policies, not {len(self.policies)}")
        if not 0 <= self.priv_data_len <= PRIV_DATA_MAX:
            raise ValueError(f"priv_data_len must be 0..{PRIV_DATA_MAX}, not {self.priv_data_len}")

    def can_become(self, other: Registration) -> bool:
        """True if an update in place leads there; else the kernel answers EBUSY and a replace is needed."""
        return (
            self.key == other.key
            and self.priv_data_len == other.priv_data_len
            and [p.name for p in self.policies] == [p.name for p in other.policies]
        )


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 0xFFFF:
            raise ValueError(f"not a port range: {self.first}-{self.last}")

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, order=True)
class Attachment:
    """Connections that get a helper: one path, one family, one protocol; empty addresses and interface mean any.

    `interface` is the input interface on the incoming path and the output interface on the outgoing one.
    Addresses are prefixes in their canonical text (`10.0.0.0/8`, `fd00::1`); ports are those sent by the client.
    """

    key: HelperKey
    path: Path
    ports: tuple[PortRange, ...]
    interface: str = ""
    saddr: tuple[str, ...] = ()
    daddr: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an expectation may open; its destination is an end of the master connection unless `is_any_destination`."""

    ports: PortRange
    is_any_source: bool = False
    is_any_destination: bool = False
    is_permanent: bool = False


CONFIRM_MAX_S = 3600
"""Longest that an apply may wait for its confirmation, in seconds: nothing else can be applied meanwhile."""

LABEL_BITS = 128
"""Label bits of a connection, shared with whoever else uses some. Source: xt_connlabel.h, XT_CONNLABEL_MAXBIT."""


@dataclass(frozen=True, slots=True)
class RuleQueue:
    """How rules queue the packets of one helper (mode `rules`).

    Connections attached to `keys` get the connection label bit `label` (0..127); packets with a payload of labelled
    connections go to `queue_num`, which fails open. TCP connections whose sequence numbers were adjusted go to
    `adjusted_queue_num`, which does not, because an ACCEPT by the kernel would adjust them twice; None without TCP.
    `triggers` is empty if every payload is queued, else what a payload must begin with, 1 to 4 bytes each.
    `is_multicast`: this host asks a multicast group, and its packets are queued in the output hook.
    """

    helper: str
    keys: tuple[HelperKey, ...]
    label: int
    queue_num: int
    adjusted_queue_num: int | None
    triggers: tuple[bytes, ...] = ()
    is_multicast: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label < LABEL_BITS:
            raise ValueError(f"connection label must be 0..{LABEL_BITS - 1}, not {self.label}")
        if not all(1 <= len(trigger) <= TRIGGER_MAX_BYTES for trigger in self.triggers):
            raise ValueError(f"a trigger has 1 to {TRIGGER_MAX_BYTES} bytes")

    @property
    def queues(self) -> tuple[int, ...]:
        return (self.queue_num,) if self.adjusted_queue_num is None else (self.queue_num, self.adjusted_queue_num)


@dataclass(frozen=True, slots=True)
class NativeHelper:
    """What a native helper process is told, rendered as `helper-NAME.toml`.

    `use` is what the profile calls it: one of our helpers or an installed one. `file` is the absolute path of the
    user's own, and `source` what it contained when it was described (both empty otherwise): the document
    `helper-NAME.py`, which is what runs, whatever becomes of the file. `names` are its registrations' names, `queues`
    the numbers it binds, the first failing open; in mode rules the second does not. `label` is None in mode
    registration. `user` is whom it runs as, empty for a user of its own, `memory_bytes` what it may have of memory.
    `inspect` says which payloads come.
    """

    name: str
    use: str
    file: str
    source: str
    queueing: Queueing
    inspect: Inspect
    names: tuple[str, ...]
    queues: tuple[int, ...]
    label: int | None
    bounds: Bounds
    user: str
    memory_bytes: int

    @property
    def sha256(self) -> str:
        """Of `source`, empty without a file."""
        return sha256(self.source.encode()).hexdigest() if self.file else ""


HELPER_PROGRAM = "orch-helper"
"""How the command line of a native helper process begins; the launcher knows which program that is."""

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs of others are looked for."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A helper process: `argv` runs in the runtime directory of the profile, next to `files` (documents by name).

    It is ready when all `queues` are bound in its namespace. `keys` are the registrations to disable when it dies, and
    `enables` those of them to enable when it is ready again. It is started again `restart_limit` times at most within
    `restart_window_s`.
    """

    name: str
    argv: tuple[str, ...]
    files: tuple[str, ...]
    queues: tuple[int, ...]
    keys: tuple[HelperKey, ...]
    enables: tuple[HelperKey, ...] = ()
    ready_within_s: int = 30
    restart: Restart = Restart.ON_FAILURE
    restart_limit: int = 10
    restart_window_s: int = 600


@dataclass(frozen=True, slots=True)
class Netns:
    """A network namespace: `label` is how people call it, `identity` the device and inode of its nsfs file.

    `path` opens it again; empty means the namespace that orch itself runs in.
    """

    label: str
    path: str
    identity: str

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class Helper:
    """One helper of a profile after every default was taken: what it is called, who runs it, and where it is attached.

    `keys` are the registrations that rules attach; `stock_keys` those that the engine insists on and nobody attaches.
    """

    name: str
    use: str
    engine: Engine
    keys: tuple[HelperKey, ...]
    stock_keys: tuple[HelperKey, ...]
    attachments: tuple[Attachment, ...]
    modules: tuple[str, ...]
    queueing: Queueing = Queueing.REGISTRATION


@dataclass(frozen=True, slots=True)
class Desired:
    """What a profile asks for, complete and without a default left open.

    `registrations` and `processes` are what the templates are given; the rendered documents are what counts
    (render.py parses them back). `stock` are registrations that an engine insists on and no rule attaches: only that
    they exist, with these policy names and this private data length, and are disabled, matters. `netns` is a name, a
    path, or empty for the caller's. `warnings` are for people. With `confirm_within_s` above 0 an apply is undone
    after so many seconds unless somebody confirms it; that is no part of what is applied.
    """

    profile: str
    source: str
    netns: str
    backend: Backend
    helpers: tuple[Helper, ...]
    registrations: tuple[Registration, ...]
    stock: tuple[Registration, ...]
    processes: tuple[ProcessSpec, ...]
    warnings: tuple[str, ...] = ()
    rule_queues: tuple[RuleQueue, ...] = ()
    natives: tuple[NativeHelper, ...] = ()
    families: tuple[L3Proto, ...] = tuple(L3Proto)
    reconcile: bool = False
    confirm_within_s: int = 0

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        return tuple(a for helper in self.helpers for a in helper.attachments)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted({m for helper in self.helpers for m in helper.modules}))


@dataclass(frozen=True, slots=True)
class Document:
    """One rendered text, by its file name."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a profile as they are loaded: one nft document, or one iptables document per family."""

    backend: Backend
    profile: str
    digest: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Rules as the system lists them, normalised: equal listings mean equal rules.

    `digest` is the one written into a rule's comment at load time, empty if there is none. `text` is for people and
    compared as it is. `helpers` names the registrations that the rules refer to.
    """

    backend: Backend
    digest: str
    text: str
    helpers: frozenset[HelperKey]


@dataclass(frozen=True, slots=True)
class QueueRow:
    """One bound NFQUEUE of a namespace. Source: nfnetlink_queue.c, seq_show; `seen` restarts at each bind.

    Between bind and configuration `copy_mode` is 0: packets are dropped, not passed. 2 means that they are delivered.
    """

    queue_num: int
    port_id: int
    waiting: int
    queue_dropped: int
    user_dropped: int
    seen: int
    copy_mode: int = 2

    @property
    def is_ready(self) -> bool:
        return self.copy_mode == 2


@dataclass(frozen=True, slots=True)
class Target:
    """What the rendered documents of a profile say, parsed back: this, and nothing else, is what apply makes true."""

    profile: str
    documents: tuple[Document, ...]
    registrations: tuple[Registration, ...]
    stock: tuple[Registration, ...]
    rules: Rules
    processes: tuple[ProcessSpec, ...]
    modules: tuple[str, ...]
    attachments: tuple[Attachment, ...]
    rule_queues: tuple[RuleQueue, ...] = ()
    reconcile: bool = False

    @property
    def attaches_by_iptables(self) -> bool:
        """Whether its rules are such as some kernels make idle (release.idles_iptables)."""
        return bool(self.attachments) and not self.rules.backend.is_nftables
