"""Importance of whole layers: what the model loses without each contiguous block, in one pass or with iterative removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minitron.data import DocumentBoundaries
from minitron.errors import InputError
from minitron.importance.distributed import own_share, sum_over_processes
from minitron.importance.removal import ROW_METRICS, removal_scores
from minitron.importance.view import without_layers
from minitron.models import layers_of
from minitron.processes import is_sharded

if TYPE_CHECKING:
    from minitron.evaluation import Task

Advance = Callable[[int], None]
Measure = Callable[[Sequence[int], Sequence[int]], dict[int, Tensor]]
"""(remaining layers, block sizes) -> {size: importance of every block of the remaining layers}"""
METRICS = (*ROW_METRICS, "task")


@dataclass(frozen=True)
class LayerScoring:
    """A measurement of layers in addition to the cosines, which are always measured.

    Raises InputError for values that cannot be measured.
    """

    metric: str = "loss"
    """"loss": next-token loss without a block, nats per token. "logit_error": sum (M - M')^2 / sum M^2 between the logits M
    of the whole model and M' of the model without the block (arXiv 2511.16664). "cosine": 1 minus the mean cosine of the
    residual stream before and after the block. "task": how much worse the lm-eval task `task` gets without the block
    (arXiv 2408.11796 section 3), as accuracy lost or perplexity gained. A task runs completely for every position and once for
    the whole model; unlike "loss" and "logit_error" it does not reuse the activations before the block."""
    sizes: tuple[int, ...] = ()
    """Block sizes; every position of every size is measured."""
    iterative: int = 0
    """Block size of iterative removal: remove the least important block, measure the remaining layers, and repeat while at
    least `keep` layers remain; 0 for none."""
    keep: int = 1
    """Smallest number of layers that iterative removal leaves."""
    rows: int | None = None
    """Number of calibration rows to use, the first ones; None for all."""
    task: Task | None = None
    """The task of metric "task"."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric: {self.metric!r} is not a layer metric", f"use one of {', '.join(METRICS)}")
        if (self.metric == "task") != (self.task is not None):
            raise InputError(f"task: {self.task} with metric {self.metric!r}", 'give a task with metric "task" only')
        for key, value, least in (("iterative", self.iterative, 0), ("keep", self.keep, 1), ("rows", self.rows, 1)):
            if value is not None and value < least:
                raise InputError(f"{key}: {value} is too small", f"give at least {least}")

    @property
    def key(self) -> str:
        """The metric's name in `ImportanceScores.removal` and `.orders`."""
        return f"task:{self.task.name}" if self.task else self.metric

    def check(self, num_layers: int) -> None:
        """Raise InputError if a block does not fit into `num_layers` layers, or iterative removal cannot remove one."""
        for size in self.sizes:
            if not 0 < size < num_layers:
                raise InputError(
                    f"sizes: a block of {size} layers does not fit into {num_layers} layers",
                    f"use blocks of 1 to {num_layers - 1}",
                )
        if self.iterative and not self.rounds(num_layers):
            raise InputError(
                f"iterative: removing {self.iterative} of {num_layers} layers leaves fewer than keep = {self.keep}",
                "remove fewer at a time, or keep fewer",
            )

    def rounds(self, num_layers: int) -> list[int]:
        """Number of layers at the start of every round of iterative removal."""
        if not self.iterative:
            return []
        return [left for left in range(num_layers, self.keep, -self.iterative) if left - self.iterative >= self.keep]

    def passes(self, num_layers: int, num_rows: int, sharded: bool = False) -> int:
        """Total that this process reports to `advance` for `num_rows` calibration rows: its rows times the positions, or its
        evaluations of a task, which are all of them for a sharded model."""
        one_pass = sum(num_layers - size + 1 for size in self.sizes) if self.metric != "cosine" else 0
        positions = [one_pass, *(left - self.iterative + 1 for left in self.rounds(num_layers))]
        if self.metric == "task":
            return sum(count if sharded else len(own_share(range(count))) for count in [1, *positions])
        return sum(positions) * len(own_share(range(min(num_rows, self.rows or num_rows))))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the provenance of the scores."""
        return {**asdict(self), "sizes": list(self.sizes)}


def score_layers(
    model: nn.Module,
    rows: Tensor,
    scoring: LayerScoring,
    *,
    tokenizer: Any = None,
    add_bos: bool | None = None,
    documents: DocumentBoundaries | None = None,
    batch_rows: int,
    advance: Advance,
) -> tuple[dict[int, Tensor], list[int]]:
    """({size: float32 [layers - size + 1], larger = more important}, layers in the order of iterative removal).

    rows: int64 [num_rows, seq_length], the same in every process; each measures its share of the rows, or of the positions
    of a task.
    """
    all_layers = list(range(len(layers_of(model))))
    measure = (
        _task_measure(model, tokenizer, add_bos, scoring.task, advance)
        if scoring.task
        else partial(
            removal_scores,
            model,
            rows[: scoring.rows],
            scoring.metric,
            documents=documents,
            batch_rows=batch_rows,
            advance=advance,
        )
    )
    # the cosines of the whole model are already measured
    one_pass = measure(all_layers, scoring.sizes) if scoring.sizes and scoring.metric != "cosine" else {}
    order: list[int] = []
    for _ in scoring.rounds(len(all_layers)):
        kept = [layer for layer in all_layers if layer not in order]
        start = int(measure(kept, [scoring.iterative])[scoring.iterative].argmin())
        order += kept[start : start + scoring.iterative]
    return {size: values.float().cpu() for size, values in one_pass.items()}, order


def _task_measure(model: nn.Module, tokenizer: Any, add_bos: bool | None, task: Task, advance: Advance) -> Measure:
    """A measure of how much the task's metric gets worse, float64: how far it falls, or rises if lower is better."""
    from minitron.evaluation import evaluate

    all_layers = set(range(len(layers_of(model))))
    sharded = is_sharded(model)  # all processes then evaluate the same layers together

    def quality(remainders: Sequence[Sequence[int]]) -> Tensor:
        values = torch.zeros(len(remainders), dtype=torch.float64, device=next(model.parameters()).device)
        everything = range(len(remainders))
        for index in everything if sharded else own_share(everything):
            with without_layers(model, all_layers - set(remainders[index])):
                score = evaluate(model, tokenizer, [task], add_bos=add_bos, together=sharded)[task.name]
            if score.higher_is_better is None:
                raise InputError(
                    f"task {task.name!r}: it is not known whether a higher {score.metric} is better",
                    "rank layers by another task, or by the loss",
                )
            values[index] = score.value if score.higher_is_better else -score.value
            advance(1)
        return values if sharded else sum_over_processes(values)

    whole = quality([sorted(all_layers)])

    def measure(kept: Sequence[int], sizes: Sequence[int]) -> dict[int, Tensor]:
        starts = {size: range(len(kept) - size + 1) for size in sizes}
        remainders = [[*kept[:start], *kept[start + size :]] for size in sizes for start in starts[size]]
        lost = whole - quality(remainders)
        return dict(zip(sizes, lost.split([len(starts[size]) for size in sizes]), strict=True))

    return measure
