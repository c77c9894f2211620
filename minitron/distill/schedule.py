"""Learning-rate schedules as a pure function of the step: linear warm-up, then cosine decay or stable-decay.

"cosine" is the schedule of the Minitron papers (arXiv 2408.11796). "wsd" (warm-up-stable-decay, arXiv 2404.06395 section 4;
arXiv 2405.18392) stays at the peak and decays linearly at the end. Before the decay its rates do not depend on the number of
steps, so that trainings of different lengths can be compared.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "wsd")


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    minimum: float,
    warmup_steps: int,
    schedule: str = "cosine",
    decay_share: float = 0.2,
) -> float:
    """Learning rate of step `step`, counted from 0.

    peak, minimum: the rates after warm-up and at the last step. schedule: one of SCHEDULES. decay_share: the share of the steps
    in which "wsd" decays, 0 to 1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))
    stable = total_steps - min(round(decay_share * total_steps), total_steps - warmup_steps)
    if step < stable:
        return peak
    return peak - (peak - minimum) * min(1.0, (step - stable + 1) / (total_steps - stable))
