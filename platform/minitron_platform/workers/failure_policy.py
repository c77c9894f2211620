"""Decides in Ray Train's controller whether failed workers are restarted: so many times in each call, not in all of them."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from minitron_platform.workers.calls import WorkersFailed
from minitron_search.failures import NOT_RETRYABLE, first_cause, reason


class CallFailurePolicy(DefaultFailurePolicy):
    """calls: the actor of `minitron_platform.workers.calls`, which counts the failures."""

    def __init__(self, failure_config: FailureConfig, calls: Any) -> None:
        super().__init__(failure_config)
        self.calls = calls

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Restart the workers unless the error would come again, or they have failed too often during the present call."""
        if not isinstance(training_failed_error, WorkerGroupError):
            return super().make_decision(training_failed_error)
        ranks, cause = first_cause(training_failed_error.worker_failures)
        event = WorkersFailed(tuple(ranks), reason(cause))
        try:
            restart = ray.get(self.calls.may_restart.remote(event, not isinstance(cause, NOT_RETRYABLE)))
        except RayError:  # the driver has ended
            restart = False
        return FailureDecision.RETRY if restart else FailureDecision.RAISE
