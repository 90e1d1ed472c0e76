"""Any text and any bytes give a desired state or a ProfileError, never another exception."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import Problem, ProfileError
from orchestrator.model import Desired
from orchestrator.profile import load
from tests.examples import many

EXAMPLES = [
    path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml"))
]
WORDS = (
    "profile", "netns", "backend", "families", "helpers", "use", "engine", "name", "attach", "queueing", "queue",
    "policies", "path", "ports", "iif", "oif", "saddr", "daddr", "l4proto", "expect_max", "expect_timeout", "ftp",
    "tftp", "rpc", "ssdp", "sip", "h323", "kernel", "conntrackd", "native", "label", "inspect", "triggers", "guard",
    "strict", "process", "user", "source", "any", "./steam.py", "ip", "ip6", "incoming", "outgoing", "tcp", "udp",
    "lan0", "10.0.0.0/8", "fd00::/8", "0.0.0.0/0", "69-70", "5m", "auto", "rules", "no", "&a", "*a", "<<", "!!int",
)  # fmt: skip
PUNCTUATION = (
    ": ",
    "\n",
    "\n  ",
    "\n    ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "'",
    '"',
    "\\",
    "?",
    "|",
    "---\n",
    "\t",
    "#",
)


def outcome(text: str | bytes) -> Desired | tuple[Problem, ...]:
    try:
        return load(text, "any.yaml")
    except ProfileError as error:
        problems = error.problems
    printed = "".join(problem.place + problem.message + problem.hint for problem in problems)
    assert printed
    assert printed.isprintable()
    return problems


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text(text: str) -> None:
    outcome(text)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes(raw: bytes) -> None:
    outcome(raw)


@settings(deadline=None, max_examples=many(400))
@given(st.lists(st.sampled_from((*WORDS, *PUNCTUATION)), max_size=40).map("".join))
def test_any_sequence_of_words_of_a_profile(text: str) -> None:
    outcome(text)


@settings(deadline=None, max_examples=many(300))
@given(st.sampled_from(EXAMPLES), st.integers(0, 2000), st.integers(0, 30), st.text(max_size=5))
def test_any_damage_to_an_example(example: str, start: int, length: int, patch: str) -> None:
    outcome(example[:start] + patch + example[start + length :])


DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def inside(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Values, and lists and mappings of them: much cheaper than a recursive strategy."""
    return values | st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(WORDS), values, max_size=3)


values = inside(
    st.sampled_from((None, False, True, *WORDS)) | st.integers() | st.text(max_size=5),
)
nested = inside(values)
entries = st.dictionaries(
    st.sampled_from(["path", "ports", "iif", "oif", "saddr", "daddr", "l4proto"]), values, max_size=4
)
profiles = st.fixed_dictionaries(
    {
        "profile": st.just("any") | values,
        "helpers": nested
        | st.dictionaries(
            st.sampled_from(["ftp", "tftp", "rpc", "ssdp", "sip", "boot"]),
            st.fixed_dictionaries(
                {},
                optional={
                    "use": st.sampled_from(["ftp", "tftp"]) | values,
                    "engine": st.sampled_from(["kernel", "conntrackd", "native"]) | values,
                    "name": st.sampled_from(["tftp", "boot", "sip"]) | values,
                    "attach": st.lists(entries, max_size=3) | entries | nested,
                    "queue": st.integers(0, 65535) | values,
                    "label": st.integers(0, 127) | values,
                    "inspect": st.sampled_from(["payload", "triggers"]) | values,
                    "queueing": st.sampled_from(["rules", "registration"]) | values,
                    "guard": st.just("strict")
                    | st.dictionaries(st.sampled_from(["ports", "source", "destination", "permanent"]), values)
                    | nested,
                    "process": st.fixed_dictionaries({"user": values}) | values,
                    "policies": nested,
                },
            ),
        ),
    },
    optional={"families": values, "netns": values, "backend": values, "any": values},
)


@settings(deadline=None, max_examples=many(600), suppress_health_check=[HealthCheck.too_slow])
@given(profiles)
def test_any_value_of_any_type_in_any_place(data: object) -> None:
    outcome(yaml.dump(data, Dumper=DUMPER))


@settings(deadline=None)
@given(st.permutations(["tftp: {}", "ssdp: {}", "rpc: {}", "sip: {}", "ftp: {}"]))
def test_the_order_of_helpers_changes_no_registration(order: list[str]) -> None:
    head = "profile: any\nhelpers:\n"
    one, other = (load(head + "".join(f"  {h}\n" for h in helpers), "any.yaml") for helpers in (order, sorted(order)))
    assert (one.registrations, one.stock, one.processes) == (other.registrations, other.stock, other.processes)
    assert (one.rule_queues, one.natives) == (other.rule_queues, other.natives)
