"""Properties of benchmarks, as data: the metric that is usually quoted, and where to read documents without the hub."""

from __future__ import annotations

# The metric that published tables quote for a task that reports several. For other tasks the first metric in lm-eval's
# definition is used (arc_easy and sciq: acc; winogrande and mmlu: acc, their only one).
# Sources: the Minitron papers (arXiv 2407.14679, 2408.11796) and the Open LLM Leaderboard for arc_challenge and
# hellaswag; piqa and openbookqa as in the model cards of small models (SmolLM2, Pythia's tables give both).
METRIC = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
}

# For tasks that extract the answer from generated text in several ways (lm-eval's filters): the filter that published
# tables quote.
FILTER = {"gsm8k": "strict-match"}

# Fields that a release of the documents names differently from lm-eval's definition: {task: {name in the documents: name in
# the definition}}, renamed if the latter is absent. boolq: the original release has `answer` (true or false), SuperGLUE's
# has `label` (1 or 0).
RENAMED_FIELDS = {"boolq": {"answer": "label"}}
