"""What students are cut from: a checkpoint and its importance scores, by address."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.data import Rows, rows_for_step
from minitron.device import DTYPES, device
from minitron.importance import ImportanceScores, LayerScoring
from minitron.models import load_model
from minitron.pruning.iterative import prune_in_steps
from minitron.pruning.selection import kept_layers, select
from minitron.pruning.slicing import prune


@dataclass(frozen=True)
class Recalibration:
    """Pruning in `steps` steps: before each the model is scored anew, on `num_rows` of the packed `rows`, drawn at random."""

    steps: int
    rows: str
    num_rows: int
    layer_metric: str
    layer_rows: int
    batch_aggregation: str
    sequence_aggregation: str
    neurons: str


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
        return load_model(storage.fetch(self.folder), DTYPES[self.dtype]).to(device())

    def prune(self, model: nn.Module, architecture: Architecture) -> nn.Module:
        """The student of `architecture`, cut out of `model`, which `load` gave."""
        if self.recalibration:
            return self._prune_in_steps(model, architecture, self.recalibration)
        base, scores = Architecture.from_config(model.config), self._scores()
        kept = self._layers(scores, base, architecture)
        return prune(model, architecture, scores, layers=kept, merge_heads=self.merge_heads)

    def channels(self, base: Architecture, architecture: Architecture) -> Tensor | None:
        """Embedding channels of the checkpoint, of architecture `base`, that the student keeps, int64 [hidden], ascending;
        None where steps of pruning have not kept count."""
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
        )

    def _scores(self) -> ImportanceScores:
        return ImportanceScores.load(storage.fetch_file(self.scores))

    def _layers(self, scores: ImportanceScores, base: Architecture, architecture: Architecture) -> list[int]:
        return kept_layers(scores, base.num_layers, architecture.num_layers, how=self.depth, metric=self.metric)
