"""Whole layers: what the model loses without each contiguous block of them, at once or removed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minitron.errors import InputError
from minitron.importance.distributed import add_up, own_share
from minitron.importance.removal import ROW_METRICS, removal_scores
from minitron.importance.view import without_layers
from minitron.models import layers_of

if TYPE_CHECKING:
    from minitron.evaluation import Task

Advance = Callable[[int], None]
Measure = Callable[[Sequence[int], Sequence[int]], dict[int, Tensor]]
"""(layers that are left, block sizes) -> {size: importance of every block of those layers}"""
METRICS = (*ROW_METRICS, "task")


@dataclass(frozen=True)
class LayerScoring:
    """What to measure of layers beyond the cosines, which are always there.

    `metric`: "loss", next-token loss without a block, nats per token · "logit_error", sum (M - M')^2 / sum M^2 between the
    whole model's logits M and those without it (arXiv 2511.16664) · "cosine", 1 minus the mean cosine of the residual stream
    before and after it · "task", what the lm-eval task `task` loses without it (arXiv 2408.11796 section 3): accuracy, or
    a perplexity's rise. A task runs whole for every position, and once more for the whole model: unlike "loss" and
    "logit_error" it does not reuse what the layers before the block have computed.
    `sizes`: block sizes; every position of every size is measured. `iterative`: take the least important block of so many
    layers out, measure what is left anew, and so on while at least `keep` layers stay; 0 = don't. `rows`: only the first so
    many calibration rows; None = all. Raises InputError for what cannot be measured.
    """

    metric: str = "loss"
    sizes: tuple[int, ...] = ()
    iterative: int = 0
    keep: int = 1
    rows: int | None = None
    task: Task | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric: {self.metric!r} does not score layers", f"use one of {', '.join(METRICS)}")
        if (self.metric == "task") != (self.task is not None):
            raise InputError(f"task: {self.task} with metric {self.metric!r}", 'give a task with metric "task" only')
        for key, value, least in (("iterative", self.iterative, 0), ("keep", self.keep, 1), ("rows", self.rows, 1)):
            if value is not None and value < least:
                raise InputError(f"{key}: {value} when scoring layers", f"give at least {least}")

    @property
    def key(self) -> str:
        """The metric's name in `ImportanceScores.removal` and `.orders`."""
        return f"task:{self.task.name}" if self.task else self.metric

    def check(self, num_layers: int) -> None:
        """Raise InputError when a block does not fit into `num_layers` layers, or iterative removal has nothing to do."""
        for size in self.sizes:
            if not 0 < size < num_layers:
                raise InputError(f"sizes: {size} out of {num_layers} layers", f"use blocks of 1 to {num_layers - 1}")
        if self.iterative and not self.rounds(num_layers):
            raise InputError(
                f"iterative: {self.iterative} at a time of {num_layers} layers leave fewer than keep = {self.keep}",
                "remove fewer at a time, or keep fewer",
            )

    def rounds(self, num_layers: int) -> list[int]:
        """How many layers are there at the start of every round of iterative removal."""
        if not self.iterative:
            return []
        return [left for left in range(num_layers, self.keep, -self.iterative) if left - self.iterative >= self.keep]

    def passes(self, num_layers: int, num_rows: int) -> int:
        """What this process tells `advance` in all, when `num_rows` rows are given to all: its rows once for every position,
        or its scorings of a task."""
        at_once = sum(num_layers - size + 1 for size in self.sizes) if self.metric != "cosine" else 0
        positions = [at_once, *(left - self.iterative + 1 for left in self.rounds(num_layers))]
        if self.metric == "task":
            return sum(len(own_share(range(count))) for count in [1, *positions])
        return sum(positions) * len(own_share(range(min(num_rows, self.rows or num_rows))))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the scores' provenance."""
        return {**asdict(self), "sizes": list(self.sizes)}


def score_layers(
    model: nn.Module,
    rows: Tensor,
    scoring: LayerScoring,
    *,
    tokenizer: Any = None,
    add_bos: bool | None = None,
    batch_rows: int,
    advance: Advance,
) -> tuple[dict[int, Tensor], list[int]]:
    """({size: float32 [layers - size + 1], larger = more important}, layers in the order of iterative removal).

    Of all processes' `rows`, int64 [num_rows, seq_length]; each measures its share of the rows, or of a task's positions.
    """
    everything = list(range(len(layers_of(model))))
    measure = (
        _task_measure(model, tokenizer, add_bos, scoring.task, advance)
        if scoring.task
        else partial(
            removal_scores, model, rows[: scoring.rows], scoring.metric, batch_rows=batch_rows, advance=advance
        )
    )
    # the cosines of the whole model are measured already
    at_once = measure(everything, scoring.sizes) if scoring.sizes and scoring.metric != "cosine" else {}
    order: list[int] = []
    for _ in scoring.rounds(len(everything)):
        kept = [layer for layer in everything if layer not in order]
        start = int(measure(kept, [scoring.iterative])[scoring.iterative].argmin())
        order += kept[start : start + scoring.iterative]
    return {size: values.float().cpu() for size, values in at_once.items()}, order


def _task_measure(model: nn.Module, tokenizer: Any, add_bos: bool | None, task: Task, advance: Advance) -> Measure:
    """Measures what the task's metric loses, as float64: how far it falls, or rises where lower is better."""
    from minitron.evaluation import evaluate

    everything = range(len(layers_of(model)))

    def quality(remainders: Sequence[Sequence[int]]) -> Tensor:
        values = torch.zeros(len(remainders), dtype=torch.float64, device=next(model.parameters()).device)
        for place in own_share(range(len(remainders))):
            with without_layers(model, set(everything) - set(remainders[place])):
                score = evaluate(model, tokenizer, [task], add_bos=add_bos)[task.name]
            if score.higher_is_better is None:
                raise InputError(
                    f"task {task.name!r}: whether a higher {score.metric} is better is not known",
                    "rank layers by another task, or by the loss",
                )
            values[place] = score.value if score.higher_is_better else -score.value
            advance(1)
        return add_up(values)

    whole = quality([everything])

    def measure(kept: Sequence[int], sizes: Sequence[int]) -> dict[int, Tensor]:
        starts = {size: range(len(kept) - size + 1) for size in sizes}
        remainders = [[*kept[:start], *kept[start + size :]] for size in sizes for start in starts[size]]
        lost = whole - quality(remainders)
        return dict(zip(sizes, lost.split([len(starts[size]) for size in sizes]), strict=True))

    return measure
