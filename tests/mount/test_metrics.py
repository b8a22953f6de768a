"""Latencies: counts and percentiles beside a plain model."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cidfs.mount.metrics import Latencies

FAST = settings(deadline=None, derandomize=True, max_examples=200)


def record(values: list[int]) -> Latencies:
    latencies = Latencies()
    for value in values:
        latencies.record(value)
    return latencies


@FAST
@given(
    st.lists(
        st.one_of(st.integers(0, 40), st.integers(0, 10**6), st.integers(0, 2**41)), min_size=1, max_size=60
    ),
    st.floats(0.01, 1.0),
)
def test_a_percentile_is_an_upper_bound_and_not_far_off(values: list[int], part: float) -> None:
    exact = sorted(values)[math.ceil(len(values) * part) - 1]
    found = record(values).percentile(part) * 1000
    assert exact <= found + 1e-6
    assert found <= max(exact * 1.25, exact + 1) + 1e-6
    assert found <= max(values)


@FAST
@given(st.lists(st.integers(0, 2**41), min_size=1, max_size=40))
def test_a_summary(values: list[int]) -> None:
    latencies = record(values)
    latencies.errors += 3
    summary = latencies.summary()
    assert (summary.count, summary.errors) == (len(values), 3)
    assert summary.max_us == max(values) / 1000
    assert summary.p50_us <= summary.p90_us <= summary.p99_us <= summary.max_us


def test_nothing_was_counted() -> None:
    summary = Latencies().summary()
    assert (summary.count, summary.p50_us, summary.p99_us, summary.max_us) == (0, 0.0, 0.0, 0.0)


def test_longer_than_there_are_steps() -> None:
    """An hour and more falls into the last step."""
    latencies = record([10**3, 2**60, 2**62])
    assert latencies.percentile(0.3) <= 1.25
    assert latencies.summary().max_us == 2**62 / 1000
    assert latencies.percentile(0.99) > 10**6
