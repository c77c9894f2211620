"""Inputs of the search benchmark: a teacher, packed rows, importance scores, stored targets, and candidates."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minitron import Architecture, estimate_importance
from minitron.data import Rows, Split, TextSource, pack
from minitron.device import compute_dtype, device
from minitron.distill import DistillConfig, LiveTeacher, Losses, store_hidden
from minitron.distill.inputs import DistillInputs
from minitron.distill.teacher.live import Targets
from minitron.importance import LayerScoring
from minitron.logits import Head
from minitron.models import load_source, save_model
from minitron.pruning.source import PruningSource
from minitron_search import candidates
from minitron_search.halving import rung_steps
from minitron_search.search_task import SearchTask

SPACE: dict[str, list[int]] = {
    "num_layers": [18, 24, 30],
    "hidden_size": [504, 540, 576],
    "intermediate_size": list(range(640, 1537, 64)),
}
PARAMETERS, TOLERANCE = 90_000_000, 0.05


@dataclass(frozen=True)
class Size:
    """The size of the benchmark; `compared` of the candidates are distilled with and without stored targets."""

    candidates: int
    compared: int
    steps: int
    batch_rows: int
    micro_batch_rows: int
    seq_length: int
    heldout_rows: int
    calibration_rows: int
    rungs: tuple[float, ...]

    @property
    def train_rows(self) -> int:
        return max(self.steps * self.batch_rows, self.calibration_rows)


SHORT = Size(24, 8, 12, 2, 2, 256, 12, 16, (0.25, 0.5, 0.75))
LONG = Size(48, 8, 400, 16, 16, 1024, 64, 256, (0.125, 0.25, 0.5, 0.75))


@dataclass(frozen=True)
class OnlineInputs(DistillInputs):
    """Inputs without stored targets: every trial loads the teacher and runs it on its training rows and the held-out rows."""

    def targets(self, teacher_head: Head) -> Targets:
        return _live(self)

    def heldout_teacher(self, teacher_head: Head) -> LiveTeacher:
        return _live(self)


@lru_cache(maxsize=1)
def _live(materials: DistillInputs) -> LiveTeacher:
    return LiveTeacher(materials.load_teacher())


@dataclass(frozen=True)
class Study:
    """Inputs that all searches of the benchmark share; `storing` is the time it took to store the targets, in seconds."""

    materials: DistillInputs
    origin: PruningSource
    candidates: list[Architecture]
    storing: float

    def task(self, size: Size, folder: Path, *, online: bool = False, threads: int = 1) -> SearchTask:
        """The task of a search whose trials are stored in `folder`."""
        materials = OnlineInputs(**vars(self.materials)) if online else self.materials
        config = DistillConfig(
            steps=size.steps,
            batch_rows=size.batch_rows,
            micro_batch_rows=size.micro_batch_rows,
            peak_lr=6e-4,
            min_lr=6e-5,
            warmup_steps=max(1, size.steps // 4),
        )
        rungs = rung_steps(size.rungs, size.steps)
        return SearchTask(materials, self.origin, config, Losses(), str(folder), threads=threads, rungs=rungs)


def prepare(folder: Path, size: Size, model: str, text: TextSource) -> Study:
    """Make all inputs in `folder`."""
    dtype = compute_dtype()
    teacher, tokenizer = load_source(model)
    teacher = teacher.to(device(), dtype).eval()
    save_model(teacher, tokenizer, folder / "teacher")
    paths = {name: str(folder / name) for name in ("teacher", "rows", "train", "heldout", "scores.safetensors")}
    rows = pack(
        text,
        tokenizer,
        paths["rows"],
        seq_length=size.seq_length,
        train_rows=size.train_rows,
        heldout_rows=size.heldout_rows,
    )
    base = Architecture.from_config(teacher.config)
    removed = tuple(base.num_layers - depth for depth in SPACE["num_layers"] if depth < base.num_layers)
    layers = LayerScoring("loss", sizes=removed, rows=4)
    scores = estimate_importance(teacher, rows.take(range(size.calibration_rows)), layers=layers)
    scores.save(Path(paths["scores.safetensors"]))
    materials = DistillInputs(
        teacher=paths["teacher"],
        teacher_id="teacher",
        dtype=str(dtype).removeprefix("torch."),
        rows=paths["rows"],
        train_targets=paths["train"],
        heldout_targets=paths["heldout"],
    )
    started = time.perf_counter()
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        store_hidden(lambda: teacher, Rows.open(materials.rows, split), paths[split], key=materials.targets_key(split))
    storing = time.perf_counter() - started
    shapes = candidates(base, SPACE, PARAMETERS * (1 - TOLERANCE), PARAMETERS * (1 + TOLERANCE))
    origin = PruningSource(materials.teacher, paths["scores.safetensors"], materials.dtype)
    return Study(materials, origin, _spread(shapes, size.candidates), storing)


def _spread(shapes: list[Architecture], count: int) -> list[Architecture]:
    """`count` of the shapes, spread evenly over their order by size."""
    return [shapes[index * len(shapes) // count] for index in range(count)] if count < len(shapes) else shapes
