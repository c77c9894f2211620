"""The Ray of a run: a private one is started in the background while the stages before the search compute."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from ray._private.utils import estimate_available_memory, resolve_object_store_memory

from minitron.device import DTYPES
from minitron_platform.cluster.ray_session import ray_session
from minitron_platform.cluster.room import (
    check_cluster,
    cluster_nodes,
    joins_cluster,
    private_node,
    resources_here,
    resources_of_cluster,
    room_text,
)
from minitron_platform.recipes.resources import ResolvedResources
from minitron_platform.stages.context import Context
from minitron_platform.stages.teacher import Teacher


class RayStart:
    """Ray for what is done inside `stack`: a cluster that is joined, or a private one on this machine. `logs` is the folder
    for what workers of the private one printed, if the run fails."""

    def __init__(self, stack: ExitStack, address: str | None, logs: str) -> None:
        self.stack, self.address, self.logs = stack, address, logs
        self.resources: ResolvedResources | None = None
        self.private: _PrivateRay | None = None

    def ahead(self, context: Context) -> None:
        """Begin to start a private Ray, without waiting for it. Needs the teacher's architecture."""
        if self.private is None and not joins_cluster(self.address):
            self.private = _PrivateRay(self._here(context), self.address, self.logs)
            self.stack.push(self.private.end)

    def need(self, context: Context) -> ResolvedResources:
        """Have Ray; what trials and workers take there."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what earlier stages held; workers share the GPU
        if self.resources is not None:
            return self.resources
        if joins_cluster(self.address):
            self.stack.enter_context(ray_session(self.address, keep_logs=self.logs))
            self.resources = resources_of_cluster(context.recipe)
            check_cluster(self.resources)
            context.console.say(f"  resources: {room_text(self.resources, cluster_nodes())}")
        else:
            self.ahead(context)
            assert self.private
            self.private.wait()
            self.resources = self._here(context)
            check_cluster(self.resources)
        return self.resources

    def _here(self, context: Context) -> ResolvedResources:
        teacher = context.output(Teacher)
        return resources_here(context.recipe, teacher.architecture, DTYPES[teacher.dtype].itemsize)


class _RunFailedError(Exception):
    """The run ended with an error."""


class _PrivateRay:
    """A private Ray that a thread starts, keeps and ends: the kernel ends Ray's processes with the thread that started them.

    The memory that it offers is what is free now, before stages in the meantime load their models.
    """

    def __init__(self, resources: ResolvedResources, address: str | None, logs: str) -> None:
        node, free = private_node(resources), estimate_available_memory()
        store = resolve_object_store_memory(free)
        self.session = ray_session(
            address,
            num_cpus=int(node["CPU"]),
            num_gpus=int(node["GPU"]),
            memory=free - store,
            object_store_memory=store,
            keep_logs=logs,
        )
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit)  # as Ray does itself where the main thread starts it
        self.started, self.ending = threading.Event(), threading.Event()
        self.run_failed = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self.kept = self.thread.submit(self._keep)
        self.kept.add_done_callback(lambda kept: self.started.set())

    def wait(self) -> None:
        """Until Ray is there. Raises what has kept it from starting."""
        self.started.wait()
        if self.kept.done():
            self.kept.result()

    def end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.run_failed = error is not None
        self.ending.set()
        self.thread.shutdown()

    def _keep(self) -> None:
        with suppress(_RunFailedError), self.session:
            self.started.set()
            self.ending.wait()
            if self.run_failed:
                raise _RunFailedError  # so that the session keeps its logs


def _exit(number: int, frame: Any) -> None:
    sys.exit(number)
