"""How many examples the properties are tried on: a thousand in all, or the number in MINITRON_EXAMPLES (`make fuzz`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SHARES = 7  # of the examples: one for each property but the slowest, which gets a part of one
EXAMPLES = int(os.environ.get("MINITRON_EXAMPLES", 1000))
EVERY = settings(
    max_examples=max(1, EXAMPLES // SHARES),
    deadline=None,
    derandomize="MINITRON_EXAMPLES" not in os.environ,  # the same thousand in every run of the tests
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    print_blob=True,
)
SLOWEST = settings(EVERY, max_examples=max(1, EXAMPLES // SHARES // 4))
