"""A recipe's `resources` in numbers: what `auto` means with the GPUs that are there."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_platform.recipes.schema import Recipe

TRIALS_PER_GPU = 4  # of candidates that are small beside its memory: one alone would leave it idle half of the time
CPU_WORKERS = 2  # without a GPU


@dataclass(frozen=True)
class ResolvedResources:
    """As `resources` of a recipe, with a number for every `auto`."""

    workers_per_trial: int
    cpus_per_trial: float
    gpus_per_trial: float
    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int

    @property
    def trial_share(self) -> dict[str, float]:
        """What each process of a trial takes, by Ray's names."""
        return _share(self.cpus_per_trial, self.gpus_per_trial)

    @property
    def worker_share(self) -> dict[str, float]:
        """What each training worker takes, by Ray's names."""
        return _share(self.cpus_per_worker, self.gpus_per_worker)


def resolve(recipe: Recipe, gpus: int, *, small_trials: bool = False) -> ResolvedResources:
    """The numbers for a machine or cluster with this many GPUs; those that the recipe gives stay.

    With GPUs there is one training worker on each, and a trial has one too, or a quarter of it where `small_trials` says
    that a GPU has memory for four. Without, trials and workers take CPUs. Where more processes work together than there are
    GPUs they take CPUs as well, because those of NCCL cannot share one. No worker is without a row in a step.
    """
    given = recipe.resources
    workers = _workers(recipe, gpus) if given.workers == "auto" else given.workers
    per_worker, per_trial = given.gpus_per_worker, given.gpus_per_trial
    if per_worker == "auto":
        per_worker = 1 if workers <= gpus else 0
    if per_trial == "auto":
        whole = 1 / TRIALS_PER_GPU if small_trials and given.workers_per_trial == 1 else 1
        per_trial = whole if given.workers_per_trial <= gpus else 0
    return ResolvedResources(
        workers_per_trial=given.workers_per_trial,
        cpus_per_trial=given.cpus_per_trial,
        gpus_per_trial=per_trial,
        workers=workers,
        cpus_per_worker=given.cpus_per_worker,
        gpus_per_worker=per_worker,
        max_failures=given.max_failures,
    )


def _workers(recipe: Recipe, gpus: int) -> int:
    each, rows = recipe.resources.gpus_per_worker, _fewest_rows(recipe)
    if not gpus or each == 0:
        return min(CPU_WORKERS, rows)
    return min(rows, max(1, gpus if each == "auto" else int(gpus / max(1, each))))


def left_idle(recipe: Recipe, resources: ResolvedResources, gpus: int) -> list[str]:
    """Why GPUs that are there stay idle, though the recipe left it to `auto`."""
    given = recipe.resources
    return [
        f"resources.{key}: {count} cannot share {gpus} GPU{'s' if gpus > 1 else ''}, so that they train on CPUs; "
        f"lower it to {gpus}{remedy} to use {'them' if gpus > 1 else 'it'}"
        for key, count, wanted, chosen, remedy in (
            ("workers_per_trial", given.workers_per_trial, given.gpus_per_trial, resources.gpus_per_trial, ""),
            ("workers", given.workers, given.gpus_per_worker, resources.gpus_per_worker, ", or leave it out,"),
        )
        if gpus and wanted == "auto" and not chosen
    ]


def _share(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def _fewest_rows(recipe: Recipe) -> int:
    """Rows in the smallest step of the trainings that the workers do together."""
    trainings = [recipe.distillation(member) for member in recipe.family]
    if correction := recipe.correction():
        trainings.append(correction)
    return min(training.batch_rows for training in trainings)
