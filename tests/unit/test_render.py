"""Rendering: what is parsed back, what a user's own templates may do, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import launches, profile, render
from orchestrator.document import problems_of_iptables, problems_of_nft
from orchestrator.engine import settings
from orchestrator.errors import ProfileError
from orchestrator.model import Desired, Netns

DESIRED = profile.load("profile: edge\nhelpers: {ftp: {engine: conntrackd}, tftp: {engine: kernel}}", "p.yaml")
NATIVE = profile.load("profile: edge\nhelpers: {ftp: {}, tftp: {}}", "p.yaml")
DIGEST = "0123456789abcdef"


def text_of(desired: Desired, name: str, *, template_dir: Path | None = None) -> str:
    return {d.name: d.text for d in render.render(desired, template_dir=template_dir)}[name]


def refusal(template: str, text: str, tmp_path: Path, *, desired: Desired = DESIRED) -> ProfileError:
    (tmp_path / f"{template}.j2").write_text(text)
    with pytest.raises(ProfileError) as caught:
        render.target(desired, template_dir=tmp_path)
    return caught.value


def test_the_digest_changes_with_the_rules_and_with_nothing_else() -> None:
    digest = render.target(DESIRED).rules.digest
    assert digest == render.target(replace(DESIRED, warnings=("w",), source="q.yaml")).rules.digest
    assert digest != render.target(replace(DESIRED, helpers=DESIRED.helpers[:1])).rules.digest
    assert digest != render.target(replace(DESIRED, profile="lan")).rules.digest


def test_a_profile_that_attaches_nothing_still_has_a_digest() -> None:
    helpers = tuple(replace(h, attachments=()) for h in DESIRED.helpers)
    for backend in type(DESIRED.backend):
        rules = render.target(replace(DESIRED, helpers=helpers, backend=backend)).rules
        assert rules.digest in rules.documents[0].text


def test_registrations_are_those_of_the_document_not_of_the_profile(tmp_path: Path) -> None:
    own = Path(render.__file__).parents[1] / "templates" / "registrations.yaml.j2"
    (tmp_path / own.name).write_text(own.read_text().replace("{{ r.queue_num }}", "{{ r.queue_num + 1 }}"))
    target = render.target(DESIRED, template_dir=tmp_path)
    assert [r.queue_num for r in target.registrations] == [r.queue_num + 1 for r in DESIRED.registrations]


def test_a_template_of_the_user_replaces_one_file_only(tmp_path: Path) -> None:
    (tmp_path / "conntrackd.conf.j2").write_text("# of {{ view.profile }}\n")
    documents = {d.name: d.text for d in render.render(DESIRED, template_dir=tmp_path)}
    assert documents["conntrackd.conf"] == "# of edge\n"
    assert documents["ruleset.nft"] == text_of(DESIRED, "ruleset.nft")


@pytest.mark.parametrize(
    "name",
    ["no", "yes", "on", "null", "true", "y"],
)
def test_a_name_that_yaml_would_take_for_something_else_comes_back_as_it_is(name: str) -> None:
    text = f"profile: edge\nhelpers: {{x: {{use: ftp, name: '{name}'}}}}"
    target = render.target(profile.load(text, "p.yaml"))
    assert {r.key.name for r in target.registrations} == {name}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a\n{% if %}\n", 2, "Expected an expression"),
        ("a\n\n{{ view.nosuch }}\n", 3, "nosuch"),
        ("{{ 1 / 0 }}", 1, "division"),
        ("a\n{{ view.__class__.__mro__ }}", 2, "unsafe"),
        ("{% include 'nosuch' %}", 1, "nosuch"),
    ],
)
def test_a_template_that_does_not_render_is_named_with_its_line(
    text: str, line: int, message: str, tmp_path: Path
) -> None:
    error = refusal("conntrackd.conf", text, tmp_path)
    assert (error.problems[0].source, error.problems[0].line) == (str(tmp_path / "conntrackd.conf.j2"), line)
    assert message in error.problems[0].message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("registrations: [", "line 2: did not find expected node content"),
        ("registrations: []", "missing or unknown: stock"),
        ("registrations: {}\nstock: []", "registrations: must be a list"),
        ("registrations: [{name: ftp}]\nstock: []", "registrations[0]: missing or unknown: l3proto"),
        ("- 1", "must be a mapping of registrations, stock"),
        (
            "stock: []\nregistrations: [{name: ftp, l3proto: ip, l4proto: tcp, queue_num: '1', status: enabled, "
            "priv_data_len: 0, policies: []}]",
            "registrations[0]: queue_num: must be a number, not '1'",
        ),
        (
            "stock: []\nregistrations: [{name: ftp, l3proto: ip, l4proto: tcp, queue_num: 1, status: enabled, "
            "priv_data_len: 33, policies: [{name: a, expect_max: 1, expect_timeout_s: 1}]}]",
            "registrations[0]: priv_data_len must be 0..32, not 33",
        ),
    ],
)
def test_registrations_that_are_none_are_refused(text: str, message: str, tmp_path: Path) -> None:
    error = refusal("registrations.yaml", text, tmp_path)
    assert message in error.problems[0].message
    assert error.problems[0].source == str(tmp_path / "registrations.yaml.j2")


def test_processes_that_are_none_are_refused(tmp_path: Path) -> None:
    error = refusal(
        "supervise.yaml",
        "processes: [{name: a, argv: [1], files: [], queues: [], keys: [], enables: [], ready_within_s: 1,"
        " restart: never, restart_limit: 1, restart_window_s: 1}]",
        tmp_path,
    )
    assert "processes[0]: argv: must be text, not 1" in error.problems[0].message


def test_a_missing_template_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such template directory"):
        render.render(DESIRED, template_dir=tmp_path / "nosuch")


GOOD_NFT = f"""table inet orch-x
flush table inet orch-x; # table ip y
table inet orch-x {{
    chain about {{ continue comment "orch profile=x digest={DIGEST}"; }}
    chain c {{ tcp dport {{ 1, 2 }} log prefix "}} flush ruleset" accept; }}
}}
"""


def test_a_ruleset_of_the_own_table_alone_is_accepted() -> None:
    assert list(problems_of_nft(GOOD_NFT, "x", DIGEST)) == []


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("flush ruleset", 7),
        ("\ntable inet orch-y { }", 8),
        ("table ip orch-x { }", 7),
        ("delete table inet orch-x", 7),
        ("define a = 1", 7),
        ("include '/etc/passwd'", 7),
        ('table inet orch-x { include "/etc/passwd"\n}', 7),
        ("} flush ruleset", 7),
        ("table inet orch-x {", 7),
        ("add rule ip filter INPUT accept; table inet orch-x", 7),
    ],
)
def test_a_ruleset_that_touches_anything_else_is_refused(extra: str, line: int) -> None:
    assert [number for number, _ in problems_of_nft(GOOD_NFT + extra, "x", DIGEST)][:1] == [line]


def test_a_ruleset_without_table_or_digest_is_refused() -> None:
    assert next(m for _, m in problems_of_nft("", "x", DIGEST)) == "there is no table inet orch-x"
    assert len(list(problems_of_nft("", "x", DIGEST))) == 2


GOOD_IPTABLES = f"""# comment
*raw
:orch-x-pre - [0:0]
-A orch-x-pre -m comment --comment "orch profile=x digest={DIGEST}"
-A PREROUTING -i lan0 -j orch-x-pre
COMMIT
"""


def test_iptables_rules_of_the_own_chains_alone_are_accepted() -> None:
    assert list(problems_of_iptables(GOOD_IPTABLES, "x", DIGEST)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (":orch-x-pre - [0:0]", ":PREROUTING DROP [0:0]"),
        (":orch-x-pre - [0:0]", ":orch-xy-pre - [0:0]"),
        ("-A PREROUTING -i lan0 -j orch-x-pre", "-A PREROUTING -j DROP"),
        ("-A PREROUTING -i lan0 -j orch-x-pre", "-F PREROUTING"),
        ("*raw", "*filter"),
        ("COMMIT", ""),
        ("COMMIT", "COMMIT\n*raw\nCOMMIT"),
        ("digest=", "digest"),
    ],
)
def test_iptables_rules_that_touch_anything_else_are_refused(old: str, new: str) -> None:
    assert list(problems_of_iptables(GOOD_IPTABLES.replace(old, new), "x", DIGEST))


@pytest.mark.parametrize("engine", ["kernel", "native"])
def test_ten_thousand_attachments_are_one_rule(engine: str) -> None:
    desired = profile.load(f"profile: edge\nhelpers: {{tftp: {{engine: {engine}}}}}", "p.yaml")
    one = desired.helpers[0].attachments[0]
    many = tuple(replace(one, saddr=(f"10.{i >> 8}.{i & 255}.0/24",), interface=f"lan{i % 50}") for i in range(10_000))
    target = render.target(replace(desired, helpers=(replace(desired.helpers[0], attachments=many),)))
    assert target.rules.documents[0].text.count("ct state new") == 1


def test_what_a_process_is_told_is_what_the_profile_asks_for() -> None:
    guard = "{ports: 20-546, source: any, destination: any, permanent: true}"
    process = "{user: me, memory: 1G}"
    text = f"profile: edge\nhelpers: {{ftp: {{inspect: triggers, guard: {guard}, process: {process}, label: 7}}}}"
    desired = profile.load(text, "p.yaml")
    (native,) = desired.natives
    told = settings.parse(text_of(desired, "helper-ftp.toml"))
    assert (told.name, told.use, told.names, told.queues) == (native.name, "ftp", ("ftp-us",), native.queues)
    assert (told.queueing, told.inspect, told.label, told.user) == ("rules", "triggers", 7, "me")
    assert told.memory_bytes == 1 << 30
    bounds = told.bounds
    assert (bounds.first_port, bounds.last_port) == (20, 546)
    assert (bounds.is_any_source, bounds.is_any_destination, bounds.is_permanent) == (True, True, True)


@pytest.mark.parametrize("name", ['a "b', "a\\b", "ä", "\N{ROCKET}", "a\tb"])
def test_the_path_of_a_helper_comes_back_as_it_is(name: str) -> None:
    (native, other) = NATIVE.natives
    native = replace(native, file=f"/{name}.py", source="ä\r\n")
    desired = replace(NATIVE, natives=(native, other))
    told = settings.parse(text_of(desired, "helper-ftp.toml"))
    assert (told.file, told.sha256) == (native.file, native.sha256)
    assert text_of(desired, "helper-ftp.py") == native.source


def test_a_process_is_started_anew_when_it_is_told_something_else() -> None:
    netns = Netns("host", "", "1:1")
    digests = set()
    for user in ("nobody", "daemon"):
        desired = replace(NATIVE, natives=tuple(replace(n, user=user) for n in NATIVE.natives))
        target = render.target(desired)
        digests.add(launches.launches("edge", netns, target.processes, target.documents)[0].digest)
    assert len(digests) == 2


def test_a_document_that_is_no_settings_is_refused(tmp_path: Path) -> None:
    error = refusal("helper.toml", 'name = "ftp"\n', tmp_path, desired=NATIVE)
    assert error.problems[0].message.startswith("helper-ftp.toml: ")
    assert error.problems[0].source == str(tmp_path / "helper.toml.j2")


def test_a_helper_that_asks_many_is_queued_where_they_are_one_packet() -> None:
    """To many in the output hook alone; what a single host sends, at the end of the path as ever."""
    ftp, tftp = NATIVE.rule_queues
    text = text_of(replace(NATIVE, rule_queues=(ftp, replace(tftp, is_multicast=True))), "ruleset.nft")
    jumps = [line.strip() for line in text.splitlines() if line.endswith("jump queue-tftp")]
    label = f"ct label {tftp.label}"
    assert jumps == [
        f"{label} fib daddr type != {{ broadcast, multicast }} jump queue-tftp",
        f'{label} iifname != "lo" fib daddr type != {{ broadcast, multicast }} jump queue-tftp',
        f"{label} fib daddr type {{ broadcast, multicast }} jump queue-tftp",
    ]
    assert text.count("jump queue-ftp") == 2


def test_only_helpers_that_rules_queue_have_a_label_and_queues() -> None:
    text = text_of(
        profile.load("profile: edge\nhelpers: {ftp: {queueing: registration}, tftp: {}}", "p.yaml"), "ruleset.nft"
    )
    assert "chain queue-ftp" not in text
    assert [line for line in text.splitlines() if "tcp dport" in line and "label" in line] == []
    assert [line for line in text.splitlines() if "udp dport" in line and "label" not in line] == []
