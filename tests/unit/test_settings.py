"""The document of a helper process: what is read is what is meant, and everything else is refused by name."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.api import Bounds
from orchestrator.engine.settings import Settings, parse
from tests import processes

DOCUMENT = processes.DOCUMENT.replace("tftp", "ftp").replace("[20000]", "[20000, 20001]")
OWN_FILE = DOCUMENT.replace('file = ""', 'file = "/a.py"').replace('sha256 = ""', f'sha256 = "{"0f" * 32}"')


def test_a_document_is_read() -> None:
    assert parse(DOCUMENT) == Settings(
        name="ftp",
        use="ftp",
        file="",
        sha256="",
        queueing="rules",
        inspect="payload",
        names=("ftp-us",),
        queues=(20000, 20001),
        bounds=Bounds(first_port=1024, last_port=65535),
        user="",
        memory_bytes=128 << 20,
        label=70,
    )


def test_a_file_comes_with_its_digest() -> None:
    assert parse(OWN_FILE).file == "/a.py"


def test_queueing_by_registration_has_no_label() -> None:
    text = DOCUMENT.replace('"rules"', '"registration"').replace("label = 70\n", "").replace("[20000, 20001]", "[7]")
    assert not parse(text).is_by_rules


def test_every_bound_can_be_loosened() -> None:
    text = DOCUMENT.replace("1024-", "1-").replace('"peer"', '"any"').replace('"master"', '"any"')
    assert parse(text.replace("= false", "= true")).bounds == Bounds(
        first_port=1, last_port=65535, is_any_source=True, is_any_destination=True, is_permanent=True
    )


@pytest.mark.parametrize(
    "before, after, said",
    [
        ('name = "ftp"\n', "", "name is missing"),
        ('name = "ftp"', 'name = ""', "must not be empty"),
        ('name = "ftp"', 'name = "ftp', "line 1"),
        ("user", "usr", "unknown key usr"),
        ("permanent = ", "permanet = ", "unknown key bounds.permanet"),
        ('["ftp-us"]', "[]", "names"),
        ("[20000, 20001]", "[20000, 20000]", "queues"),
        ("[20000, 20001]", "[65536]", "queues"),
        ("[20000, 20001]", "[true]", "queues"),
        ('"rules"', '"rule"', "queueing"),
        ('"payload"', '"all"', "inspect"),
        ("134217728", "0", "memory_bytes"),
        ("label = 70", "label = 128", "label"),
        ("label = 70\n", "", "label"),
        ('"rules"', '"registration"', "label"),
        ('file = ""', 'file = "/a.py"', "sha256"),
        ('sha256 = ""', f'sha256 = "{"00" * 32}"', "sha256"),
        ('file = ""', 'file = "a.py"', "absolute"),
        ("1024-65535", "1024", "bounds.ports"),
        ("1024-65535", "0-65535", "bounds.ports"),
        ("1024-65535", "1024-65536", "bounds.ports"),
        ('"peer"', '"master"', "bounds.source"),
        ("false", '"no"', "bounds.permanent"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, said: str) -> None:
    assert before in DOCUMENT
    with pytest.raises(ValueError, match=said):
        parse(DOCUMENT.replace(before, after, 1))


_values = st.one_of(
    st.booleans(), st.integers(-1, 70000), st.text("abc/-0", max_size=5), st.lists(st.integers(0, 3), max_size=2)
)


@given(st.sampled_from(range(11)), _values)
def test_any_value_anywhere_is_read_or_refused(line: int, value: object) -> None:
    lines = DOCUMENT.splitlines()
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    lines[line] = f"{lines[line].partition('=')[0]}= {text}"
    with contextlib.suppress(ValueError):
        assert isinstance(parse("\n".join(lines)), Settings)
