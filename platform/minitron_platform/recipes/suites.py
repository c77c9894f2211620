"""The keys of a recipe's `evaluate` that stand for many of its tasks: a suite, and the data and limit of all tasks."""

from __future__ import annotations

from typing import Any

from minitron.errors import InputError
from minitron.evaluation.suites import folder_of, settings_of, suite


def expanded(values: Any) -> Any:
    """The section `evaluate` with the tasks of its suite after its own, and with `data` and `limit` given to each task.

    A task of the suite that the section lists itself, with the same number of examples, has the section's settings. `values`
    need not be valid yet; what is not is left to be refused. Raises ValueError for a suite that does not exist.
    """
    if not isinstance(values, dict) or not isinstance(values.get("tasks", []), list | None):
        return values
    values = dict(values)
    tasks = [dict(task) if isinstance(task, dict) else task for task in values.get("tasks") or []]
    if isinstance(values.get("suite"), str):
        try:
            of_suite = settings_of(suite(values.pop("suite")))
        except InputError as error:
            raise ValueError(f"{error.problem}; {error.remedy}") from error
        given = {(task.get("name"), task.get("num_fewshot", 0)) for task in tasks if isinstance(task, dict)}
        tasks += [task for task in of_suite if (task["name"], task.get("num_fewshot", 0)) not in given]
    data, limit = values.get("data"), values.get("limit")
    for task in tasks:
        if not isinstance(task, dict):
            continue
        if isinstance(data, str) and not task.get("data") and isinstance(task.get("name"), str):
            task["data"] = folder_of(data, task["name"])
        if isinstance(limit, int | float):
            task.setdefault("limit", limit)
    values["tasks"] = tasks
    for key, kind in (("data", str), ("limit", (int, float))):
        if isinstance(values.get(key), kind) and tasks:
            del values[key]
    return values
