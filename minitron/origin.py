"""What students are cut from: a checkpoint and its importance scores, by address."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from minitron import storage
from minitron.architecture import Architecture
from minitron.device import DTYPES, device
from minitron.importance import ImportanceScores
from minitron.models import load_model
from minitron.pruning import prune
from minitron.selection import Selection, kept_layers, select


@dataclass(frozen=True)
class Origin:
    """Addresses of a checkpoint folder and of its importance scores; `dtype` is what models compute in, `depth` and `metric`
    say which layers go (see `minitron.selection.kept_layers`)."""

    folder: str
    scores: str
    dtype: str
    depth: str = "contiguous"
    metric: str | None = None

    def load(self) -> nn.Module:
        return load_model(storage.fetch(self.folder), DTYPES[self.dtype]).to(device())

    def prune(self, model: nn.Module, architecture: Architecture) -> nn.Module:
        """The student of `architecture`, cut out of `model`, which `load` gave."""
        base, scores = Architecture.from_config(model.config), self._scores()
        return prune(model, architecture, scores, layers=self._layers(scores, base, architecture))

    def selection(self, base: Architecture, architecture: Architecture) -> Selection:
        """Which units of `base`, the checkpoint's architecture, the student keeps."""
        scores = self._scores()
        return select(scores, base, architecture, layers=self._layers(scores, base, architecture))

    def channels(self, base: Architecture, architecture: Architecture) -> Tensor:
        """Embedding channels of the checkpoint that the student keeps, int64 [hidden], ascending."""
        return self.selection(base, architecture).hidden

    def _scores(self) -> ImportanceScores:
        return ImportanceScores.load(storage.fetch_file(self.scores))

    def _layers(self, scores: ImportanceScores, base: Architecture, architecture: Architecture) -> list[int]:
        return kept_layers(scores, base.num_layers, architecture.num_layers, how=self.depth, metric=self.metric)
