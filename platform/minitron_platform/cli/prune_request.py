"""The shape and the layers that `minitron prune` is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minitron.errors import InputError

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores


@dataclass(frozen=True)
class Request:
    """The options as they were given; None is an option left out. Raises InputError where two of them contradict."""

    sizes: dict[str, int]
    parameters: float | None
    how: str | None
    multiple: int | None
    like: str | None
    layers: list[int] | None
    depth: str | None
    metric: str | None

    def __post_init__(self) -> None:
        ways = self._ways()
        if len(ways) > 1:
            raise InputError(f"{' and '.join(ways)} give the shape twice", "keep one of them")
        if not ways and self.layers is None:
            raise InputError(
                "no shape is given",
                "add --hidden-size and the like, --parameters N, --like NAME, or --layers RANGES",
            )
        if self.parameters is None:
            self._refuse("without --parameters", "how", "multiple")
        elif not 1 <= self.parameters < math.inf:
            raise InputError(f"--parameters: {self.parameters} is no number of parameters", "give one such as 4.5e9")
        if self.layers is not None:
            self._refuse("with --layers, which names the layers already", "depth", "metric")

    def _ways(self) -> list[str]:
        """The options that give the shape, one text for each way."""
        sizes = " ".join(f"--{name.replace('_', '-')}" for name in self.sizes)
        named = {"--like": self.like, "--parameters": self.parameters, sizes: self.sizes or None}
        return [option for option, value in named.items() if value is not None]

    def _refuse(self, why: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise InputError(f"--{name}: {getattr(self, name)} {why} has no effect", f"leave --{name} out")

    def shape(self, base: Architecture) -> Architecture:
        """The architecture to cut out of `base`. Raises InputError unless it and the listed layers fit inside `base`."""
        from minitron.architecture.published import published
        from minitron.architecture.sizing import architecture_for

        listed = self.layers
        if listed is not None and listed[-1] >= base.num_layers:
            raise InputError(
                f"--layers: {listed[-1]} is no layer of this model, which has {base.num_layers}",
                f"count from 0 to {base.num_layers - 1}",
            )
        if self.like:
            target = published(self.like, base)
        elif self.parameters:
            how, multiple = self.how or "width", self.multiple or 64
            target = architecture_for(base, round(self.parameters), how=how, multiple=multiple)
        else:
            target = replace(base, **({"num_layers": len(listed)} if listed else {}) | self.sizes)  # type: ignore[arg-type]
        if listed is not None and len(listed) != target.num_layers:
            raise InputError(
                f"--layers: {ranges(listed)} are {len(listed)} layers, but {self._ways()[0]} leaves {target.num_layers}",
                f"list {target.num_layers}, or leave one of the two out",
            )
        target.check_inside(base)
        return target

    def kept(self, scores: ImportanceScores, base: Architecture, target: Architecture) -> tuple[list[int], str]:
        """(the layers that stay, how they were chosen). Raises InputError where the metric was not measured."""
        from minitron.pruning.selection import kept_layers

        if self.layers is not None:
            return self.layers, "as listed"
        depth = self.depth or "contiguous"
        size = base.num_layers - target.num_layers if depth == "contiguous" else 1
        measured = [name for name, sizes in scores.removal.items() if size in sizes]
        metric = self.metric or ("loss" if depth == "iterative" or "loss" in measured else "cosine")
        kept = kept_layers(scores, base.num_layers, target.num_layers, how=depth, metric=metric)
        chosen = f"{depth}, by {metric}"
        if not self.metric and metric == "cosine":
            chosen += f"; the loss without {size} layer{'s' if size > 1 else ''} was not measured"
            chosen += f", for --metric there is {', '.join(measured)}" if measured else ""
        return kept, chosen


def layer_numbers(text: str) -> list[int]:
    """0-2,5 as [0, 1, 2, 5]. Raises InputError for anything else, and unless they ascend."""
    parts = text.replace(" ", "").split(",")
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise InputError(f"--layers: {part!r} is not a layer or a range", "give layers such as 0-14,31")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise InputError(f"--layers: {text} does not ascend", "give every layer once, in order, such as 0-14,31")
    return numbers


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
