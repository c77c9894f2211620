"""Measurements of a model: held-out loss and KL, benchmark scores, prefill throughput.

Names are loaded on first use, so that lm-eval is imported only for benchmark scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron.lazy_names import lazy_names

if TYPE_CHECKING:
    from minitron.evaluation.harness import evaluate as evaluate
    from minitron.evaluation.harness import evaluate_documents as evaluate_documents
    from minitron.evaluation.harness import evaluate_served as evaluate_served
    from minitron.evaluation.heldout import HeldoutMetrics as HeldoutMetrics
    from minitron.evaluation.heldout import heldout_metrics as heldout_metrics
    from minitron.evaluation.heldout import teacher_targets as teacher_targets
    from minitron.evaluation.metrics import Metric as Metric
    from minitron.evaluation.metrics import task_metric as task_metric
    from minitron.evaluation.readiness import check_ready as check_ready
    from minitron.evaluation.readiness import check_requirements as check_requirements
    from minitron.evaluation.readiness import task_gaps as task_gaps
    from minitron.evaluation.scores import DocumentResult as DocumentResult
    from minitron.evaluation.scores import Evaluated as Evaluated
    from minitron.evaluation.scores import Score as Score
    from minitron.evaluation.speed import Throughput as Throughput
    from minitron.evaluation.speed import interleaved_throughput as interleaved_throughput
    from minitron.evaluation.speed import interleaved_token_latency as interleaved_token_latency
    from minitron.evaluation.speed import throughput as throughput
    from minitron.evaluation.suites import Suite as Suite
    from minitron.evaluation.suites import suite as suite
    from minitron.evaluation.tasks import Task as Task
    from minitron.evaluation.tasks import check_tasks as check_tasks

_PUBLIC = {
    "DocumentResult": ".scores",
    "Evaluated": ".scores",
    "Score": ".scores",
    "evaluate": ".harness",
    "evaluate_documents": ".harness",
    "evaluate_served": ".harness",
    "HeldoutMetrics": ".heldout",
    "heldout_metrics": ".heldout",
    "teacher_targets": ".heldout",
    "Metric": ".metrics",
    "task_metric": ".metrics",
    "Suite": ".suites",
    "suite": ".suites",
    "Task": ".tasks",
    "check_tasks": ".tasks",
    "check_ready": ".readiness",
    "check_requirements": ".readiness",
    "task_gaps": ".readiness",
    "Throughput": ".speed",
    "interleaved_throughput": ".speed",
    "interleaved_token_latency": ".speed",
    "throughput": ".speed",
}

__all__ = list(_PUBLIC)


def __dir__() -> list[str]:
    return __all__


__getattr__ = lazy_names(__name__, _PUBLIC)
