"""The number of workers of a Ray Train group that follows the cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
from ray.exceptions import RayError
from ray.train import ScalingConfig
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
)

RESIZE_SECONDS = 10.0  # between two looks at the room that the cluster has for more workers


def scaling_config(count: int, least: int | None, share: Mapping[str, float]) -> ScalingConfig:
    """Ray Train's settings for `count` workers, each with `share` of Ray's resources; for `least` to `count` of them unless
    that is None."""
    return ScalingConfig(
        num_workers=count if least is None else (least, count),
        use_gpu=share.get("GPU", 0) > 0,
        resources_per_worker=dict(share),
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


class ElasticPolicy(ElasticScalingPolicy):
    """As many workers as the cluster has room for, between a least and a largest number. A running group is restarted with
    more of them only when that loses no work: when `may_resize` of the actor `checkpoints` says so."""

    # The workers that are wanted have room, unless the head does not know yet that their node is lost. By default Ray waits for
    # a minute before the nodes are counted again.
    START_SECONDS = 15

    def __init__(self, scaling_config: ScalingConfig, checkpoints: Any) -> None:
        super().__init__(scaling_config)
        self.checkpoints = checkpoints
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
        if isinstance(self._wanted, ResizeDecision) and ray.get(self.checkpoints.may_resize.remote(first)):
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
