"""How many requests there were, and how long they took. Cheap enough for every request.

Belongs to one thread.
"""

from __future__ import annotations

import math

from cidfs.control import RequestStats

_STEPS = 4  # steps a doubling: bounds are at most 25 % apart


class Latencies:
    """A histogram of durations in steps of a quarter of a doubling."""

    __slots__ = ("_buckets", "count", "errors", "longest")

    def __init__(self) -> None:
        self._buckets = [0] * (_STEPS * 42)
        self.count = 0
        self.errors = 0
        self.longest = 0

    def record(self, nanoseconds: int) -> None:
        """Count one request."""
        self.count += 1
        if nanoseconds > self.longest:
            self.longest = nanoseconds
        bits = nanoseconds.bit_length()
        fine = nanoseconds >> (bits - 3) & 3 if bits > 2 else 0
        self._buckets[min(bits * _STEPS + fine, len(self._buckets) - 1)] += 1

    def percentile(self, part: float) -> float:
        """Return a duration in microseconds that a part of all requests did not exceed."""
        wanted = math.ceil(self.count * part)
        seen = 0
        for i, n in enumerate(self._buckets):
            seen += n
            if n and seen >= wanted:
                bits, fine = divmod(i, _STEPS)
                bound = (1 << bits) if bits < 3 else (4 + fine + 1) << (bits - 3)
                return min(bound, self.longest) / 1000
        return 0.0

    def summary(self) -> RequestStats:
        """Return what stats shows."""
        return RequestStats(
            count=self.count,
            errors=self.errors,
            p50_us=self.percentile(0.5),
            p90_us=self.percentile(0.9),
            p99_us=self.percentile(0.99),
            max_us=self.longest / 1000,
        )
