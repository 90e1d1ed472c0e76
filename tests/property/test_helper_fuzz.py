"""2,000 inputs for each parser, arbitrary bytes and mutated examples; `make fuzz` goes on for as long as one likes."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import many
from tests.fuzz import PARSERS, Parser, mutated


def inputs(parser: Parser) -> st.SearchStrategy[bytes]:
    pieces = st.lists(st.sampled_from(parser.examples + parser.words), max_size=6).map(b"".join)
    seeds = st.integers(0, 2**32 - 1).map(lambda seed: mutated(parser, Random(seed)))
    return st.one_of(st.binary(max_size=120), pieces, seeds)


@pytest.mark.parametrize("name", PARSERS)
def test_the_law_of_a_parser_holds(name: str) -> None:
    parser = PARSERS[name]

    @settings(max_examples=many(2000), deadline=None)
    @given(inputs(parser))
    def holds(data: bytes) -> None:
        parser.law(data)

    holds()


@pytest.mark.parametrize("name", PARSERS)
def test_mutation_is_the_same_for_the_same_seed(name: str) -> None:
    """The driver names the seed of a failure, which must lead to it again."""
    parser = PARSERS[name]
    assert [mutated(parser, Random(7)) for _ in range(20)] == [mutated(parser, Random(7)) for _ in range(20)]
