"""A whole run of the recipe of `bench`, which the tests of several files read or copy."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from helpers import tiny
from helpers.command import run_minitron

STAGES = ["teacher", "data", "correct", "calibrate", "targets", "search", "distill", "evaluate", "register"]


@dataclass(frozen=True)
class FinishedRun:
    """A run that the command `minitron run` has finished. folder: has the recipe, the storage `runs` and what was printed."""

    folder: Path

    @property
    def stdout(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def copy(self, folder: Path) -> Path:
        """Copy the recipe and the storage to `folder`, which is returned. The teacher and the text stay where they are."""
        shutil.copy(self.folder / "recipe.yaml", folder)
        shutil.copytree(self.folder / "runs", folder / "runs")
        return folder


def run_recipe(folder: Path) -> None:
    """Fill a folder with what `tiny.bench` makes, and run its recipe with the storage `runs`; one trial at a time, because the
    imports of a second process would cost more than its trials."""
    file = tiny.bench(folder) / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text()) | {"resources": {"cpus_per_trial": 2}}
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = run_minitron("run", "recipe.yaml", "--storage", "runs", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "printed.txt").write_text(result.stdout)


def reused(result):
    """Number of stages that a run found already done."""
    return sum(line.startswith("✓") and "already done" in line for line in result.stdout.splitlines())


def results(folder, storage="runs", model="tiny-student"):
    """Outputs of the stages, the shared ones and those of one model of the family, by name."""
    (path,) = (folder / storage / "runs").glob("*/results.json")
    stages = json.loads(path.read_text())
    return stages["stages"] | stages["family"][model]
