"""The disk that a run needs: what takes it, and the settings with which it is enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minitron.errors import StorageError
from minitron_platform.recipes.schema import Recipe

LARGEST = 3  # stages that an error names


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of a run on a disk that is too small."""

    storage: str
    """Location of the storage."""
    needed: int
    """Bytes of the stages that are not done yet."""
    free: int
    """Bytes that the disk has for them."""
    parts: Mapping[str, int]
    """Bytes by stage."""

    @property
    def problem(self) -> str:
        """What is missing, and what takes the most."""
        unit, size_of_unit = ("GB", 1e9) if self.needed >= 1e9 else ("MB", 1e6)
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:LARGEST]
        named = ", ".join(f"{name} {size / size_of_unit:.1f}" for name, size in largest if size)
        return (
            f"{self.storage}: the run needs about {self.needed / size_of_unit:.1f} {unit} ({named}), and the "
            f"disk has {self.free / size_of_unit:.1f} {unit} free"
        )

    def error(self, recipe: Recipe, fits: Callable[[Recipe], bool]) -> StorageError:
        """The error, with the settings that would be enough. fits: whether another recipe has room on the disk."""
        problem = self.problem
        remedies = ["free some space", "choose another location with --storage"]
        train_rows = recipe.data.train_rows
        rows = _most_rows(recipe, fits)
        if rows:
            problem += f": {rows:,} of {train_rows:,} training rows fit"
        online = recipe.model_copy(update={"targets": recipe.targets.model_copy(update={"mode": "online"})})
        if recipe.targets.mode == "stored" and fits(online):
            remedies.append("run the teacher during the distillation with targets.mode=online")
        if rows:
            remedies.append(f"lower data.train_rows to {rows}")
        return StorageError(problem, ", ".join(remedies[:-1]) + f", or {remedies[-1]}")


def _most_rows(recipe: Recipe, fits: Callable[[Recipe], bool]) -> int:
    """The most training rows with which the run has room, by bisection; 0 if it has with no number that the recipe allows."""
    low, high = max(1, recipe.calibrate.rows), recipe.data.train_rows
    if not fits(_with_rows(recipe, low)):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_with_rows(recipe, middle)) else (low, middle)
    return low


def _with_rows(recipe: Recipe, rows: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_rows": rows})})
