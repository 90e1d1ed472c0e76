"""Whether a rule of somebody else, which stands before the jump to ours, takes what an attachment is about."""

from __future__ import annotations

from ipaddress import ip_network

from orchestrator.model import Attachment
from orchestrator.ports import EarlierRule


def takes(rule: EarlierRule, attachment: Attachment) -> bool:
    """True if all connections of an attachment meet the conditions of a rule, as far as those are known."""
    key = attachment.key
    return (
        (rule.path, rule.l3proto) == (attachment.path, key.l3proto)
        and rule.l4proto in (None, key.l4proto)
        and rule.interface in ("", attachment.interface)
        and all(_is_any_of(ports.first, ports.last, rule) for ports in attachment.ports)
        and _is_within(attachment.saddr, rule.saddr)
        and _is_within(attachment.daddr, rule.daddr)
    )


def _is_any_of(first: int, last: int, rule: EarlierRule) -> bool:
    return not rule.ports or any(ports.first <= first and last <= ports.last for ports in rule.ports)


def _is_within(addresses: tuple[str, ...], prefix: str) -> bool:
    if not prefix:
        return True
    around = ip_network(prefix)
    networks = [ip_network(address) for address in addresses]
    return bool(networks) and all(n.network_address in around and n.prefixlen >= around.prefixlen for n in networks)
