"""Names of models that fit into the columns of a table and still tell the models apart."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 20  # characters of a name in a column


def short_names(names: Sequence[str]) -> dict[str, str]:
    """A name of at most LONGEST characters for each of `names`: the names themselves if all are so short, otherwise the last
    parts of the paths, as many as tell them apart, otherwise numbers from 1. Equal names are one model."""
    every = list(dict.fromkeys(names))
    for parts in range(max(name.count("/") for name in every) + 1, 0, -1) if every else ():
        short = [_last(name, parts) for name in every]
        if len(set(short)) < len(every):
            break
        if max(map(len, short)) <= LONGEST:
            return dict(zip(every, short, strict=True))
    return {name: str(number) for number, name in enumerate(every, start=1)}


def legend(shown: dict[str, str]) -> list[str]:
    """A line for each name that is not shown whole."""
    return [f"{short}: {name}" for name, short in shown.items() if short != name]


def _last(name: str, parts: int) -> str:
    short = "/".join(name.rsplit("/", parts)[-parts:])
    return short if "(" in short else short.removesuffix(")")  # of "student (runs/a.json)"
