"""What can be wrong with the host as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator import catalogue
from orchestrator.doctor.facts import Facts, Unseen, UnseenError, attaches, listed, nfct, seen
from orchestrator.doctor.findings import Finding, HostProbe, Verdict, note, problem, warning
from orchestrator.model import Engine, HelperKey, Registration
from orchestrator.release import OLDEST, version
from orchestrator.status import HelperState, HelperStatus, ProfileStatus
from orchestrator.verify.trials import is_of_trial

_OLDEST_PYTHON = (3, 11)
_OLDEST_NFTABLES = (1, 0, 6)
MODULES = ("nfnetlink_cthelper", "nfnetlink_queue", "nf_conntrack_netlink", "nft_ct", "nft_queue", "nft_fib")
_ROOT = "run as root on the host"


def kernel(facts: Facts) -> Iterable[Finding]:
    """Before 6.1 helpers have another hook priority (5.14), and automatic assignment (6.0)."""
    release = facts.machine.release
    if version(release) < OLDEST:
        yield problem(f"Linux {release} is older than 6.1, which orch was made for", "boot a newer kernel")


def python(facts: Facts) -> Iterable[Finding]:
    if facts.machine.python < _OLDEST_PYTHON:
        yield problem(f"Python {'.'.join(map(str, facts.machine.python))} is older than 3.11", "install a newer one")


def capabilities(facts: Facts) -> Iterable[Finding]:
    if not facts.machine.has_net_admin:
        yield warning("this process lacks CAP_NET_ADMIN: apply and teardown would fail", _ROOT)


def user_namespace(facts: Facts) -> Iterable[Finding]:
    if not facts.machine.is_initial_userns:
        yield problem(
            "this is a user namespace: the helper registry belongs to the host, and root here may not even read it",
            "apply on the host with --netns; rules inside work once the host has registered the helper",
        )


def modules(facts: Facts) -> Iterable[Finding]:
    """What the kernel needs for this; with --probe the kernel itself has answered."""
    if facts.answers is not None:
        yield from _answered(facts, facts.answers)
        return
    missing = [name for name in MODULES if name not in facts.available]
    if missing and not facts.machine.modules_dir:
        raise UnseenError(f"{listed(missing)}: not loaded, and there is no list of modules; --probe asks the kernel")
    waiting = [name for name in MODULES if name not in facts.loaded]
    if waiting and not facts.machine.is_loading_allowed:
        yield problem(f"{listed(waiting)}: not loaded, and loading is off until reboot", "reboot, and load them first")
    elif missing:
        yield problem(f"no kernel module {listed(missing)}", _module_cure(facts))


def _answered(facts: Facts, answers: Mapping[str, str]) -> Iterable[Finding]:
    refused = [name for name, answer in answers.items() if answer.startswith("EPERM")]
    for name, answer in answers.items():
        if answer and name not in refused:
            yield problem(f"the kernel has no {name}, or cannot load it: {answer}", _module_cure(facts))
    if refused:
        yield Finding(Verdict.SKIPPED, f"{listed(refused)}: the kernel answers root of the host only; {_ROOT}")


def _module_cure(facts: Facts) -> str:
    if not facts.machine.programs.get("modprobe"):
        return "install kmod, and the package with all modules of this kernel"
    return "install the package with all modules of this kernel; in a container, load it on the host"


def nftables(facts: Facts) -> Iterable[Finding]:
    found = facts.machine.libnftables
    is_needed = any(a.target.rules.backend.is_nftables for a in facts.applied)
    if not found:
        say = problem if is_needed else warning
        yield say("libnftables is missing: backend nftables cannot be used", "apt-get install libnftables1")
    elif found[0].isdigit() and _numbers(found) < _OLDEST_NFTABLES:
        yield problem(f"libnftables {found} is older than 1.0.6", "install a newer libnftables1")
    else:
        yield note(f"libnftables: {found}")


def programs(facts: Facts) -> Iterable[Finding]:
    """iptables and conntrackd are needed by profiles that ask for them only."""
    for name, user, is_needed in (
        ("iptables", "backend iptables", any(not a.target.rules.backend.is_nftables for a in facts.applied)),
        (
            "conntrackd",
            "engine conntrackd",
            _uses_conntrackd(facts),
        ),
    ):
        found = facts.machine.programs.get(name, "")
        if not found and is_needed:
            yield problem(f"{name} is not installed, and a profile with {user} is applied", f"apt-get install {name}")
        else:
            yield note(f"{name}: {found}" if found else f"{name} is not installed; only {user} needs it")


def seccomp(facts: Facts) -> Iterable[Finding]:
    if not facts.machine.has_seccomp:
        yield problem("libseccomp is missing: native helper processes cannot start", "apt-get install libseccomp2")


def security_modules(facts: Facts) -> Iterable[Finding]:
    active = [name for name in facts.machine.lsm if name in ("selinux", "apparmor")]
    if active:
        yield note(f"{listed(active)} is active: where a process may not start, look into the audit log")


def service_manager(facts: Facts) -> Iterable[Finding]:
    if not facts.machine.has_systemd:
        yield note("systemd is not running: nothing applies profiles at boot but what you set up")


def ledger(facts: Facts) -> Iterable[Finding]:
    trouble = seen(facts.ledger_trouble)
    if trouble:
        yield problem(
            f"the ledger cannot be read: {trouble}",
            "move it aside: apply adopts what it finds, and teardown by profile works",
        )


def journal(facts: Facts) -> Iterable[Finding]:
    status = seen(facts.status)
    for one in status.unsettled:
        yield problem(one.sentence, f"the next orch apply or teardown {one.remedy}")
    if status.working:
        yield note("another orch is at work right now: what is seen may be half of something")


def directories(facts: Facts) -> Iterable[Finding]:
    for path in facts.stale:
        yield warning(f"{path} belongs to no profile and no process", "remove it")


def trials(facts: Facts) -> Iterable[Finding]:
    for name, keys in seen(facts.trials).items():
        left = f", and left {listed(keys)} registered" if keys else ""
        yield warning(f"{name} did not clean up{left}", "orch verify PROFILE, of any profile, takes it away")


def profiles(facts: Facts) -> Iterable[Finding]:
    """Everything that is not as it was applied."""
    status = seen(facts.status)
    for one in status.profiles:
        for line in one.drift:
            apply = one.owner.how_to("apply", one.source, state_dir=facts.state_dir)
            yield problem(f"{one.owner}: {line}", f"{apply}; orch diff shows more")
    for owner in status.unknown:
        yield problem(f"{owner} has rules or processes, and the ledger does not know it", "apply it, or tear it down")


def processes(facts: Facts) -> Iterable[Finding]:
    """Helper processes that are there and do not work; those that are missing are drift."""
    judged = [_process(one, helper, facts.state_dir) for one in seen(facts.status).profiles for helper in one.helpers]
    yield from dict.fromkeys(finding for finding in judged if finding is not None)


def _process(profile: ProfileStatus, helper: HelperStatus, state_dir: Path) -> Finding | None:
    what = f"{profile.owner}: {helper.name}" + (f" (pid {helper.pid})" if helper.pid else "")
    why = f" ({helper.reason})" if helper.reason else ""
    apply = profile.owner.how_to("apply", profile.source, state_dir=state_dir)
    match helper.state:
        case HelperState.FATAL:
            return problem(f"{what} is not restarted any more{why}", f"read its log, then {apply}")
        case HelperState.BACKOFF:
            return warning(f"{what} died and is being restarted{why}", "read its log")
        case HelperState.HUNG:
            return problem(f"{what} hangs: packets wait for it", f"kill -KILL {helper.pid}, then {apply}")
        case HelperState.UNSUPERVISED:
            return warning(f"{what} has no supervisor: nobody would restart it", apply)
        case _:
            return None


def taken_names(facts: Facts) -> Iterable[Finding]:
    """A name belongs to a loaded kernel module or to user space; both at once (7.3) leaves open who is attached."""
    for module, taken in sorted(facts.kernel_helpers.items()):
        twice = [key for key in _keys(facts) if (key.name, key.l4proto) in taken]
        if twice:
            yield problem(
                f"{listed(twice)} is registered, and {module} has the same name: which one is attached is open",
                f"rmmod {module}, or give the helper another name, then orch apply",
            )
    wanted = {
        (engine.name_for(p.l4proto), p.l4proto)
        for entry in catalogue.helpers().values()
        for engine in entry.engines
        if engine.engine is Engine.CONNTRACKD
        for p in entry.protocols
    }
    used = {module for a in facts.applied for module in a.target.modules}
    idle = {module: taken & wanted for module, taken in facts.kernel_helpers.items() if module not in used}
    names = [f"{name}/{l4proto}" for taken in idle.values() for name, l4proto in taken]
    if names and (_uses_conntrackd(facts) or facts.machine.programs.get("conntrackd")):
        yield warning(
            f"the kernel's own helpers hold {listed(names)}: engine conntrackd cannot register them",
            f"unless rules use them: rmmod {' '.join(sorted(m for m, t in idle.items() if t))}{facts.but_when};"
            " or use engine native",
        )


def _uses_conntrackd(facts: Facts) -> bool:
    return any(h.engine is Engine.CONNTRACKD for a in facts.applied for h in a.helpers)


def _keys(facts: Facts) -> tuple[HelperKey, ...]:
    return tuple(r.key for r in facts.registrations) if not isinstance(facts.registrations, Unseen) else ()


def registrations(facts: Facts) -> Iterable[Finding]:
    """Registrations that nobody attaches, that orch did not make, or that crash who serves them."""
    stock = {r.key for a in facts.applied for r in a.target.stock}
    used = {r.key for a in facts.applied for r in a.registrations}
    for registration in seen(facts.registrations):
        key = registration.key
        if is_of_trial(key):
            continue
        is_ours = key in facts.recorded
        if not is_ours and registration.priv_data_len < _private_len(key):
            yield problem(
                f"{key} has {registration.priv_data_len} bytes of private data: conntrackd crashes on its packets",
                f"{nfct('delete', key)}{facts.but_when}, and register it anew with {_private_len(key)}",
            )
        if key in stock or not facts.is_whole or _is_attached(facts, registration):
            continue
        if is_ours and key not in used and facts.but_when:
            yield note(f"{key} stays registered while iptables rules are loaded, as those would be idle after it")
        elif is_ours:
            yield warning(f"{key} is registered by orch, and no rule attaches it", "orch apply, or orch teardown")
        else:
            yield warning(
                f"{key} ({registration.status}, queue {registration.queue_num}) is not orch's, and no rule attaches it",
                f"if nobody needs it: {nfct('delete', key)}{facts.but_when}",
            )


def _is_attached(facts: Facts, registration: Registration) -> bool:
    return any(attaches(rule, registration) for place in facts.places for rule in seen(place.rules))


def _private_len(key: HelperKey) -> int:
    """Bytes that conntrackd's plugin of that name needs; 0 if it has none."""
    return next(
        (
            engine.private_len
            for entry in catalogue.helpers().values()
            for engine in entry.engines
            if engine.engine is Engine.CONNTRACKD and (key.l4proto, key.name) in engine.names
        ),
        0,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


HOST_PROBES = (
    HostProbe("kernel", "Linux is 6.1 or newer", kernel),
    HostProbe("python", "Python is 3.11 or newer", python),
    HostProbe("capabilities", "CAP_NET_ADMIN is there", capabilities),
    HostProbe("user namespace", "this is the user namespace of the host", user_namespace),
    HostProbe("modules", "the kernel has every module that is needed", modules),
    HostProbe("nftables", "libnftables is there", nftables),
    HostProbe("programs", "the programs are there", programs),
    HostProbe("seccomp", "libseccomp is there", seccomp),
    HostProbe("security modules", "neither SELinux nor AppArmor is active", security_modules),
    HostProbe("service manager", "systemd is running", service_manager),
    HostProbe("ledger", "the ledger can be read", ledger),
    HostProbe("journal", "no command was left unfinished", journal),
    HostProbe("directories", "nothing is left over in the state directory", directories),
    HostProbe("trials", "every orch verify cleaned up", trials),
    HostProbe("profiles", "every profile is as it was applied", profiles),
    HostProbe("processes", "every helper process is supervised and runs", processes),
    HostProbe("names", "no kernel module holds a name that a helper needs", taken_names),
    HostProbe("registrations", "every registration is known and attached", registrations),
)
