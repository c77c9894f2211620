"""Runs a study: inputs that all arms share are made once, and the result of every arm is stored and not repeated."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.ablation.plan import ARMS, BOTH, DEPTH, Arm, Size, Study
from minitron import Architecture, ImportanceScores, estimate_importance, prune, storage
from minitron.data import Rows, TextSource, pack
from minitron.device import compute_dtype, device
from minitron.distill import DistillConfig, Losses, StoredTeacher, distill, store_hidden
from minitron.errors import InputError
from minitron.evaluation import heldout_metrics
from minitron.importance import LayerScoring
from minitron.importance.compare import axes, kept_overlap, rank_correlation
from minitron.logits import Head
from minitron.models import load_model, load_source, load_tokenizer, quiet_transformers, save_model, source_identity
from minitron.pruning.iterative import prune_in_steps
from minitron.pruning.selection import kept_layers

Say = Callable[[str], None]
CROSS_ENTROPY = Losses(logits="none", cross_entropy=1.0)


def shapes(base: Architecture) -> dict[str, Architecture]:
    """Students of equal size: three fifths of the layers, all layers but narrower, or four fifths and slightly narrower."""
    depth = replace(base, num_layers=base.num_layers * 3 // 5)
    step = base.num_heads * 8 if base.table.hidden_in_heads else 64
    narrow = replace(base, hidden_size=max(step, round(base.hidden_size * 7 / 8 / step) * step))
    shallow = replace(base, num_layers=base.num_layers * 4 // 5)
    return {DEPTH: depth, "width": _fill(narrow, depth.num_parameters), BOTH: _fill(shallow, depth.num_parameters)}


def _fill(shape: Architecture, parameters: int) -> Architecture:
    """`shape` with the MLP width, a multiple of 8, that brings it nearest to `parameters`."""
    widths = range(8, shape.intermediate_size + 1, 8)
    return min(
        (replace(shape, intermediate_size=width) for width in widths), key=lambda a: abs(a.num_parameters - parameters)
    )


def prepare(folder: Path, study: Study, say: Say) -> None:
    """Make the teacher, the rows, the stored targets, the corrected teacher and its targets, and the scores of every seed.

    Raises InputError if the folder contains another study.
    """
    size = study.size
    _check_same(folder / "study.json", study)
    teacher, rows = folder / "original", folder / "rows"
    if not storage.is_committed(str(teacher)):
        say(f"reading {study.model}")
        model, tokenizer = load_source(study.model, dtype=compute_dtype())
        with storage.committed_folder(str(teacher)) as part:
            save_model(model, tokenizer, part)
    if not storage.is_committed(str(rows)):
        say("packing the text")
        pack(
            TextSource(**study.text),
            load_tokenizer(teacher),
            str(rows),
            seq_length=size.seq_length,
            train_rows=size.train_rows,
            heldout_rows=size.heldout_rows,
        )
    corrected = folder / "corrected"
    if not storage.is_committed(str(corrected)):
        say("correcting the teacher")
        _correct(folder, corrected, size, say)
    for name in ("original", "corrected"):
        for split in ("train", "heldout"):
            say(f"storing the {name} teacher's hidden states of the {split} rows")
            store_hidden(
                lambda name=name: _load(folder / name),
                _rows(folder, split),
                str(folder / "hidden" / name / split),
                key=name,
            )
    for seed in range(size.seeds):
        for batch, sequence in {arm.aggregation for arm in ARMS.values()}:
            _scores(folder, size, seed, batch, sequence, "original", say)
    _scores(folder, size, 0, "l2", "mean", "corrected", say)


def _check_same(path: Path, study: Study) -> None:
    size = {name: value for name, value in asdict(study.size).items() if name not in ("seeds", "workers")}
    mine = {"size": size, "model": source_identity(study.model), "text": study.text}
    if path.exists() and (there := json.loads(path.read_text())) != mine:
        raise InputError(f"{path.parent} holds another study: {there}", "give another --folder, or delete this one")
    path.write_text(json.dumps(mine))


def _load(folder: Path) -> nn.Module:
    return load_model(folder, compute_dtype()).to(device())


def _rows(folder: Path, split: Any) -> Rows:
    return Rows.open(str(folder / "rows"), split)


def _correct(folder: Path, target: Path, size: Size, say: Say) -> None:
    model = _load(folder / "original")
    config = replace(
        _config(size, seed=0),
        steps=size.correction_steps,
        warmup_steps=size.correction_warmup,
        peak_lr=size.peak_lr / 5,
        min_lr=size.min_lr / 5,
        report_every=8,
    )
    distill(
        model,
        None,
        _rows(folder, "train"),
        config,
        losses=CROSS_ENTROPY,
        report=lambda step: say(f"correction {step.step}/{step.steps}, loss {step.loss:.3f}"),
    )
    with storage.committed_folder(str(target)) as part:
        save_model(model, load_tokenizer(folder / "original"), part)


def _config(size: Size, seed: int) -> DistillConfig:
    return DistillConfig(
        steps=size.steps,
        batch_rows=size.batch_rows,
        micro_batch_rows=size.micro_batch_rows,
        peak_lr=size.peak_lr,
        min_lr=size.min_lr,
        warmup_steps=size.warmup_steps,
        seed=seed,
    )


def _calibration(folder: Path, size: Size, seed: int) -> torch.Tensor:
    """Calibration rows, other ones for every seed."""
    rows = _rows(folder, "train")
    return rows.take([(seed * size.calibration_rows + i) % len(rows) for i in range(size.calibration_rows)])


def _scores(folder: Path, size: Size, seed: int, batch: str, sequence: str, teacher: str, say: Say) -> ImportanceScores:
    path = folder / "scores" / f"{teacher}-{batch}-{sequence}-{seed}.safetensors"
    if not path.exists():
        say(f"scoring the {teacher} teacher by ({batch}, {sequence}), seed {seed}")
        path.parent.mkdir(exist_ok=True)
        model = _load(folder / teacher)
        base = Architecture.from_config(model.config)
        removed = sorted({base.num_layers - shape.num_layers for shape in shapes(base).values()} - {0})
        plain = (batch, sequence) == ("l2", "mean")
        layers = LayerScoring("loss", sizes=(1, *removed), rows=size.layer_rows) if plain else LayerScoring()
        made = estimate_importance(
            model,
            _calibration(folder, size, seed),
            batch_aggregation=batch,
            sequence_aggregation=sequence,
            layers=layers,
        )
        made.save(path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return ImportanceScores.load(path)


def agreement(folder: Path, size: Size) -> dict[str, tuple[float, float]]:
    """How similarly the scores of the corrected and the original teacher rank units: per axis the mean rank correlation and the
    mean share of the better half that is the same (arXiv 2408.11796 section 2.1 sees no need to compute them again)."""
    pair = [_scores(folder, size, 0, "l2", "mean", teacher, lambda _: None) for teacher in ("original", "corrected")]
    agreements = {}
    for axis, first in axes(pair[0]).items():
        second = axes(pair[1])[axis]
        pairs = list(zip(first, second, strict=True))
        agreements[axis] = (
            statistics.fmean(rank_correlation(a, b) for a, b in pairs),
            statistics.fmean(kept_overlap(a, b) for a, b in pairs),
        )
    return agreements


def result_path(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / "results" / f"{arm.name}-{seed}.json"


def run_arm(folder: Path, study: Study, name: str, seed: int) -> dict[str, Any]:
    """Make one student, measure it, distil it and measure it again; `prepare` must have been called."""
    arm, size = ARMS[name], study.size
    path = result_path(folder, arm, seed)
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    teacher = _load(folder / arm.teacher)
    head = Head.of(teacher)
    student = _student(folder, size, arm, seed, teacher)
    del teacher
    targets = {
        s: StoredTeacher(str(folder / "hidden" / arm.teacher / s), head, arm.teacher) for s in ("train", "heldout")
    }
    heldout = _rows(folder, "heldout")
    tokens = heldout.take(range(len(heldout)))

    def measure() -> dict[str, Any]:
        metrics = heldout_metrics(
            student,
            tokens,
            teacher_hidden=lambda part: targets["heldout"].hidden(range(part.start, part.stop), tokens[part]),
            teacher_head=head,
        )
        return {"loss": metrics.loss, "kl": metrics.kl, "per_row_loss": metrics.per_row_loss}

    before = measure()
    distill(
        student,
        targets["train"] if arm.loss == "kl" else None,
        _rows(folder, "train"),
        _config(size, seed),
        losses=Losses() if arm.loss == "kl" else CROSS_ENTROPY,
    )
    result = {
        "arm": asdict(arm),
        "seed": seed,
        "parameters": Architecture.from_config(student.config).num_parameters,
        "tokens": size.tokens,
        "before": before,
        "after": measure(),
    }
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    return result


def _student(folder: Path, size: Size, arm: Arm, seed: int, teacher: nn.Module) -> nn.Module:
    base = Architecture.from_config(teacher.config)
    shape = shapes(base)[arm.shape]
    if arm.pruning_steps > 1:
        return prune_in_steps(teacher, shape, _calibration(folder, size, seed), steps=arm.pruning_steps)
    how, metric = arm.layers
    by_layers = _scores(folder, size, seed, "l2", "mean", "original", lambda _: None)
    layers = kept_layers(by_layers, base.num_layers, shape.num_layers, how=how, metric=metric)
    scores = _scores(folder, size, seed, *arm.aggregation, "original", lambda _: None)
    student = prune(teacher, shape, scores, layers=layers)
    return _randomised(student, seed) if arm.start == "random" else student


def _randomised(student: nn.Module, seed: int) -> nn.Module:
    """A model of the same shape with random weights from transformers; built as `prune` does, so that buffers stay float32."""
    torch.manual_seed(seed)
    fresh = type(student)(student.config).state_dict()
    with quiet_transformers():
        made: nn.Module = type(student).from_pretrained(
            None, config=student.config, state_dict=fresh, dtype=next(student.parameters()).dtype
        )
    return made.to(device()).eval()
