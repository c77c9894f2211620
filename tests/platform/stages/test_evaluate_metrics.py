"""The list of held-out metrics is said once: what is measured is what the final table shows."""

from __future__ import annotations

from typing import get_type_hints

from minitron.evaluation import HeldoutMetrics
from minitron_platform.stages.evaluate import HELDOUT


def test_every_held_out_metric_is_in_the_final_table():
    measured = {name for name, kind in get_type_hints(HeldoutMetrics).items() if kind in (float, float | None)}
    assert measured == set(HELDOUT)
