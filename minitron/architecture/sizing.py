"""A shape for a parameter budget, following the best practices of arXiv 2407.14679 and 2408.11796.

Width pruning keeps layers and heads and shrinks hidden size and MLP together; depth pruning removes layers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral, Real

from minitron.architecture import Architecture
from minitron.arguments import check_type
from minitron.errors import InputError

TOLERANCE = 0.05
HOW = ("width", "depth", "both")
ALIGNMENT = 8  # 16-bit tensor cores need multiples of it; relaxed last
DRIFT = 0.25  # how far the MLP's ratio to the hidden size may change before alignment is relaxed


def architecture_for(base: Architecture, parameters: int, *, how: str = "width", multiple: int = 64) -> Architecture:
    """The architecture inside `base` closest to `parameters`, within 5 %.

    how: "width" shrinks hidden size and MLP by the same factor, "depth" removes layers, "both" shrinks layers, hidden size
    and MLP by the same factor. Widths are multiples of `multiple`. If none of those is close enough (a small model, or a
    family whose hidden size must be a multiple of its heads), the multiple is halved down to 8, then the MLP's ratio to the
    hidden size may change by up to a quarter, then the multiple is halved down to 1. Raises InputError naming the closest
    reachable number if `parameters` cannot be reached.
    """
    check_type("base", base, Architecture)
    check_type("parameters", parameters, Real)
    check_type("multiple", multiple, Integral)
    if how not in HOW:
        raise InputError(f"how: {how!r} is not a way to shrink", f"use one of {', '.join(HOW)}")
    if multiple < 1:
        raise InputError(f"multiple: {multiple} is not positive", "use a power of two such as 64")
    if not 0 < parameters <= base.num_parameters:
        raise InputError(
            f"parameters: {parameters:,} is not between 1 and the model's {base.num_parameters:,}",
            "give a smaller number than the model has",
        )
    closest = base
    for step, drift in _concessions(multiple):
        candidates = _depths(base) if how == "depth" else _widths(base, step, multiple, drift, deep=how == "both")
        possible = (shape for shape in candidates if _fits(shape, base))
        best = min(possible, key=lambda a: (_distance(a, parameters), -a.hidden_size), default=base)
        if _distance(best, parameters) <= TOLERANCE:
            return best
        closest = min(closest, best, key=lambda a: _distance(a, parameters))
    raise InputError(
        f"parameters: {parameters:,} cannot be reached by {how}; the nearest is {closest.num_parameters:,} ({closest})",
        f"use {closest.num_parameters}, another how ({', '.join(way for way in HOW if way != how)}), or give the sizes",
    )


def _fits(shape: Architecture, base: Architecture) -> bool:
    try:
        shape.check_inside(base)
    except InputError:
        return False
    return True


def _distance(architecture: Architecture, parameters: int) -> float:
    return abs(architecture.num_parameters / parameters - 1)


def _concessions(multiple: int) -> list[tuple[int, float]]:
    """(multiple of the hidden size, allowed change of the MLP's ratio), the preferred ones first."""
    steps = _halvings(multiple)
    aligned = [step for step in steps if step >= ALIGNMENT] or steps[:1]
    rest = [step for step in steps if step not in aligned]
    return [(step, drift) for drift in (0.0, DRIFT) for step in aligned] + [(step, 0.0) for step in rest]


def _halvings(multiple: int) -> list[int]:
    return [multiple >> shift for shift in range(multiple.bit_length())]


def _depths(base: Architecture) -> Iterator[Architecture]:
    for layers in range(1, base.num_layers + 1):
        yield replace(base, num_layers=layers)


def _widths(base: Architecture, step: int, multiple: int, drift: float, *, deep: bool) -> Iterator[Architecture]:
    hidden_step = math.lcm(step, base.num_heads) if base.table.hidden_in_heads else step
    # a coarse step for the MLP as long as rounding hardly changes its ratio to the hidden size
    mlp_step = next(s for s in _halvings(multiple) if s <= max(step, base.intermediate_size // 16))
    for hidden in {*range(hidden_step, base.hidden_size, hidden_step), base.hidden_size}:
        share = hidden / base.hidden_size
        depths = _around(base.num_layers * share, 0.0, 1, base.num_layers) if deep else [base.num_layers]
        for mlp in _around(base.intermediate_size * share, drift, mlp_step, base.intermediate_size):
            for layers in depths:
                yield replace(base, num_layers=layers, hidden_size=hidden, intermediate_size=mlp)


def _around(ideal: float, drift: float, step: int, largest: int) -> list[int]:
    """The multiples of `step` on both sides of `ideal` and those within `drift` of it, between one step and `largest`."""
    first = min(math.floor(ideal / step), math.ceil(ideal * (1 - drift) / step))
    last = max(math.ceil(ideal / step), math.floor(ideal * (1 + drift) / step))
    return sorted({min(max(count, 1) * step, largest) for count in range(first, last + 1)})
