"""The numbers in a recipe: whole ones may be written 8e7, and each kind has bounds outside which a value is a mistake.

docs/recipes.md has a table of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

SMALLEST_GPU = 0.001  # Ray counts GPUs in ten-thousandths


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, and neither infinite nor NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _whole(value: Any) -> Any:
    """8e7 as 80000000; anything else, as 8.5, unchanged, so that it is refused as it was written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _gpus(value: float) -> float:
    if 0 < value < SMALLEST_GPU:
        raise ValueError(f"use 0, or at least {SMALLEST_GPU} of a GPU")
    return value


Whole = BeforeValidator(_whole)
Positive = Annotated[int, Field(ge=1, le=10**12), Whole]
Natural = Annotated[int, Field(ge=0, le=10**12), Whole]
SeqLength = Annotated[int, Field(ge=8, le=10**7), Whole]
ModelSize = Annotated[int, Field(ge=1, le=10**14), Whole]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), Whole]
AxisValue = Annotated[int | float, Field(gt=0, le=10**9)]
Share = Annotated[float, Field(gt=0, lt=1)]
LearningRate = Annotated[float, Field(ge=1e-12, le=10)]
LowestRate = Annotated[float, Field(ge=0, le=10)]
WeightDecay = Annotated[float, Field(ge=0, le=100)]
NormLimit = Annotated[float, Field(ge=1e-9)]  # infinite: not limited
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
PositiveWeight = Annotated[float, Field(ge=1e-9, le=1e9)]
Nats = Annotated[float, Field(ge=0, le=100)]
Limit = Annotated[float, Field(ge=1e-6, le=1e30)]
Cpus = Annotated[float, Field(ge=0.001, le=10_000)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Gpus = Annotated[float, Field(ge=0, le=10_000), AfterValidator(_gpus)]
