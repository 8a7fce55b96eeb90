"""Lengths as people count them: each figure is the length of a row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.data.statistics import Statistics


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_figures_are_of_rows(lengths):
    found = Statistics.of(lengths, [1] * len(lengths))
    ordered = sorted(lengths)
    assert found.longest == ordered[-1] and found.tokens == sum(lengths) and found.learned == len(lengths)
    for figure, share in ((found.median, 0.5), (found.most, 0.95)):
        assert sum(length <= figure for length in lengths) >= share * len(lengths)
        assert sum(length < figure for length in lengths) < share * len(lengths)


@pytest.mark.parametrize(("learned", "words"), [([3, 1], "40 %"), ([0, 10], "100 %")])
def test_in_words(learned, words):
    said = Statistics.of([4, 6], learned).describe()
    assert said == f"lengths: median 4, 95 % 6, longest 6 tokens; {words} of tokens are learned"
