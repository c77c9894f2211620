"""The compared arms, each of which differs from another in one choice, and the findings of the papers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WIDTH, DEPTH, BOTH = "width", "depth", "both"


@dataclass(frozen=True)
class Arm:
    """One way to make a student; all students have almost the same number of parameters and are trained on the same tokens."""

    name: str
    what: str
    shape: str = WIDTH
    aggregation: tuple[str, str] = ("l2", "mean")  # over the batch, over the sequence
    layers: tuple[str, str] = ("contiguous", "loss")  # which layers are removed, and the metric that ranks them
    pruning_steps: int = 1
    loss: str = "kl"  # or "ce"
    start: str = "pruned"  # or "random"
    teacher: str = "original"  # or "corrected"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("width", "width pruned, KL"),
        Arm("depth", "depth pruned, contiguous block, by loss", shape=DEPTH),
        Arm("both", "depth and width pruned", shape=BOTH),
        Arm("width-ce", "width pruned, cross-entropy alone", loss="ce"),
        Arm("width-random", "random weights, KL", start="random"),
        Arm("width-l2-l2", "width pruned, (L2, L2)", aggregation=("l2", "l2")),
        Arm("depth-cosine", "depth pruned, contiguous block, by cosine", shape=DEPTH, layers=("contiguous", "cosine")),
        Arm("depth-scattered", "depth pruned, single layers, by loss", shape=DEPTH, layers=("scattered", "loss")),
        Arm("width-4-steps", "width pruned in 4 steps", pruning_steps=4),
        Arm("width-corrected", "width pruned, corrected teacher", teacher="corrected"),
    )
}


@dataclass(frozen=True)
class Comparison:
    """Two arms, the paper's finding, and the arm that is better in the paper; None if the paper sees no difference."""

    question: str
    first: str
    second: str
    paper: str
    better: str | None


COMPARISONS = (
    Comparison("width or depth", "width", "depth", "loss 2.049 and 2.155 (2407.14679, Table 13): width", "width"),
    Comparison(
        "width alone or with depth",
        "width",
        "both",
        "loss 2.049 and 2.062 (2407.14679, Table 13): width alone",
        "width",
    ),
    Comparison(
        "KL or cross-entropy",
        "width",
        "width-ce",
        "MMLU 37.81 after 100B tokens, 24.57 after 150B (2407.14679, Table 14): KL",
        "width",
    ),
    Comparison(
        "pruned or from scratch",
        "width",
        "width-random",
        "loss 2.062 and 3.953 (2407.14679, Table 1): pruned",
        "width",
    ),
    Comparison(
        "(L2, mean) or (L2, L2)",
        "width",
        "width-l2-l2",
        "loss 7.18 and 8.73 before training (2407.14679, Table 11), same order after: (L2, mean)",
        "width",
    ),
    Comparison(
        "layers by loss or by cosine",
        "depth",
        "depth-cosine",
        "loss 2.155 and 2.177 (2407.14679, Table 13): by loss",
        "depth",
    ),
    Comparison(
        "contiguous or scattered layers",
        "depth",
        "depth-scattered",
        "scattered has the better loss, contiguous the better task accuracy (2408.11796, Figures 8 and 9)",
        "depth-scattered",
    ),
    Comparison(
        "one shot or 4 pruning steps",
        "width",
        "width-4-steps",
        "loss 1.92 for both after training (2407.14679, Table 12): no difference",
        None,
    ),
    Comparison(
        "corrected teacher or not",
        "width-corrected",
        "width",
        "over 6 % lower student loss (2408.11796, section 2.1): corrected",
        "width-corrected",
    ),
)


@dataclass(frozen=True)
class Size:
    """The size of the study."""

    seq_length: int
    train_rows: int
    heldout_rows: int
    calibration_rows: int
    layer_rows: int
    steps: int
    batch_rows: int
    micro_batch_rows: int
    warmup_steps: int
    correction_steps: int
    correction_warmup: int
    seeds: int
    workers: int
    peak_lr: float = 6e-4
    min_lr: float = 6e-5

    @property
    def tokens(self) -> int:
        """Number of training tokens of every student."""
        return self.steps * self.batch_rows * self.seq_length


SHORT = Size(
    seq_length=256,
    train_rows=192,
    heldout_rows=32,
    calibration_rows=32,
    layer_rows=4,
    steps=24,
    batch_rows=4,
    micro_batch_rows=2,
    warmup_steps=4,
    correction_steps=48,
    correction_warmup=12,
    seeds=3,
    workers=2,
)
LONG = Size(
    seq_length=2048,
    train_rows=9600,
    heldout_rows=128,
    calibration_rows=1024,
    layer_rows=64,
    steps=400,
    batch_rows=48,
    micro_batch_rows=16,
    warmup_steps=40,
    correction_steps=400,
    correction_warmup=120,
    seeds=3,
    workers=1,
)


@dataclass(frozen=True)
class Study:
    """Everything that determines the figures."""

    size: Size
    model: str
    text: dict[str, Any] = field(default_factory=lambda: {"kind": "python-docs"})
