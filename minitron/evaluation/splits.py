"""Which splits of a benchmark's documents are scored, and which one few-shot examples come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron.errors import InputError
from minitron.evaluation.document_splits import count_documents

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


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


def local_definition(config: dict[str, Any], splits: dict[str, list[Path]], scored: str) -> dict[str, Any]:
    """A task's definition without the splits that are not among the local `splits`, so that lm-eval draws few-shot examples as
    it does for a definition that never had them."""
    kept = {key: split if (split := config.get(key)) in splits else None for key in SPLIT_KEYS}
    if scored not in (kept["test_split"], kept["validation_split"]):  # the only split, under a name of its own
        only_validation = config.get("validation_split") and not config.get("test_split")
        kept["validation_split" if only_validation else "test_split"] = scored
    fewshot_config = dict(config.get("fewshot_config") or {})
    if fewshot_config.get("split") not in splits:
        fewshot_config.pop("split", None)
    return {**config, **kept, "fewshot_config": fewshot_config or None}


def fewshot_split(config: dict[str, Any]) -> str | None:
    """The split that lm-eval takes few-shot examples from; None if the definition contains them."""
    if named := _named_split(config):
        return named
    if own_examples(config):
        return None
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def leaves_out_own(config: dict[str, Any]) -> bool:
    """Whether lm-eval draws one example more than asked for, and leaves out the scored document.

    It does for a definition that names the same split for examples and for tests, or none for both, whatever the split that
    examples then come from. Source: `ConfigurableTask.fewshot_context` of lm-eval.
    """
    return _named_split(config) == (config.get("test_split") or None)


def may_draw(config: dict[str, Any]) -> bool:
    """Whether few-shot examples never contain the document that they are for, as far as the splits say."""
    split = fewshot_split(config)
    if split is None:
        return own_examples(config)
    return split != definition_scored_split(config) or leaves_out_own(config)


def check_examples(
    task: str, num_fewshot: int, data: str, config: dict[str, Any], splits: dict[str, list[Path]], scored: str
) -> None:
    """Raise InputError for local documents without `num_fewshot` examples where lm-eval draws them. The scored split is used
    only if the definition itself does so, with the scored document left out."""
    local = local_definition(config, splits, scored)
    fewshot = fewshot_split(local)
    if not num_fewshot or fewshot is None:
        return
    by_definition = leaves_out_own(local) and fewshot_split(config) == definition_scored_split(config)
    if fewshot == scored and not by_definition:
        raise InputError(
            f"task {task!r}: num_fewshot is {num_fewshot}, but {data} has no split for examples besides "
            f"{scored!r}, which is the scored one",
            "set num_fewshot to 0, or give a folder that also has the task's train, validation or dev split",
        )
    available = count_documents(splits[fewshot]) - leaves_out_own(local)
    if available < num_fewshot:
        raise InputError(
            f"task {task!r}: num_fewshot is {num_fewshot}, but the split {fewshot!r} of {data} has {available} examples"
            f"{' besides the one that is left out' if leaves_out_own(local) else ''}",
            f"set num_fewshot to {available} at most",
        )


def own_examples(config: dict[str, Any]) -> bool:
    """Whether the definition contains its few-shot examples."""
    return bool((config.get("fewshot_config") or {}).get("samples"))


def definition_scored_split(config: dict[str, Any]) -> str:
    """The split that lm-eval scores."""
    return config.get("test_split") or config.get("validation_split") or ""


def _named_split(config: dict[str, Any]) -> str | None:
    """The split that the definition names for few-shot examples."""
    fewshot_config = config.get("fewshot_config") or {}
    return fewshot_config.get("split", config.get("fewshot_split")) or None
