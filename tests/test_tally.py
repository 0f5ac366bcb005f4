"""Counts by reason, of which there are never too many."""

import json

import pytest

from solar.tally import REASONS, Tally


def test_counts_and_first_places():
    one, two = Tally(), Tally()
    one.add("empty", "line 3")
    one.add("empty", "line 5")
    two.add("empty", "line 9", 40)
    two.add("no JSON", "line 10", 1000)
    one.merge(two)
    assert one == {"empty": (42, "line 3"), "no JSON": (1000, "line 10")}
    assert one.total() == 1042
    assert one.lines() == ["empty: 42 (first: line 3)", "no JSON: 1,000 (first: line 10)"]
    assert Tally.from_json(json.loads(json.dumps(one))) == one


def test_a_file_cannot_make_reasons_without_end():
    tally = Tally()
    for n in range(1000):
        tally.add(f"role {n}", f"line {n}")
    assert len(tally) == REASONS + 1
    assert tally["other reasons"] == (1000 - REASONS, f"line {REASONS}")
    tally.add("role 3", "line 1000")
    assert tally["role 3"] == (2, "line 3")


@pytest.mark.parametrize("raw", [{"x": 3}, {"x": [1]}, {"x": ["a", "b"]}, [1], 3])
def test_json_that_is_none(raw):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        Tally.from_json(raw)
