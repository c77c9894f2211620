"""Enumerates the candidates: every combination of a space within a parameter budget (arXiv 2407.14679 section 2.3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

from minitron.architecture import PRUNABLE, Architecture
from minitron.arguments import check_type, check_types
from minitron.errors import InputError
from minitron_search.limits import Limits

MLP_RATIO = "mlp_ratio"


def candidates(
    base: Architecture,
    space: Mapping[str, Sequence[float]],
    low: float,
    high: float,
    *,
    limits: Limits | None = None,
    points: Sequence[Architecture] = (),
    key: str = "space",
) -> list[Architecture]:
    """`points` (see `points_in`), then all architectures of `space` that can be pruned from `base`, have `low` to `high`
    parameters and keep to `limits`, largest first.

    `space` maps fields of Architecture to lists of values, or `mlp_ratio` to ratios: intermediate_size = int(ratio ·
    hidden_size). A field that is not in `space` keeps the value of `base`. Combinations that are not a valid model, for
    example with a hidden size that the number of heads does not divide, are skipped. Raises InputError naming, under `key`, a
    value that is valid in no combination, and for an argument of the wrong type.
    """
    check_budget(base, low, high, limits)
    check_types("points", points, Architecture)
    check_space(base, space, key)
    fitting = {
        architecture
        for values in itertools.product(*space.values())
        if (architecture := candidate(base, dict(zip(space, values, strict=True)), low, high, limits)) is not None
    }
    others = sorted(fitting, key=lambda a: (a.num_parameters, *a.sizes.values()), reverse=True)
    return list(dict.fromkeys([*points, *others]))


def check_budget(base: Architecture, low: float, high: float, limits: Limits | None) -> None:
    """Raise InputError for an argument of the wrong type."""
    check_type("base", base, Architecture)
    check_type("low", low, Real)
    check_type("high", high, Real)
    if limits is not None:
        check_type("limits", limits, Limits)


def points_in(
    base: Architecture,
    shapes: Sequence[Mapping[str, int]],
    low: float,
    high: float,
    *,
    limits: Limits | None = None,
    key: str = "points",
    skip: bool = False,
) -> list[Architecture]:
    """The architecture of each of `shapes`, which map fields of Architecture to values; other fields are those of `base`.

    Raises InputError naming, under `key`, a shape that cannot be pruned from `base`, does not have `low` to `high` parameters
    or exceeds `limits`; with `skip` such a shape is skipped instead.
    """
    points = []
    for index, shape in enumerate(shapes):
        unknown = [name for name in shape if name not in PRUNABLE]
        if unknown:
            raise InputError(f"{key}.{index}.{unknown[0]}: there is no such axis", f"use {', '.join(PRUNABLE)}")
        try:
            points.append(_point(base, shape, low, high, limits))
        except InputError as error:
            if not skip:
                raise InputError(f"{key}.{index}: {error.problem}", error.remedy) from error
    return points


def _point(
    base: Architecture, shape: Mapping[str, int], low: float, high: float, limits: Limits | None
) -> Architecture:
    point = replace(base, **shape)  # type: ignore[arg-type]
    point.check_inside(base)
    if not low <= point.num_parameters <= high:
        raise InputError(
            f"{point} has {point.num_parameters:,} parameters, not {low:,.0f} to {high:,.0f}",
            "change the point, or widen the tolerance",
        )
    if limits and (over := limits.exceeded(point)):
        raise InputError(f"{point}: {over}", "change the point, or raise the limit")
    return point


def check_space(base: Architecture, space: Mapping[str, Sequence[float]], key: str) -> None:
    """Raise InputError, naming keys below `key`, for an axis that does not exist, an empty axis, or a value that is valid in no
    combination."""
    check_type(key, space, Mapping)
    for axis, values in space.items():
        axis_key = f"{key}.{axis}"
        if axis not in (*PRUNABLE, MLP_RATIO):
            raise InputError(f"{axis_key}: there is no such axis", f"use {', '.join((*PRUNABLE, MLP_RATIO))}")
        check_types(axis_key, values, Real)
        if not values:
            raise InputError(f"{axis_key}: the list is empty", "give at least one value, or leave the axis out")
        for value in values:
            if axis == MLP_RATIO:
                if value <= 0:
                    raise InputError(f"{axis_key}: {value} is not positive", "use ratios such as 2.5")
                continue
            if value != int(value) or value < 1:
                raise InputError(
                    f"{axis_key}: {value} is not a positive whole number", "use whole numbers of at least 1"
                )
            if value > getattr(base, axis):
                largest = getattr(base, axis)
                raise InputError(f"{axis_key}: {value} is larger than the model's {largest}", f"use at most {largest}")
    if MLP_RATIO in space and "intermediate_size" in space:
        raise InputError(f"{key}: both mlp_ratio and intermediate_size are given", "keep one of the two")
    groups = space.get("num_kv_heads", [base.num_kv_heads])
    for heads in space.get("num_heads", []):
        if all(heads % group for group in groups):
            raise InputError(
                f"{key}.num_heads: {heads} does not divide into {' or '.join(str(int(g)) for g in groups)} KV groups",
                f"use multiples of {int(groups[0])}",
            )
    heads_values = space.get("num_heads", [base.num_heads])
    for hidden in space.get("hidden_size", []):
        if base.table.hidden_in_heads and all(hidden % heads for heads in heads_values):
            raise InputError(
                f"{key}.hidden_size: {hidden} is not a multiple of {' or '.join(str(int(h)) for h in heads_values)} "
                f"heads, which transformers requires of {base.family} models",
                f"use multiples of {int(heads_values[0])}",
            )


def combinations(space: Mapping[str, Sequence[float]]) -> int:
    """Number of combinations of values, valid models or not."""
    return math.prod(len(values) for values in space.values())


def candidate(
    base: Architecture, values: Mapping[str, float], low: float, high: float, limits: Limits | None
) -> Architecture | None:
    """The architecture of one combination of values; None if it is not a valid model, or outside the budget or `limits`."""
    architecture = _build(base, dict(values))
    if architecture is None or not low <= architecture.num_parameters <= high:
        return None
    return None if limits and limits.exceeded(architecture) else architecture


def _build(base: Architecture, values: dict[str, float]) -> Architecture | None:
    ratio = values.pop(MLP_RATIO, None)
    fields = {name: int(value) for name, value in values.items()}
    if ratio is not None:
        fields["intermediate_size"] = int(ratio * fields.get("hidden_size", base.hidden_size))
    heads = fields.get("num_heads", base.num_heads)
    groups = fields.get("num_kv_heads", base.num_kv_heads)
    hidden = fields.get("hidden_size", base.hidden_size)
    if heads % groups or (base.table.hidden_in_heads and hidden % heads):
        return None
    architecture = replace(base, **fields)  # type: ignore[arg-type]
    try:
        architecture.check_inside(base)
    except InputError:
        return None  # for example an MLP ratio that needs more neurons than the teacher has
    return architecture
