"""A trial in several processes of Ray Train, for a candidate that is too large for one worker."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import ray
import torch.distributed as dist
from ray.train import RunConfig, TrainingFailedError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from minitron import storage
from minitron.architecture import Architecture
from minitron.log_records import make_records_safe
from minitron_search.committed_checkpoints import CommittedCheckpoints
from minitron_search.elastic import ElasticPolicy, scaling_config
from minitron_search.events import Event, Report
from minitron_search.failures import first_cause
from minitron_search.leaving import group_is_leaving
from minitron_search.private_ray import is_private
from minitron_search.search_task import SearchTask
from minitron_search.torch_trainer import TorchTrainer
from minitron_search.train_files import storage_settings
from minitron_search.trial import prepare, train
from minitron_search.trial_store import drop_checkpoints


def run_trial_on_workers(
    task: SearchTask,
    architecture: Architecture,
    report: Report,
    *,
    workers: int,
    least: int | None = None,
    share: Mapping[str, float],
    scratch: str,
    until: int | None = None,
) -> None:
    """Run `minitron_search.trial.run_trial` in `workers` processes, each of which requests `share` of Ray's resources; with
    `least` in fewer, at least that many, while the cluster has no room for all.

    Raises what a worker raised, or RayActorError for a worker that died. The caller restarts the trial, which then resumes from
    its checkpoint.
    """
    if not prepare(task, architecture):
        return
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    here = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(_this_node(), soft=False)}
    # A queue because `ray.train.report` is a barrier that waits for the controller's next poll, about two seconds every step.
    events = Queue(actor_options=here)
    forwarder = threading.Thread(target=_forward, args=(events, report))
    forwarder.start()
    elastic = least is not None and least < workers and not is_private()
    checkpoints = ray.remote(CommittedCheckpoints).options(**here).remote() if elastic else None
    scaling = scaling_config(workers, least if elastic else None, share)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "task": task,
            "architecture": architecture,
            "events": events,
            "checkpoints": checkpoints,
            "until": until,
        },
        scaling_config=scaling,
        scaling_policy=ElasticPolicy(scaling, checkpoints) if elastic else None,
        # A new name each time: a trial resumes from its own verified checkpoints, not from Ray Train's snapshot.
        run_config=RunConfig(
            name=f"trial-{uuid.uuid4().hex[:8]}", **storage_settings(storage.join(scratch, "workers"))
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise first_cause(getattr(error, "worker_failures", {0: error}))[1] from None
    finally:
        events.put(None)
        forwarder.join()
        events.shutdown(force=True)
        if checkpoints is not None:
            ray.kill(checkpoints)
    if until is None:
        task.before_commit()
        drop_checkpoints(task.folder, architecture)


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _forward(events: Queue, report: Report) -> None:
    for event in iter(events.get, None):
        report(event)


def _worker(config: dict[str, Any]) -> None:
    make_records_safe()
    is_first, checkpoints = dist.get_rank() == 0, config["checkpoints"]
    train(
        config["task"],
        config["architecture"],
        config["events"].put if is_first else _ignore,
        group_is_leaving,
        saved=checkpoints.resumable.remote if is_first and checkpoints is not None else _ignore,
        until=config["until"],
    )


def _ignore(*event: Event) -> None:
    pass
