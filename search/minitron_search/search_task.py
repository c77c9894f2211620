"""What every trial of a search shares: its inputs, its training and where its results are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

from minitron.arguments import check_type
from minitron.distill import DistillConfig, Losses
from minitron.distill.inputs import DistillInputs
from minitron.pruning.source import PruningSource
from minitron_search.arguments import absolute_path


def _always() -> None:
    pass


@dataclass(frozen=True)
class SearchTask:
    """What every trial of a search shares.

    `folder` is where each trial stores its checkpoints and results, under its own key. Candidates are pruned from `origin`,
    distilled with `config` and `losses`, and compared on the first `heldout_rows` held-out rows (default: all), after the last
    step and after each of the steps `rungs` (ascending). On a CPU a trial runs with `threads` threads. With `keep_weights` the
    distilled students are kept (see `minitron_search.trial_store.weights`). `before_commit` is called, in the search's process
    and in those of trials, to which it is pickled, before anything in `folder` is written or deleted; it may raise a
    MinitronError to prevent that, with a TakenOverError no trial is restarted. Relative paths are made absolute. Raises
    InputError for a field of the wrong type and for an empty path.
    """

    materials: DistillInputs
    origin: PruningSource
    config: DistillConfig
    losses: Losses
    folder: str
    heldout_rows: int | None = None
    threads: int = 1
    rungs: tuple[int, ...] = ()
    keep_weights: bool = False
    before_commit: Callable[[], None] = _always

    def __post_init__(self) -> None:
        check_type("materials", self.materials, DistillInputs)
        check_type("origin", self.origin, PruningSource)
        check_type("config", self.config, DistillConfig)
        check_type("losses", self.losses, Losses)
        check_type("threads", self.threads, Integral)
        if self.heldout_rows is not None:
            check_type("heldout_rows", self.heldout_rows, Integral)
        check_type("rungs", self.rungs, tuple)
        for step in self.rungs:
            check_type("rungs", step, Integral)
        object.__setattr__(self, "materials", _inputs_with_absolute_paths(self.materials))
        object.__setattr__(self, "origin", _source_with_absolute_paths(self.origin))
        object.__setattr__(self, "folder", absolute_path("folder", self.folder))


def _inputs_with_absolute_paths(inputs: DistillInputs) -> DistillInputs:
    return replace(
        inputs,
        teacher=absolute_path("materials.teacher", inputs.teacher),
        rows=absolute_path("materials.rows", inputs.rows),
        train_targets=absolute_path("materials.train_targets", inputs.train_targets),
        heldout_targets=absolute_path("materials.heldout_targets", inputs.heldout_targets),
    )


def _source_with_absolute_paths(origin: PruningSource) -> PruningSource:
    folder = absolute_path("origin.folder", origin.folder)
    if origin.recalibration is None:
        return replace(origin, folder=folder, scores=absolute_path("origin.scores", origin.scores))
    rows = absolute_path("origin.recalibration.rows", origin.recalibration.rows)
    return replace(origin, folder=folder, recalibration=replace(origin.recalibration, rows=rows))
