"""Which splits of a benchmark's documents are scored, and which one few-shot examples come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron.evaluation.documents import count_documents


def scored_split(task: str, data: str, config: dict[str, Any], splits: dict[str, list[Path]]) -> str:
    """The split of local documents to score. Raises InputError if it is not among several `splits`."""
    expected = [split for key in ("test_split", "validation_split") if (split := config.get(key))]
    for split in expected:
        if split in splits:
            return split
    if len(splits) == 1:
        return next(iter(splits))
    raise InputError(
        f"task {task!r}: {data} has the splits {', '.join(splits)}",
        f"the task is scored on {' or '.join(expected)}: give a split this name, or give only its folder or file",
    )


def fewshot_split(config: dict[str, Any], splits: dict[str, list[Path]], scored: str) -> str | None:
    """The split for few-shot examples, in lm-eval's order of preference except that the scored split is never used."""
    nested = (config.get("fewshot_config") or {}).get("split")
    for split in (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split")):
        if split in splits and split != scored:
            return split
    return None


def check_examples(
    task: str, num_fewshot: int, data: str, config: dict[str, Any], splits: dict[str, list[Path]], scored: str
) -> None:
    """Raise InputError for local documents without `num_fewshot` examples outside the scored split."""
    if not num_fewshot or own_examples(config):
        return
    fewshot = fewshot_split(config, splits, scored)
    if fewshot is None:
        raise InputError(
            f"task {task!r}: num_fewshot is {num_fewshot}, but {data} has no split for examples besides "
            f"{scored!r}, which is the scored one",
            "set num_fewshot to 0, or give a folder that also has the task's train, validation or dev split",
        )
    available = count_documents(splits[fewshot])
    if available < num_fewshot:
        raise InputError(
            f"task {task!r}: num_fewshot is {num_fewshot}, but the split {fewshot!r} of {data} has {available} examples",
            f"set num_fewshot to {available} at most",
        )


def own_examples(config: dict[str, Any]) -> bool:
    """Whether the definition contains its few-shot examples."""
    return bool((config.get("fewshot_config") or {}).get("samples"))


def hub_scored_split(config: dict[str, Any]) -> str:
    """The split of the hub's documents to score."""
    return config.get("test_split") or config.get("validation_split") or ""


def hub_fewshot_split(config: dict[str, Any]) -> str | None:
    """The split of the hub's documents for few-shot examples; None if there is none besides the scored one."""
    nested = (config.get("fewshot_config") or {}).get("split")
    named = (config.get("fewshot_split"), nested, config.get("training_split"), config.get("validation_split"))
    return next((split for split in named if split and split != hub_scored_split(config)), None)
