"""The moments at which something is killed, one in each stage that computes, and what counts there as a finished part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.kills.storage import Write


@dataclass(frozen=True)
class Moment:
    """A write to the storage during a stage, by the name of the work that it belongs to. stored: whether it is held before or
    after it has been carried out."""

    name: str
    request: str
    """Pattern of the written path."""
    parts: str
    """Pattern of the files that end a finished part of the stage's work."""
    stored: bool = True
    stage: str = ""
    """Name of the stage, by default that of the work."""

    def pattern(self, bucket: str) -> str:
        return f"^PUT /{bucket}/{self.request}$"

    @property
    def record(self) -> str:
        """Pattern of the path of the stage's record, which ends it."""
        return f"stages/{self.stage or self.name}/[0-9a-f]+/stage.json$"


MOMENTS = (
    Moment("teacher", r"stages/teacher/.*/model/manifest.json", parts=r"stages/teacher/.*/model/manifest.json"),
    Moment("data", r"stages/data/.*/parts/.*\.json", parts=r"stages/data/.*/parts/.*\.json"),
    Moment("correct", r"stages/correct/.*/step-0*4/manifest.json", parts=r"stages/correct/.*\.json"),
    Moment("calibrate", r"stages/calibrate/.*/scores.safetensors", parts=r"stages/calibrate/.*", stored=False),
    Moment("targets", r"stages/targets/.*/train/shard-.*/manifest.json", parts=r"stages/targets/.*\.json"),
    Moment("search", r"trials/.*/result.json", parts=r"trials/.*/result.json"),
    Moment(
        "prune",
        r"stages/distill/.*/pruned/manifest.json",
        parts=r"stages/distill/.*/pruned/manifest.json",
        stored=False,
        stage="distill",
    ),
    Moment(
        "distill",
        r"stages/distill/.*/checkpoints/step-0*8/manifest.json",
        parts=r"stages/distill/.*/(checkpoints/step-\d+|student)/manifest.json",
    ),
    Moment(
        "late distill",
        r"stages/distill/.*/checkpoints/step-0*16/manifest.json",
        parts=r"stages/distill/.*/(checkpoints/step-\d+|student)/manifest.json",
        stage="distill",
    ),
    Moment("evaluate", r"stages/evaluate/.*/pruned.json", parts=r"(stages/evaluate|quality)/.*\.json"),
    # the version is in MLflow, and the record that says so is not stored yet
    Moment("register", r"stages/register/.*/stage.json", parts=r"stages/register/.*", stored=False),
)


def finished_parts(moment: Moment, bucket: str, writes: Sequence[Write]) -> dict[str, int]:
    """How often each finished part of a stage was written, by its path without fingerprints."""
    wanted = re.compile(f"^P[A-Z]+ /{bucket}/(?P<path>{moment.parts})$")
    matches = (wanted.match(write.request) for write in writes)
    return dict(Counter(without_fingerprints(match["path"]) for match in matches if match))


def without_fingerprints(path: str) -> str:
    """The path of what a stage stored; some fingerprints in it depend on the name of the bucket."""
    return re.sub("[0-9a-f]{16}", "-", path)


def seconds_to_record(moment: Moment, bucket: str, writes: Sequence[Write], start: float) -> float | None:
    """Seconds from `start` to the record of the stage; None if it was not written."""
    wanted = re.compile(f"^PUT /{bucket}/{moment.record}")
    ends = [write.at for write in writes if write.at > start and wanted.match(write.request)]
    return min(ends) - start if ends else None
