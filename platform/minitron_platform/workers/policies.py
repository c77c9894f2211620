"""Decisions in Ray Train's controller: whether failed workers are restarted, and when the number of workers changes."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
)
from ray.train.v2._internal.execution.worker_group.poll import _is_preempted_actor
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

from minitron_platform.workers.worker import WorkersFailed
from minitron_search.failures import NOT_RETRYABLE, first_cause, reason


class ControllerStarted(ControllerCallback):
    """Tells `calls` which actor is Ray Train's controller, so that the driver can end it while it waits for resources."""

    def __init__(self, calls: Any) -> None:
        self.calls = calls

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        self.calls.controller_started.remote([ray.get_runtime_context().current_actor])


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
            event, retryable = WorkersFailed(tuple(ranks), reason(cause), counts), not isinstance(cause, NOT_RETRYABLE)
        else:
            return super().make_decision(error)
        try:
            restart = ray.get(self.calls.may_restart.remote(event, retryable))
        except RayError:  # the driver has ended
            restart = False
        return FailureDecision.RETRY if restart else FailureDecision.RAISE


class CallScalingPolicy(ElasticScalingPolicy):
    """As many workers as the cluster has room for, between a least and a largest number. A running group is restarted with
    more of them only when that loses no work: between calls, and when a checkpoint has been committed."""

    # The workers that are wanted have room, unless the head does not know yet that their node is lost. By default Ray waits for
    # a minute before the nodes are counted again.
    START_SECONDS = 15

    def __init__(self, scaling_config: ScalingConfig, calls: Any) -> None:
        super().__init__(scaling_config)
        self.calls = calls
        self._wanted: ScalingDecision = NoopDecision()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller."""
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(self.START_SECONDS))
        super().after_controller_start(train_run_context)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as there is room for. With too little room the smallest number is requested, so that the driver sees
        what the group waits for. What was decided for the group before is out of date."""
        self._wanted = NoopDecision()
        self._maybe_send_resource_request()
        reserved = self._get_reserved_resources()
        if reserved is None:
            return NoopDecision()
        return self._get_resize_decision(max(self.scaling_config.min_workers, self._count_possible_workers(reserved)))

    def make_decision_for_running_worker_group(self, *arguments: Any, **state: Any) -> ScalingDecision:
        """Ray's latest decision, as soon as it loses no work."""
        before = self._latest_monitor_time
        decision = super().make_decision_for_running_worker_group(*arguments, **state)
        first = isinstance(self._wanted, NoopDecision)
        if self._latest_monitor_time != before:  # else it was too early to look at the cluster
            self._wanted = decision
        if isinstance(self._wanted, ResizeDecision) and ray.get(self.calls.may_resize.remote(first)):
            wanted, self._wanted = self._wanted, NoopDecision()
            return wanted
        return NoopDecision()

    def _get_reserved_resources(self) -> ReservedResources | None:
        """What the nodes that are there now have for the group; None if Ray does not answer.

        Ray's own answer is up to 20 s old, and may have a node that is lost since.
        """
        answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        try:
            reserved: ReservedResources = ray.get(answer, timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S)
        except RayError:
            return None
        return reserved
