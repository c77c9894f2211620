"""Ray Train's TorchTrainer without what a distillation does not need and whose start would delay its first step: helper
processes, and torch in the controller.

Distillation uses no Ray datasets. A private Ray is a single node that ends with its driver: it has no autoscaler to inform, no
placement groups that could outlive the driver, and no node that could be preempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from minitron_search.private_ray import is_private
from minitron_search.process_group import ProcessGroupConfig


class TorchTrainer(DataParallelTrainer):
    """failure_policy, scaling_policy: decide about restarts and the number of workers instead of Ray Train's own. callbacks:
    further ones, that run in the controller."""

    def __init__(
        self,
        *arguments: Any,
        failure_policy: FailurePolicy | None = None,
        scaling_policy: ScalingPolicy | None = None,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        super().__init__(*arguments, backend_config=ProcessGroupConfig(), **options)
        self._failure_policy = failure_policy
        self._scaling_policy = scaling_policy
        self._callbacks = callbacks

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback) if is_private() else DatasetsCallback
        usual = super()._create_default_callbacks()
        return [*(callback for callback in usual if not isinstance(callback, unused)), *self._callbacks]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._failure_policy is not None:
            options["failure_policy"] = self._failure_policy
        if self._scaling_policy is not None:
            options["scaling_policy"] = self._scaling_policy
        elif is_private():
            options["scaling_policy"] = _NoAutoscaler(self.scaling_config)
        if not is_private():
            return super()._initialize_and_run_controller(**options)
        controller = ray.remote(num_cpus=0)(_Controller).remote(**options)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class _WorkerGroup(WorkerGroup):
    """Without a runtime environment, which a private Ray's node could not set up, and whose processes Ray starts twice, one
    after the other, and never ahead: it would only hold the variables of Ray Train, which workers have with the driver's."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _NoAutoscaler(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass
