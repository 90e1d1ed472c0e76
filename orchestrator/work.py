"""What commands that write share: the system, the ledger, which they have locked, and how they speak.

Namespaces come and go, and the kernel gives the identity of one that is gone to another: the ledger is kept true to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.errors import OrchError
from orchestrator.execute import EXPECTED
from orchestrator.journal import Ledger
from orchestrator.model import HelperKey, Netns
from orchestrator.observe import Observer
from orchestrator.ports import System
from orchestrator.reports import Talk
from orchestrator.state import Owner, Plan


@dataclass(frozen=True, slots=True)
class Work:
    system: System
    ledger: Ledger
    talk: Talk

    @property
    def observer(self) -> Observer:
        return Observer(self.system, self.ledger)

    def live_keys(self) -> tuple[HelperKey, ...]:
        return tuple(r.key for r in self.system.registry.dump())

    def ask(self, plan: Plan) -> bool:
        """Whether the plan is wanted, with what it costs."""
        if plan.cut == 1:
            return self.talk.confirm(plan, "1 live connection loses its helper.")
        return self.talk.confirm(plan, f"{plan.cut} live connections lose their helper." if plan.cut else "")

    def settle_undone(self, tx: int) -> None:
        """Nothing is left of a transaction. If that cannot be written (full disk), the next command undoes it again."""
        with contextlib.suppress(OrchError):
            self.ledger.settle(tx)

    def clean_up(self, owner: Owner) -> tuple[str, ...]:
        """End the supervisor, and take its files away; a sentence if that fails."""
        try:
            self.system.processes.cleanup(owner.profile, owner.netns)
        except EXPECTED as error:
            return (f"clean up after {owner}: {error}",)
        return ()

    def reachable(self, owner: Owner) -> Owner:
        """A namespace whose name is gone has another one, or lives on while orch, or a process of ours, runs in it."""
        owner = self.observer.current(owner)
        if self.observer.is_there(owner.netns):
            return owner
        path = owner.netns.path
        inside = [p.pid for p in self.system.processes.running() if p.pid and p.netns == owner.netns.identity]
        if (here := self.system.host.find_netns("")).identity == owner.netns.identity:
            path = here.path
        elif inside:
            path = f"/proc/{inside[0]}/ns/net"
        return replace(owner, netns=replace(owner.netns, path=path))

    def recognise(self, netns: Netns) -> None:
        """From now on the ledger knows this namespace, and not an earlier one with its identity."""
        self.forget_replaced((netns,))
        self.ledger.recognise(netns, self.system.host.netns_cookie(netns))

    def forget_replaced(self, places: Iterable[Netns]) -> None:
        """The kernel gives the inode of a deleted namespace to another one: that one has nothing of ours."""
        for netns in filter(self.observer.is_another, places):
            for owner in self.ledger.owners():
                if owner.netns.identity != netns.identity:
                    continue
                for sentence in self.clean_up(owner):
                    self.talk.warn(sentence)
                self.ledger.settle_removed(None, owner, live=self.live_keys())
                self.talk.warn(f"netns {owner.netns} is gone, and profile {owner.profile} with it")

    def forget_history(self) -> None:
        """Where a namespace is gone nothing can be applied again."""
        applied = {(owner.profile, owner.netns.identity) for owner in self.ledger.owners()}
        for owner in self.ledger.remembered():
            if (owner.profile, owner.netns.identity) not in applied and not self.observer.is_there(
                self.observer.current(owner).netns
            ):
                self.ledger.forget_history(owner)
