"""The options of `minitron prune` that determine the shape of the pruned model and its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minitron.arguments import short_repr
from minitron.errors import InputError

if TYPE_CHECKING:
    from minitron.architecture import Architecture
    from minitron.importance import ImportanceScores

MOST_LAYERS = 10_000  # no model has as many


@dataclass(frozen=True)
class Request:
    """The options as the user gave them; None for one that was left out. Raises InputError for options that conflict."""

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
            raise InputError(f"{' and '.join(ways)} each determine the shape", "give only one of them")
        if not ways and self.layers is None:
            raise InputError(
                "no option determines the shape",
                "give sizes such as --hidden-size, or --parameters N, --like NAME or --layers RANGES",
            )
        if self.parameters is None:
            self._refuse("has no effect without --parameters", "how", "multiple")
        elif not 1 <= self.parameters < math.inf:
            raise InputError(
                f"--parameters: {self.parameters} is not a valid number of parameters", "give a number such as 4.5e9"
            )
        if self.layers is not None:
            self._refuse("has no effect with --layers", "depth", "metric")

    def _ways(self) -> list[str]:
        """The ways to determine the shape that were used, each as the options' names."""
        sizes = " ".join(f"--{name.replace('_', '-')}" for name in self.sizes)
        values = {"--like": self.like, "--parameters": self.parameters, sizes: self.sizes or None}
        return [option for option, value in values.items() if value is not None]

    def _refuse(self, why: str, *names: str) -> None:
        """Raise InputError if one of the options `names` was given."""
        for name in names:
            if getattr(self, name) is not None:
                raise InputError(f"--{name}: {getattr(self, name)} {why}", f"leave --{name} out")

    def shape(self, base: Architecture) -> Architecture:
        """The architecture of the pruned model.

        Raises InputError if it is larger than `base` in a dimension, or if a layer in --layers does not exist in `base`.
        """
        with named_by_option({*self.sizes, "parameters"}):
            return self._shape(base)

    def _shape(self, base: Architecture) -> Architecture:
        from minitron.architecture.published import published
        from minitron.architecture.sizing import architecture_for

        layers = self.layers
        if layers is not None and layers[-1] >= base.num_layers:
            raise InputError(
                f"--layers: the model has no layer {layers[-1]}, only {base.num_layers} layers",
                f"use layers from 0 to {base.num_layers - 1}",
            )
        if self.like:
            target = published(self.like, base)
        elif self.parameters:
            target = architecture_for(
                base, round(self.parameters), how=self.how or "width", multiple=self.multiple or 64
            )
        else:
            target = replace(base, **({"num_layers": len(layers)} if layers else {}) | self.sizes)  # type: ignore[arg-type]
        if layers is not None and len(layers) != target.num_layers:
            raise InputError(
                f"--layers: {ranges(layers)} are {len(layers)} layers, but {self._ways()[0]} keeps {target.num_layers}",
                f"list {target.num_layers} layers, or leave one of the two options out",
            )
        target.check_inside(base)
        return target

    def layers_to_keep(
        self, scores: ImportanceScores, base: Architecture, target: Architecture
    ) -> tuple[list[int], str]:
        """The layers to keep, and how they were chosen. Raises InputError if the scores lack the requested metric."""
        from minitron.pruning.selection import kept_layers

        if self.layers is not None:
            return self.layers, "as listed"
        depth = self.depth or "contiguous"
        size = base.num_layers - target.num_layers if depth == "contiguous" else 1
        measured = [name for name, sizes in scores.removal.items() if size in sizes]
        metric = self.metric or ("loss" if depth == "iterative" or "loss" in measured else "cosine")
        kept = kept_layers(scores, base.num_layers, target.num_layers, how=depth, metric=metric)
        reason = f"{depth}, by {metric}"
        if not self.metric and metric == "cosine":
            reason += f"; the loss without {size} layer{'s' if size > 1 else ''} was not measured"
            reason += f"; --metric also accepts {', '.join(measured)}" if measured else ""
        return kept, reason


@contextmanager
def named_by_option(names: Collection[str]) -> Iterator[None]:
    """Write an InputError that begins with one of the fields `names`, such as "hidden_size: ...", with the option's name."""
    try:
        yield
    except InputError as error:
        field, colon, rest = error.problem.partition(": ")
        if not colon or field not in names:
            raise
        raise InputError(f"--{field.replace('_', '-')}: {rest}", error.remedy) from error


def layer_numbers(text: str) -> list[int]:
    """The layers in a text such as "0-2,5": [0, 1, 2, 5]. Raises InputError unless they are numbers in ascending order."""
    parts = text.replace(" ", "").split(",")
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match:
            raise InputError(f"--layers: {short_repr(part)} is not a layer or a range", "give layers such as 0-14,31")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > MOST_LAYERS:
            raise InputError(f"--layers: {part} is not a range of layers", f"go up, and to {MOST_LAYERS:,} at most")
        numbers += range(first, last + 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise InputError(
            f"--layers: {short_repr(text)} is not in ascending order",
            "give every layer once, in order, such as 0-14,31",
        )
    return numbers


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: [0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
