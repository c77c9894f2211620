"""What was measured of whole training steps, and its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from benchmarks.measure import spread
from benchmarks.settings import Settings
from benchmarks.trainers import CONTENDERS, OURS
from minitron.architecture import Architecture
from minitron.distill.report import ASIDE


@dataclass(frozen=True)
class About:
    """The machine, and what the preparation took; written by the process that prepares."""

    machine: str
    gpu_bytes: int
    measured_flops: float
    datasheet_flops: float | None
    store_seconds: float


@dataclass
class Outcome:
    """The measurements of one trainer."""

    settings: Settings
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Answers of each round, as `Worker.turn` returns them."""
    failure: str = ""
    """Why there is none."""

    @property
    def seconds(self) -> list[float]:
        return [answer["seconds"] for answer in self.answers]

    @property
    def shares(self) -> dict[str, float]:
        """Percent of the last steps of the rounds by part, the largest first; only minitron says its parts."""
        steps = [answer["parts"] for answer in self.answers if "parts" in answer]
        parts = {part: mean(step[part] for step in steps) for part in (steps[0] if steps else {}) if part not in ASIDE}
        ordered = sorted(parts.items(), key=lambda item: -item[1])
        return {part: 100 * value / sum(parts.values()) for part, value in ordered if value}


def step_flops_per_token(name: str, teacher: Architecture, student: Architecture, seq_length: int) -> int:
    """FLOPs of a step per token as in `minitron.distill.utilisation`, for all trainers alike."""
    head = 2 * teacher.vocab_size * teacher.hidden_size
    own = 3 * student.flops_per_token(seq_length)
    return own + (head if name == OURS else teacher.flops_per_token(seq_length))


def columns_of(outcomes: dict[str, Outcome], tokens: int, flops: dict[str, int], about: About) -> list[dict[str, str]]:
    """Columns of the table. tokens: of a round. flops: per token, by trainer."""
    ours = [name for name in outcomes if CONTENDERS[name].package == "minitron"]
    heads = ["tokens/s", *(f"{name} / this" for name in ours), "of the data sheet's FLOP/s", "of measured FLOP/s"]
    heads += ["peak memory, GB", "bound by", "loss of the first step", "settings"]
    columns = [{"": head} for head in heads]
    for name, outcome in outcomes.items():
        settings = str(outcome.settings)
        if outcome.failure:
            cells = [outcome.failure, *["-"] * (len(heads) - 2), settings]
        else:
            speed = tokens / median(outcome.seconds)
            ratios = [_ratio(outcome, outcomes[one]) for one in ours]
            peaks = (about.datasheet_flops, about.measured_flops)
            used = [f"{100 * speed * flops[name] / peak:.1f} %" if peak else "-" for peak in peaks]
            memory = f"{max(answer['peak'] for answer in outcome.answers) / 1e9:.2f}"
            if outcome.settings.estimate:
                memory += f" (estimate {outcome.settings.estimate / 1e9:.1f})"
            bound = next((f"{part}, {share:.0f} %" for part, share in outcome.shares.items()), "-")
            loss = outcome.answers[0]["first_loss"]
            cells = [f"{speed:,.0f}", *ratios, *used, memory, bound, "-" if loss is None else f"{loss:.3f}", settings]
        for column, cell in zip(columns, cells, strict=True):
            column[name] = cell
    return columns


def _ratio(outcome: Outcome, own: Outcome) -> str:
    if own.failure:
        return "-"
    return spread([value / one for value, one in zip(outcome.seconds, own.seconds, strict=True)])
