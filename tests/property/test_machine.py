"""Random histories of a host, on the fake, against a model: who has what applied where, and what others have."""

from __future__ import annotations

import errno
import itertools
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator import confirm, drift
from orchestrator.errors import KernelError, OrchError, RollbackError
from orchestrator.fake import FakeKernel
from orchestrator.model import HelperKey, L3Proto, L4Proto, QueueRow, Status
from orchestrator.reports import Trial
from tests.faults import FOREIGN, KILL, MEMORY, SIGNAL, Fault, apply, at_rest, of_others, run
from tests.hosts import Harness, both

HELPERS = {
    "ftp": [
        *("{engine: conntrackd}", "{queueing: registration}", "{queueing: registration, queue: 77}", "{}"),
        "{engine: kernel}",
    ],
    "tftp": ["{queueing: registration}", "{queueing: registration, policies: {tftp: {expect_max: 5}}}", "{}"],
}
MODULE = "nf_conntrack_ftp"
SPACES = ("blue", "red")
PROFILES = ("one", "two")
places = st.tuples(st.sampled_from(PROFILES), st.sampled_from(SPACES))


@st.composite
def helpers(draw: st.DrawFn) -> str:
    """The helpers of a profile; two profiles of a namespace may want the same, and the second is refused then."""
    names = draw(st.lists(st.sampled_from(sorted(HELPERS)), min_size=1, unique=True))
    lines = "".join(f"  {name}: {draw(st.sampled_from(HELPERS[name]))}\n" for name in names)
    return lines + draw(st.sampled_from(["", "", "backend: iptables-nft\n"]))


