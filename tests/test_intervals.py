"""Intervals against tables and against what was computed by hand; verdicts by where an interval lies."""

import math

import numpy as np
import pytest

from solar.intervals import CONTRADICTED, NOT_SHOWN, SHOWN, Stratum, interval, quantile, verdict


def stratum(nats, tokens=None, documents=None, weight=1.0):
    nats = np.atleast_2d(np.array(nats, float))
    count = nats.shape[1]
    tokens = np.ones(count) if tokens is None else np.array(tokens)
    return Stratum(weight, nats, tokens, np.arange(count) if documents is None else np.array(documents))


@pytest.mark.parametrize(
    ("freedom", "printed"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (10**9, 1.960)]
)
def test_the_factor_is_that_of_the_printed_tables(freedom, printed):
    assert quantile(freedom) == pytest.approx(printed, abs=6e-4)


def test_windows_of_one_seed_are_a_t_interval():
    values = [1.0, 2.0, 4.0, 5.0]
    found = interval([stratum(values)])
    assert found.mean == 3.0
    assert found.half == pytest.approx(3.1824 * np.std(values, ddof=1) / 2, rel=1e-4)


def test_windows_of_a_document_are_one_observation():
    """Each value twice, in one document: the interval is that of the values once, and not narrower by sqrt 2."""
    once, twice = [1.0, 2.0, 4.0, 5.0], [1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 5.0, 5.0]
    documents = [0, 0, 1, 1, 2, 2, 3, 3]
    assert interval([stratum(twice, documents=documents)]) == pytest.approx(interval([stratum(once)]))
    assert interval([stratum(twice)]).half < 0.7 * interval([stratum(once)]).half


def test_a_window_counts_by_its_tokens():
    found = interval([stratum([2.0, 12.0, 2.0], tokens=[2, 6, 2])])
    residuals = np.array([2.0, 12.0, 2.0]) - 1.6 * np.array([2, 6, 2])
    assert found.mean == pytest.approx(1.6)
    assert found.half == pytest.approx(4.3027 * math.sqrt(3 / 2 * (residuals**2).sum()) / 10, rel=1e-4)


def test_seeds_widen_the_interval():
    windows = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    alone, alike = interval([stratum(windows[0])]), interval([stratum(windows)])
    assert alike == pytest.approx(alone)  # seeds that agree add nothing
    apart = interval([stratum([[0.5, 1.5, 2.5], [1.5, 2.5, 3.5]])])
    assert apart.mean == 2.0
    assert apart.half == pytest.approx(math.hypot(4.3027 / math.sqrt(3), 12.706 * 0.5), rel=1e-4)


def test_sources_count_by_their_weights():
    found = interval([stratum([1.0, 1.0, 1.0], weight=0.25), stratum([2.0, 4.0], weight=0.75)])
    assert found.mean == pytest.approx(0.25 + 0.75 * 3)
    assert found.half == pytest.approx(12.706 * 0.75 * math.sqrt(2) / math.sqrt(2), rel=1e-3)


def test_what_does_not_vary_has_no_width():
    assert interval([stratum([0.0, 0.0])]) == (0.0, 0.0)


def test_one_document_is_refused():
    with pytest.raises(ValueError, match="at least 2 are needed"):
        interval([stratum([1.0, 2.0], documents=[0, 0])])


def test_intervals_hold_what_they_promise():
    """Of 2,000 samples with documents and seeds of their own, about 95% of the intervals hold the truth, 0."""
    rng, held = np.random.default_rng(0), 0
    documents = np.repeat(np.arange(12), 4)
    for _ in range(2000):
        nats = rng.normal(size=12)[documents] + rng.normal(size=(3, 1)) + rng.normal(size=(3, 48))
        mean, half = interval([stratum(nats, documents=documents)])
        held += abs(mean) <= half
    assert 0.945 < held / 2000 < 0.995


@pytest.mark.parametrize(
    ("mean", "half", "says"),
    [(0.1, 0.05, SHOWN), (-0.1, 0.05, CONTRADICTED), (0.05, 0.1, NOT_SHOWN), (-0.05, 0.1, NOT_SHOWN),
     (0.1, 0.1, NOT_SHOWN), (0.0, 0.0, NOT_SHOWN)],
)  # fmt: skip
def test_a_verdict_is_where_the_interval_lies(mean, half, says):
    assert verdict(mean, half) == says
