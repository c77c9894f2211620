"""Learning rate as a pure function of the step: linear warm-up, then cosine to the minimum (the papers' schedule)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total_steps: int, peak: float, minimum: float, warmup_steps: int) -> float:
    """Rate of step `step`, counted from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))