class Host(RuleBasedStateMachine):
    """`applied` is what was made true last, by (profile, namespace). `is_broken`: somebody has changed some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(dir=MEMORY)
        self.identities = itertools.count(1)
        self.kernel = FakeKernel(modules_available={MODULE: (("ftp", L4Proto.TCP),), "nf_nat_ftp": ()})
        self.kernel.registrations[FOREIGN.key] = FOREIGN
        for name in SPACES:
            self.add_namespace(name)
        self.orch = Harness(self.kernel.system(), Path(self.directory.name) / "state")
        self.applied: dict[tuple[str, str], str] = {}
        self.is_broken = False

    @initialize(is_new=st.booleans())
    def boot(self, *, is_new: bool) -> None:
        """7.3 unregisters what rules refer to."""
        self.kernel.delete_ignores_references = is_new
        self.kernel.release = "7.3.0-fake" if is_new else "6.1.0-fake"

    def teardown(self) -> None:
        """In the end all that orch has can be taken away, and what others have is left."""
        self.orch.teardown(every_netns=True)
        rest = [line for line in self.kernel.dump_text().splitlines() if not line.startswith("module ")]
        assert sorted(rest) == of_others(self.kernel)
        self.directory.cleanup()

    def add_namespace(self, name: str) -> None:
        netns = self.kernel.add_netns(name)
        space = self.kernel.namespaces[name]
        space.netns = replace(netns, identity=f"4:{next(self.identities)}")
        space.queues[FOREIGN.queue_num] = QueueRow(FOREIGN.queue_num, 4711, 0, 0, 0, 0)
        space.foreign_references.add(FOREIGN.key.name)

    # -- what orch is told to do --------------------------------------------------------------------------------------

    @rule(place=places, helpers=helpers())
    def apply(self, place: tuple[str, str], helpers: str) -> None:
        self.try_to_apply(place, f"profile: {place[0]}\nhelpers:\n{helpers}")

    @rule(number=st.integers(0, 3))
    def share(self, number: int) -> None:
        """A profile is applied in the other namespace as well: both use the same registrations."""
        for (name, netns), text in list(self.applied.items())[number : number + 1]:
            self.try_to_apply((name, SPACES[netns == SPACES[0]]), text)

    @rule(place=places, helpers=helpers(), is_kept=st.booleans())
    def try_out(self, place: tuple[str, str], helpers: str, *, is_kept: bool) -> None:
        """An apply on trial is confirmed, or rolled back; one that would change nothing but drift is none."""
        text, app = f"profile: {place[0]}\nhelpers:\n{helpers}", self.orch.app(place[1])
        with suppress(OrchError):
            report = app.apply(*both(text), ask=False, trial=Trial(60, lambda: None))
            if report.pending is None or is_kept:
                self.applied[place] = text
            if report.pending is not None and is_kept:
                confirm.confirm(app, place[0])
            elif report.pending is not None:
                confirm.roll_back(app, place[0], to=None, ask=False)

    @rule(place=places)
    def take_down(self, place: tuple[str, str]) -> None:
        if self.is_torn_down(place):
            self.applied.pop(place, None)

    def is_torn_down(self, place: tuple[str, str]) -> bool:
        self.orch.teardown(*place)
        return True

    def is_waiting(self) -> bool:
        """Whether something has to be confirmed."""
        return False

    @rule(
        place=places,
        helpers=helpers(),
        event=st.integers(0, 40),
        fault=st.sampled_from([KILL, SIGNAL, Fault(errno.EPERM)]),
        dies=st.integers(0, 5),
    )
    def fail(self, place: tuple[str, str], helpers: str, event: int, fault: Fault, dies: int) -> None:
        """An apply is killed, stopped, or a call fails; all is as before then, at the latest with the next command.

        Before that a process may die, if there are as many.
        """
        text = f"profile: {place[0]}\nhelpers:\n{helpers}"
        if run(self.orch, self.kernel, apply(text, place[1]), {event: fault}).is_done:
            self.applied[place] = text
        self.kill_process(dies)
        self.settle(place[1])

    @rule(place=places, event=st.integers(0, 20), dies=st.integers(0, 5))
    def die_in_teardown(self, place: tuple[str, str], event: int, dies: int) -> None:
        """The next command finishes it, if it had begun."""
        run(self.orch, self.kernel, lambda orch, _: orch.teardown(*place), {event: KILL})
        self.kill_process(dies)
        self.settle(place[1])
        if place not in self.known():
            self.applied.pop(place, None)

    @rule(place=places)
    def watch(self, place: tuple[str, str]) -> None:
        """A profile that is mended is as it was applied."""
        app = self.orch.app(place[1])
        for applied in app.applied(place[0]):
            self.kernel.now += 0 if self.is_waiting() else 60
            report = drift.mend(app, applied.owner, drift.Limits())
            status = self.orch.status()
            if report.outcome in (drift.Outcome.RIGHT, drift.Outcome.MENDED) and not report.is_partial:
                assert not any(profile.drift for profile in status.profiles if profile.owner == applied.owner)
            self.is_broken = self.is_broken and not status.is_right

    @precondition(lambda self: not self.is_waiting())
    @rule()
    def mend(self) -> None:
        """Everything is applied once more; where that is refused, as others block it, it is taken down before.

        And again: what waited for others, and those were taken down, does not any more.
        """
        for place, text in 2 * list(self.applied.items()):
            if place not in self.applied:
                continue
            try:
                self.orch.apply(text, place[1])
            except OrchError:
                self.take_down(place)
        self.is_broken = False

    def try_to_apply(self, place: tuple[str, str], text: str) -> None:
        """It is made true, or refused."""
        with suppress(OrchError):
            self.orch.apply(text, place[1])
            self.applied[place] = text
            assert self.orch.apply(text, place[1]).plan.is_empty

    def settle(self, netns: str) -> None:
        try:
            self.orch.teardown("nobody", netns)
        except RollbackError:
            assert self.is_broken, "what somebody changed cannot always be brought back; all else can"

    # -- what others do -----------------------------------------------------------------------------------------------

    @rule(number=st.integers(0, 3))
    def kill_process(self, number: int) -> None:
        for pid in list(self.kernel.running_processes)[number : number + 1]:
            self.kernel.kill(pid)
            self.is_broken = True

    @rule(netns=st.sampled_from(SPACES))
    def edit_rules(self, netns: str) -> None:
        space = self.kernel.namespaces[netns]
        space.tampered = dict.fromkeys(space.rules, "somebody was here")
        self.is_broken = self.is_broken or bool(space.rules)

    @rule(netns=st.sampled_from(SPACES))
    def flush_ruleset(self, netns: str) -> None:
        space = self.kernel.namespaces[netns]
        self.is_broken = self.is_broken or bool(space.rules)
        space.rules, space.flushed, space.tampered = {}, set(), {}

    @rule(number=st.integers(0, 5))
    def disable_registration(self, number: int) -> None:
        ours = [key for key in sorted(self.kernel.registrations) if key != FOREIGN.key]
        for key in ours[number : number + 1]:
            self.kernel.registrations[key] = replace(self.kernel.registrations[key], status=Status.DISABLED)
            self.is_broken = True

    @rule(number=st.integers(0, 5))
    def edit_registration(self, number: int) -> None:
        ours = [key for key in sorted(self.kernel.registrations) if key != FOREIGN.key]
        for key in ours[number : number + 1]:
            seen = self.kernel.registrations[key]
            policies = tuple(replace(policy, expect_max=policy.expect_max + 1) for policy in seen.policies)
            self.kernel.registrations[key] = replace(seen, policies=policies)
            self.is_broken = True

    @rule(number=st.integers(0, 5))
    def take_over_registration(self, number: int) -> None:
        """A neighbour makes it anew, with data of another length; before 7.3 it can only where no rule refers to it.

        On 6.1 that would make iptables rules idle, and nothing could be done about it.
        """
        rules = [at for space in self.kernel.namespaces.values() for at in space.rules]
        if not self.kernel.delete_ignores_references and any(not backend.is_nftables for backend, _ in rules):
            return
        registry = self.kernel.system().registry
        ours = [key for key in sorted(self.kernel.registrations) if key != FOREIGN.key]
        for key in ours[number : number + 1]:
            seen = self.kernel.registrations[key]
            with suppress(KernelError):
                registry.delete(key)
                registry.create(replace(seen, priv_data_len=seen.priv_data_len ^ 4, status=Status.DISABLED))
                self.is_broken = True

    @rule()
    def load_module(self) -> None:
        """Of the name of a helper that nobody registered; else it does not load."""
        if not any(key.name == "ftp" for key in self.kernel.registrations):
            self.kernel.modules_loaded.add(MODULE)

    @rule()
    def unload_module(self) -> None:
        """Which works while no rule refers to its helper."""
        if not any(self.kernel.is_referenced(HelperKey("ftp", l3proto, L4Proto.TCP)) for l3proto in L3Proto):
            self.kernel.modules_loaded.discard(MODULE)
            self.is_broken = self.is_broken or self.uses_module()

    def uses_module(self) -> bool:
        return any("engine: kernel" in text for text in self.applied.values())

    @precondition(lambda self: not self.is_waiting())
    @rule(netns=st.sampled_from(SPACES))
    def lose_namespace(self, netns: str) -> None:
        """`ip netns del` and `ip netns add`: it lives on without a name while a process does; all is given back."""
        self.kernel.gone.append(self.kernel.namespaces.pop(netns))
        self.add_namespace(netns)
        self.orch.teardown(every_netns=True)
        self.applied.clear()

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_blocked_and_nothing_foreign_touched(self) -> None:
        assert self.kernel.deaf() == []
        assert self.kernel.dangling() == []
        assert (self.kernel.idle(), self.kernel.leaked) == ([], set())
        assert self.kernel.registrations[FOREIGN.key] == FOREIGN
        assert all(FOREIGN.queue_num in space.queues for space in map(self.kernel.namespaces.get, SPACES) if space)

    @invariant()
    def orch_knows_what_is_applied(self) -> None:
        status = self.orch.status()
        assert self.known() == set(self.applied)
        assert self.is_broken or self.is_waiting() or status.is_right
        assert self.is_broken or not any(profile.drift for profile in status.profiles)
        assert self.is_broken or not self.kernel.dead()

    @invariant()
    def registrations_have_their_users(self) -> None:
        wanted: dict[HelperKey, set[tuple[str, str]]] = {}
        for place, text in self.applied.items():
            target = both(text)[1]
            for registration in (*target.registrations, *target.stock):
                wanted.setdefault(registration.key, set()).add(place)
        with self.orch.app().reading() as ledger:
            users = {key: {(o.profile, o.netns.label) for o in owners} for key, owners in ledger.users().items()}
        assert users == wanted
        resting = {registration.key for registration in at_rest(self.kernel)} - set(wanted)
        assert self.is_broken or set(self.kernel.registrations) - {FOREIGN.key} - resting == set(wanted)

    def known(self) -> set[tuple[str, str]]:
        return {(p.owner.profile, p.owner.netns.label) for p in self.orch.status().profiles}


TestHost = Host.TestCase
TestHost.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
