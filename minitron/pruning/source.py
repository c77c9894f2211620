"""The source of pruned students: a checkpoint and its importance scores, by address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import Rows, rows_for_step
from minitron.device import DTYPES, device
from minitron.importance import ImportanceScores, LayerScoring
from minitron.meta_models import FILE_BYTES, load_onto
from minitron.models import load_tokenizer, save_model, source_architecture
from minitron.pruning.iterative import prune_in_steps
from minitron.pruning.selection import kept_layers, select
from minitron.pruning.slicing import prune
from minitron.pruning.streaming import write_pruned


@dataclass(frozen=True)
class Recalibration:
    """Settings of iterative pruning, which estimates importance again before each of its steps."""

    steps: int
    rows: str
    """Folder of packed rows, at any fsspec path."""
    num_rows: int
    """Number of training rows to score on, drawn at random."""
    layer_metric: str
    """Metric of `LayerScoring` by which layers are removed."""
    layer_rows: int
    """Number of rows for that metric."""
    batch_aggregation: str
    sequence_aggregation: str
    neurons: str
    separate_documents: bool = False
    """Whether the documents of a row are kept apart."""


@dataclass(frozen=True)
class PruningSource:
    """Addresses of a checkpoint folder and of its importance scores; `dtype` is what models compute in, `depth` and `metric`
    say which layers go (see `minitron.pruning.selection.kept_layers`), `merge_heads` what becomes of query heads that go (see
    `minitron.pruning.head_merging`). With `recalibration` the scores are not read: pruning goes in steps and scores the model
    before each."""

    folder: str
    scores: str
    dtype: str
    depth: str = "contiguous"
    metric: str | None = None
    merge_heads: int = 0
    recalibration: Recalibration | None = None

    def load(self) -> nn.Module:
        """The model, on the device that models compute on."""
        return load_onto(storage.fetch(self.folder), DTYPES[self.dtype], device())

    def prune(self, model: nn.Module, architecture: Architecture) -> nn.Module:
        """A student of `architecture`, pruned from `model`, the result of `load`."""
        if self.recalibration:
            return self._prune_in_steps(model, architecture, self.recalibration)
        base = Architecture.from_config(model.config)
        scores = self._scores()
        kept = self._layers(scores, base, architecture)
        return prune(model, architecture, scores, layers=kept, merge_heads=self.merge_heads)

    def write_student(
        self, architecture: Architecture, target: str, *, before_commit: Callable[[], None] = lambda: None
    ) -> None:
        """Commit to `target` a checkpoint of the student, with the checkpoint's tokenizer, one tensor at a time: a process
        needs about 2 GiB of main memory besides the largest tensor, and no GPU.

        Weights, config and tokenizer are those of `prune`, saved by `minitron.models.save_model`; a large student has smaller
        files. Iterative pruning loads the whole model, on the device that models compute on. before_commit: as in
        `minitron.storage.committed_folder`.
        """
        folder = storage.fetch(self.folder)
        if self.recalibration:
            student = self.prune(self.load(), architecture)
            with storage.committed_folder(target, before_commit=before_commit) as local_folder:
                save_model(student, load_tokenizer(folder), local_folder)
            return
        base, _ = source_architecture(str(folder))
        scores = self._scores()
        write_pruned(
            folder,
            target,
            architecture,
            scores,
            layers=self._layers(scores, base, architecture),
            merge_heads=self.merge_heads,
            dtype=DTYPES[self.dtype],
            shard_bytes=FILE_BYTES,
            before_commit=before_commit,
        )

    def channels(self, base: Architecture, architecture: Architecture) -> Tensor | None:
        """The embedding channels of the checkpoint, of architecture `base`, that the student keeps: int64 [hidden], ascending.
        None for iterative pruning, which does not track them."""
        if self.recalibration:
            return None
        scores = self._scores()
        return select(scores, base, architecture, layers=self._layers(scores, base, architecture)).hidden

    def _prune_in_steps(self, model: nn.Module, architecture: Architecture, recalibration: Recalibration) -> nn.Module:
        rows = Rows.open(recalibration.rows, "train")
        return prune_in_steps(
            model,
            architecture,
            rows.take(rows_for_step(len(rows), min(recalibration.num_rows, len(rows)), 0, seed=0)),
            steps=recalibration.steps,
            layers=LayerScoring(metric=recalibration.layer_metric, rows=recalibration.layer_rows),
            batch_aggregation=recalibration.batch_aggregation,
            sequence_aggregation=recalibration.sequence_aggregation,
            neurons=recalibration.neurons,
            merge_heads=self.merge_heads,
            documents=rows.boundaries if recalibration.separate_documents else None,
        )

    def _scores(self) -> ImportanceScores:
        return ImportanceScores.load(storage.fetch_file(self.scores))

    def _layers(self, scores: ImportanceScores, base: Architecture, architecture: Architecture) -> list[int]:
        return kept_layers(scores, base.num_layers, architecture.num_layers, how=self.depth, metric=self.metric)
