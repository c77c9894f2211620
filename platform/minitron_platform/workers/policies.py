"""Decisions in Ray Train's controller: whether failed workers are restarted, and who may end the controller."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from minitron_platform.workers.calls import packed_actor
from minitron_platform.workers.worker import WorkersFailed
from minitron_search.failures import first_cause, not_retryable, reason


class ControllerStarted(ControllerCallback):
    """Tells `calls` which actor is Ray Train's controller, so that the driver can end it while it waits for resources."""

    def __init__(self, calls: Any) -> None:
        self.calls = calls

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        self.calls.controller_started.remote(packed_actor())


class CallFailurePolicy(DefaultFailurePolicy):
    """Counts failures for each call, not for all of them. calls: the actor of `minitron_platform.workers.calls`."""

    def __init__(self, failure_config: FailureConfig, calls: Any) -> None:
        super().__init__(failure_config)
        self.calls = calls

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Restart the workers unless the error would come again, or they have failed too often during the present call. A node
        that was taken away is no failure."""
        error = training_failed_error
        if isinstance(error, PreemptionError):
            event, retryable = WorkersFailed((), "a node is taken away", counts=False), True
        elif isinstance(error, WorkerGroupError):
            ranks, cause = first_cause(error.worker_failures)
            counts = not any(map(_is_preempted_actor, error.worker_failures.values()))
            event, retryable = (
                WorkersFailed(tuple(ranks), reason(cause), counts),
                not isinstance(cause, not_retryable()),
            )
        else:
            return super().make_decision(error)
        try:
            restart = ray.get(self.calls.may_restart.remote(event, retryable))
        except RayError:  # the driver has ended
            restart = False
        return FailureDecision.RETRY if restart else FailureDecision.RAISE
