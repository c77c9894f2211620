"""The files of every trial, in a folder of its own below the search's folder: measurements, result, checkpoints and weights.

Measurements and results are JSON: `undistilled.json`, `rung-STEP.json`, `result.json`. Stored values are never computed again.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from minitron import storage
from minitron.architecture import Architecture
from minitron.errors import MinitronError

T = TypeVar("T")

FORWARD_FILE = "undistilled.json"
RESULT_FILE = "result.json"
WEIGHTS = "weights"


@dataclass(frozen=True)
class ForwardScore:
    """Exact held-out KL to the teacher and loss of a candidate that is pruned and untrained, in nats per token."""

    kl: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ForwardScore:
        return cls(kl=values["kl"], loss=values["loss"])


@dataclass(frozen=True)
class RungResult:
    """Held-out KL and loss of a candidate after `step` steps, in nats per token, and the KL of every held-out row."""

    step: int
    kl: float
    loss: float
    per_row_kl: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RungResult:
        rows = tuple(values["per_row_kl"])
        return cls(step=values["step"], kl=values["kl"], loss=values["loss"], per_row_kl=rows)


@dataclass(frozen=True)
class TrialResult:
    """KL and loss of a candidate on the held-out rows after its whole short distillation, in nats per token.

    `rung_kl` maps the step of each rung to the KL there, `tokens` is the number of training tokens, `config` the
    `DistillConfig` as a dict, and `seconds` the time in the process that finished the trial: for a trial that was resumed, the
    time since then.
    """

    architecture: Architecture
    parameters: int
    kl_undistilled: float
    loss_undistilled: float
    rung_kl: dict[int, float]
    kl: float
    loss: float
    top1_agreement: float
    per_row_kl: Sequence[float] = field(repr=False)
    tokens: int
    config: dict[str, Any] = field(repr=False)
    seconds: float

    @property
    def steps(self) -> int:
        """Steps of the distillation."""
        return int(self.config["steps"])

    def to_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "rung_kl"}
        rungs = [{"step": step, "kl": kl} for step, kl in self.rung_kl.items()]
        per_row_kl = list(self.per_row_kl)
        return {**values, "architecture": self.architecture.to_dict(), "rungs": rungs, "per_row_kl": per_row_kl}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialResult:
        return cls(
            architecture=Architecture.from_dict(values["architecture"]),
            parameters=values["parameters"],
            kl_undistilled=values["kl_undistilled"],
            loss_undistilled=values["loss_undistilled"],
            rung_kl={rung["step"]: rung["kl"] for rung in values["rungs"]},
            kl=values["kl"],
            loss=values["loss"],
            top1_agreement=values["top1_agreement"],
            per_row_kl=array("d", values["per_row_kl"]),  # a quarter of the memory of a tuple
            tokens=values["tokens"],
            config=values["config"],
            seconds=values["seconds"],
        )


def trial_key(architecture: Architecture) -> str:
    """Identifies a candidate within a search: the name of its folder."""
    return storage.fingerprint(architecture.to_dict())


def trial_folder(folder: str, architecture: Architecture) -> str:
    """The folder of a candidate's trial below the search's `folder`."""
    return storage.join(folder, trial_key(architecture))


def trial_result(folder: str, architecture: Architecture, rungs: Sequence[int] = ()) -> TrialResult | None:
    """The result of a finished trial; None if there is none, or if the trial was not measured at all of `rungs` and has to be
    repeated. Raises MinitronError for a file that is not a trial's."""
    result = _read(folder, architecture, RESULT_FILE, TrialResult.from_dict)
    return result if result is not None and result.rung_kl.keys() >= set(rungs) else None


def write_result(folder: str, result: TrialResult) -> None:
    storage.write_json(storage.join(trial_folder(folder, result.architecture), RESULT_FILE), result.to_dict())


def rung_result(folder: str, architecture: Architecture, step: int) -> RungResult | None:
    """A candidate's measurement after `step` steps, or None. Raises MinitronError for a file that is not a trial's."""
    return _read(folder, architecture, rung_file(step), RungResult.from_dict)


def write_rung(folder: str, architecture: Architecture, result: RungResult) -> None:
    storage.write_json(storage.join(trial_folder(folder, architecture), rung_file(result.step)), result.to_dict())


def forward_score(folder: str, architecture: Architecture) -> ForwardScore | None:
    """A candidate's measurement before any training, or None. Raises MinitronError for a file that is not a trial's."""
    return _read(folder, architecture, FORWARD_FILE, ForwardScore.from_dict)


def write_forward_score(folder: str, architecture: Architecture, score: ForwardScore) -> None:
    storage.write_json(storage.join(trial_folder(folder, architecture), FORWARD_FILE), score.to_dict())


def checkpoints(folder: str, architecture: Architecture) -> str:
    """The folder of the checkpoints from which a trial resumes."""
    return storage.join(trial_folder(folder, architecture), "checkpoints")


def drop_checkpoints(folder: str, architecture: Architecture) -> None:
    storage.remove(checkpoints(folder, architecture))


def pruned(folder: str, architecture: Architecture) -> str:
    """The folder of a candidate before its distillation, while several processes train it in parts."""
    return storage.join(trial_folder(folder, architecture), "pruned")


def weights(folder: str, architecture: Architecture) -> str:
    """The folder of a trial's distilled student, a plain transformers checkpoint without tokenizer."""
    return storage.join(trial_folder(folder, architecture), WEIGHTS)


def drop_weights(folder: str, architecture: Architecture) -> None:
    storage.remove(weights(folder, architecture))


def rung_file(step: int) -> str:
    """The name of the file with a candidate's measurement after `step` steps."""
    return f"rung-{step:06d}.json"


def _read(folder: str, architecture: Architecture, name: str, parse: Callable[[dict[str, Any]], T]) -> T | None:
    path = storage.join(trial_folder(folder, architecture), name)
    values = storage.read_json_if_exists(path)
    if values is None:
        return None
    try:
        return parse(values)
    except (KeyError, TypeError) as error:
        raise MinitronError(
            f"{path}: not a trial's file ({type(error).__name__}: {error})", "delete the file and run again"
        ) from error
