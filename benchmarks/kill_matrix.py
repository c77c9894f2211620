"""Kills during a run on a cluster of this machine: a head without CPUs, two nodes with one CPU each, an S3 server as storage.

    python -m benchmarks.kill_matrix [--kill worker] [--stage distill] [--out kills.jsonl]

A run for each kind of kill, with a kill in every stage; docs/cluster.md describes the kinds. A line has the kind, the stage,
whether all stored rows and tensors are those of the run without kills, whether the run came to its end, the finished parts that
were written again, the number of steps that were trained again, the seconds lost, a note, the beginnings of the SHA-256 of the
student and of all tensors, and the number of versions of the student in MLflow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import yaml
from helpers import tiny
from safetensors.torch import load_file

from benchmarks.kills.moments import MOMENTS
from benchmarks.kills.nodes import Machines
from benchmarks.kills.runs import KILLS, STUDENT, KilledRun
from benchmarks.kills.storage import GatedStorage

# A training of two workers loses a node or hears that it will, goes on with one worker, and grows when a node joins.
EARLY, LATE = (next(moment for moment in MOMENTS if moment.name == name) for name in ("distill", "late distill"))
ELASTIC = {"shrink": [(EARLY, "lose"), (LATE, "join")], "preempt": [(EARLY, "drain"), (LATE, "join")]}
# Enough steps for a controller to see the node while one worker trains; it looks every two seconds.
ELASTIC_RUN = ["resources.workers={min: 1, max: 2}", "distill.steps=200", "distill.checkpoint_every=8"]


def make_recipe(folder: Path) -> Path:
    """The small recipe of the tests with a correction, three candidates, and enough rows for several shards of targets."""
    folder.mkdir()
    tiny.bench(folder)
    tiny.corpus(folder / "text.jsonl", 3000)
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    training = recipe["search"]["training"]
    recipe["data"] |= {"seq_length": 128, "train_rows": 768, "heldout_rows": 16}
    recipe["correct"] = {"when": "always", "training": {**training, "steps": 6}}
    recipe["family"][0]["space"] = {"num_layers": [4], "hidden_size": [36], "intermediate_size": [48, 72]}
    recipe["family"][0]["tolerance"] = 0.5
    recipe["resources"] = {"workers": 2}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@dataclass(frozen=True)
class Undisturbed:
    """A run without kills."""

    seconds: dict[str, float]
    """From each moment to the end of its stage."""
    parts: dict[str, dict[str, int]]
    """How often each finished part of the stage of a moment was written."""
    tensors: dict[str, str]
    curve: list[float] = field(default_factory=list)
    """Training loss of each step of the distillation."""

    @classmethod
    def of(cls, run: KilledRun) -> Undisturbed:
        cells = run.cells()
        seconds = {cell.moment: cell.seconds for cell in cells}
        return cls(seconds, {cell.moment: cell.parts for cell in cells}, run.tensors(), run.curve())

    @classmethod
    def read(cls, file: Path, run: KilledRun) -> Undisturbed:
        """What `file` has of an earlier run, or `run` to its end, which writes it, with the student beside it."""
        if not file.exists():
            run.machines.kill_all()
            run.machines.start()
            run.run([(moment, "none") for moment in MOMENTS])
            run.keep_student(file.with_suffix(".safetensors"))
            file.write_text(json.dumps(asdict(cls.of(run))))
        return cls(**json.loads(file.read_text()))


def report(run: KilledRun, before: Undisturbed, out: Path | None, *, ended: bool) -> None:
    """Print what each kill of a run cost, and add it to the file `out`. ended: whether it ran to its end; if not, what was
    stored before is compared."""
    tensors = run.tensors()
    names = before.tensors.keys() | tensors.keys() if ended else tensors.keys()
    different = [name for name in names if before.tensors.get(name) != tensors.get(name)]
    again, versions = run.steps_redone(), run.versions()
    for cell in run.cells():
        once = before.parts[cell.moment]
        redone = [part for part, count in cell.parts.items() if part in once and count > once[part]]
        lost = cell.seconds - before.seconds[cell.moment]
        steps = sum(count for training, count in again.items() if is_of(training, cell.moment))
        line = {
            "kill": run.name if run.name == cell.kill else f"{run.name}: {cell.kill}",
            "moment": cell.moment,
            "same": not different,
            "ended": ended,
            "redone": sorted(redone),
            "steps": steps,
            "lost": round(lost),
            "note": cell.note,
            "student": next((sum_ for name, sum_ in tensors.items() if name.endswith(STUDENT)), "")[:16],
            "tensors": hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16],
            "versions": versions,
        }
        print(f"| {' | '.join(map(str, line.values()))} |", flush=True)
        if out:
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if different:
        print(f"different: {', '.join(sorted(different))}", flush=True)


def largest_difference(one: Path, other: Path) -> float | None:
    """Largest difference of two files of weights, relative to the largest weight of each tensor; None unless both exist."""
    if not (one.exists() and other.exists()):
        return None
    first, second = load_file(one), load_file(other)
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)


def is_of(training: str, moment: str) -> bool:
    """Whether a training, by its folder or candidate, belongs to the stage of a moment."""
    return f"stages/{moment.removeprefix('late ')}/" in training if "stages/" in training else moment == "search"


def main() -> None:
    names = [moment.name for moment in MOMENTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kill_matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kill", action="append", choices=(*KILLS, *ELASTIC), help="by default all")
    parser.add_argument("--stage", action="append", choices=names, help="by default each in turn, in one run")
    parser.add_argument("--out", type=Path, help="file to which each line is added as JSON")
    parser.add_argument("--undisturbed", type=Path, help="file with the run without kills, which is written if missing")
    parser.add_argument("--keep", type=Path, help="folder for all files, which is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = given.keep or Path(name)
        folder.mkdir(exist_ok=True)
        notes = given.undisturbed or folder / "undisturbed.json"
        os.environ["OMP_NUM_THREADS"] = "1"
        recipe = make_recipe(folder / "inputs")
        storage = GatedStorage(folder / "s3")
        machines = Machines(folder, storage.variables)
        try:
            for kind in given.kill or (*KILLS, *ELASTIC):
                overrides = ELASTIC_RUN if kind in ELASTIC else []
                file = notes.with_name(f"elastic-{notes.name}") if kind in ELASTIC else notes
                before = Undisturbed.read(file, KilledRun(machines, storage, recipe, "undisturbed", overrides))
                machines.kill_all()
                machines.start()
                run = KilledRun(machines, storage, recipe, kind, overrides)
                moments = [moment for moment in MOMENTS if moment.name in (given.stage or set(names) - {LATE.name})]
                kills = ELASTIC.get(kind) or [(moment, kind) for moment in moments]
                ended = True
                try:
                    run.run(kills)
                except (RuntimeError, TimeoutError) as error:
                    ended = False
                    print(f"{kind}: {error}", flush=True)
                run.end()
                report(run, before, given.out, ended=ended)
                if kind == "driver":
                    print(f"points in MLflow of the distillation, by metric: {run.points()}", flush=True)
                run.keep_student(folder / f"{kind}.safetensors")
                difference = largest_difference(file.with_suffix(".safetensors"), folder / f"{kind}.safetensors")
                if difference:
                    print(f"largest difference of a weight of the student: {difference:.1e}", flush=True)
                if kind in ELASTIC and (curve := run.curve()):
                    losses = max(abs(one / other - 1) for one, other in zip(before.curve, curve, strict=True))
                    print(f"largest difference of a step's loss, of {len(curve)} steps: {losses:.1e}", flush=True)
        finally:
            machines.close()
            storage.close()


if __name__ == "__main__":
    main()
